"""The log holds each step once, whatever a run went through, and any reader of JSON can read it."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanochameleon.errors import UserError
from nanochameleon.training.curves import plot_curves, smooth
from nanochameleon.training.monitor import Monitor, open_tensorboard, read_metrics, summary


def run(run_dir, total, every, start, stop, clock=lambda: 0.0):
    with Monitor(run_dir, total, start, clock) as monitor:
        for step in range(start, stop):
            if step % every == 0 or step == total - 1:
                monitor.log(step, loss=torch.tensor(1.5), loss_text=float(step), run=start, tokens=100 * (step + 1))
            monitor.progress(step)


@given(st.data(), st.integers(1, 40), st.integers(1, 7))
def test_a_run_that_dies_and_resumes_logs_each_due_step_once(tmp_path_factory, data, total, every):
    """It dies somewhere, resumes from a checkpoint at or before that place, and may do so again."""
    run_dir = tmp_path_factory.mktemp("run")
    start = 0
    for _ in range(data.draw(st.integers(0, 3))):
        died = data.draw(st.integers(start, total))
        run(run_dir, total, every, start, died)
        if data.draw(st.booleans()):
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write('{"step": 3, "lo')
        start = data.draw(st.integers(0, died))
    run(run_dir, total, every, start, total)
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [s for s in range(total) if s % every == 0 or s == total - 1]
    assert all(line["run"] == start for line in lines if line["step"] >= start)


def test_lines_are_on_the_disk_as_they_are_logged(tmp_path):
    with Monitor(tmp_path, 10) as monitor:
        monitor.log(0, loss=2.0)
        assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 2.0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_costs_no_step_and_lines_come_once_there_is_room(tmp_path, capsys):
    with Monitor(tmp_path, 10) as monitor:
        real = os.dup(monitor.file.fileno())
        with open("/dev/full", "a") as full:
            os.dup2(full.fileno(), monitor.file.fileno())
            monitor.log(0, loss=2.0)
        assert "training continues" in capsys.readouterr().err
        os.dup2(real, monitor.file.fileno())
        os.close(real)
        monitor.log(1, loss=1.0)
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2.0, 1.0]


def test_speed_and_time_are_of_training_alone_and_continue_after_a_resume(tmp_path):
    """Two ticks of the clock a step: 100 tokens in 2 s. The 1,000 s between the runs do not count."""
    times = iter(range(0, 2_000, 2))
    run(tmp_path, 4, 1, 0, 2, lambda: next(times))
    later = iter(range(3_000, 5_000, 2))
    run(tmp_path, 4, 1, 2, 4, lambda: next(later))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["seconds"] for line in lines] == [2, 4, 6, 8]
    assert [line["tokens_per_second"] for line in lines] == [50, 50, 50, 50]


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_line_is_strict_json(tmp_path_factory, value):
    def refuse(name):
        raise AssertionError(name)

    run_dir = tmp_path_factory.mktemp("run")
    with Monitor(run_dir, 1) as monitor:
        monitor.log(0, loss=value, loss_text=torch.tensor(value, dtype=torch.float64), loss_image=None)
    line = json.loads((run_dir / "metrics.jsonl").read_text(), parse_constant=refuse)
    expected = value if abs(value) < 2.0**128 else None  # what single precision has no finite number for
    assert (line["loss"], line["loss_text"], line["loss_image"]) == (expected, expected, None)


def test_the_bar_shows_progress_time_left_and_the_loss_of_each_modality(tmp_path, capsys):
    with Monitor(tmp_path, 8, start=2) as monitor:
        for step in range(2, 6):
            monitor.log(step, loss_text=2.3, loss_image=3.25, lr=1e-4, tokens=step)
            monitor.progress(step)
        monitor.bar.refresh()
        shown = capsys.readouterr().err.split("\r")[-1]
    assert "6/8" in shown and "75%" in shown and "left" in shown
    assert "text 2.300 image 3.250 lr 1.0e-04" in shown


def test_the_summary_leaves_out_what_is_not_there():
    assert (
        summary({"loss_text": None, "loss_image": 1.0, "tokens_per_second": 16_200.0}) == "image 1.000 16.2k tokens/s"
    )


@given(st.lists(st.floats(-1e3, 1e3), max_size=300))
def test_smoothing_keeps_length_and_range(values):
    smoothed = smooth(values)
    assert len(smoothed) == len(values)
    assert all(min(values) - 1e-6 <= value <= max(values) + 1e-6 for value in smoothed)


def test_smoothing_has_no_lag():
    ramp = [float(i) for i in range(400)]
    assert smooth(ramp)[10:-10] == pytest.approx(ramp[10:-10])


@pytest.mark.parametrize("lines", [0, 1, 50])
def test_the_curves_are_an_image_1000_pixels_wide_that_shows_the_data(tmp_path, lines):
    """Falling and rising curves give other images: something of the data is drawn; gaps and no data do no harm."""
    images = []
    for sign in (1, -1):
        metrics = [{"step": s, "loss_text": 5 + sign * s / 50, "loss_image": None if s % 3 else 4.0, "log_z": sign * s,
                    "output_norm": 9.0, "grad_norm": 1.0 + s, "lr": 1e-3} for s in range(lines)]  # fmt: skip
        plot_curves(metrics, tmp_path / "curves.png")
        images.append(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert images[0].width == 1000
    assert (images[0].tobytes() != images[1].tobytes()) == (lines > 1)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_a_run_that_rolls_back_logs_each_step_once(tmp_path):
    with Monitor(tmp_path, 10, clock=lambda: 0.0) as monitor:
        for step in range(6):
            monitor.log(step, tokens=10 * step)
        monitor.rewind(3)
        monitor.log(3, tokens=70)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["tokens"]) for line in lines] == [(0, 0), (1, 10), (2, 20), (3, 70)]


def test_mfu_is_the_fraction_of_the_peak_that_tokens_take(tmp_path):
    """100 tokens in 2 s of which each takes 1/1000 of what the devices do in a second."""
    times = iter(range(0, 100, 2))
    with Monitor(tmp_path, 3, clock=lambda: next(times), mfu_per_token=1e-3) as monitor:
        for step in range(3):
            monitor.log(step, tokens_with_padding=100 * (step + 1))
    assert [line["mfu"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.05] * 3


def test_a_log_under_older_names_is_read_and_continued(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "left_out": 2, "ids": 100, "seconds": 1.0}\n')
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["skipped_updates"] == 2
    with Monitor(tmp_path, 3, start=1, clock=iter((0.0, 2.0)).__next__, mfu_per_token=1e-3) as monitor:
        assert monitor.log(1, tokens_with_padding=200)["mfu"] == 0.05


def test_several_numbers_a_line_are_strict_json_too(tmp_path):
    with Monitor(tmp_path, 1) as monitor:
        monitor.log(0, attention_logits=[1.5, math.nan, math.inf])
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["attention_logits"] == [1.5, None, None]


def test_tensorboard_gets_the_same_numbers_and_a_curve_for_each_layer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = open_tensorboard(tmp_path / "board")
    with Monitor(tmp_path, 2, tensorboard=board) as monitor:
        for step in range(2):
            monitor.log(step, loss=2.5 - step, attention_logits=[1.0, 3.0 + step], grad_norm=math.nan)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read["loss"] == [(0, 2.5), (1, 1.5)] and read["attention_logits/01"] == [(0, 3.0), (1, 4.0)]
    assert "grad_norm" not in read and "step" not in read


def test_without_the_package_tensorboard_is_refused_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochameleon.training.monitor.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.tensorboard needs the package tensorboard: pip install"):
        open_tensorboard(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# A log that is damaged

USUAL = [{"step": s, "loss_text": 2.0, "grad_norm": 1.0, "attention_logits": [1.0, 2.0], "lr": 1e-3} for s in (0, 5, 9)]
ODD = {
    "a word for a number": '{"step": 3, "seconds": "x"}',
    "brackets": "[" * 100_000,
    "brackets in a field": '{"step": 3, "loss": ' + "[" * 100_000,
    "infinity": '{"step": 3, "loss_text": Infinity}',
    "not a number": '{"step": 3, "loss_text": NaN}',
    "several for one": '{"step": 3, "loss_text": [1, 2]}',
    "an object": '{"step": 3, "more": {}}',
    "a huge number": '{"step": 3, "output_norm": -1e308}',
    "a huge step": '{"step": 1%s}' % ("0" * 400),
    "a long number": '{"step": 3, "loss": %s}' % ("9" * 5_000),
    "a step below 0": '{"step": -3}',
    "no step": '{"loss": 1.0}',
    "a list": "[3]",
    "half a line": '{"step": 3, "lo',
    "no text": "\x00\ufffd",
}


@pytest.mark.parametrize("kind", ODD)
def test_a_damaged_line_of_the_log_is_left_out_with_one_warning(kind, tmp_path, capsys):
    before, *after = map(json.dumps, USUAL)
    (tmp_path / "metrics.jsonl").write_text("\n".join([before, ODD[kind], *after, ""]))
    assert read_metrics(tmp_path / "metrics.jsonl") == USUAL
    with Monitor(tmp_path, 20, start=10) as monitor:
        monitor.log(10, loss_text=1.0)
    assert capsys.readouterr().err.count("1 damaged lines are left out") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 5, 9, 10]


def test_a_line_that_a_kill_has_cut_needs_no_warning(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(USUAL[0]) + '\n{"step": 3, "lo')
    with Monitor(tmp_path, 20, start=10):
        pass
    assert "warning" not in capsys.readouterr().err and read_metrics(tmp_path / "metrics.jsonl") == USUAL[:1]


def test_numbers_that_are_odd_together_stop_no_curve(tmp_path):
    """Lists of other lengths, a field that is a list in one line alone, the largest and the smallest numbers."""
    odd = [
        {"step": 2**53 - 1, "attention_logits": [1.0], "grad_norm": 1e-320, "output_norm": 3e38},
        {"step": 0, "attention_logits": [None] * 400, "grad_norm": 3e38, "lr": -3e38, "log_z": -3e38},
        {"step": 7, "attention_logits": 3.0, "grad_norm": 0, "loss_text": -3e38, "loss_image": 3e38},
        {"step": 7, "attention_logits": [], "grad_norm": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd + USUAL))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines == odd + USUAL
    plot_curves(lines, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width == 1000
