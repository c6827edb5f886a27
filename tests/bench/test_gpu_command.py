"""make gpu: a part that fails or hangs stops no other, finished ones are not run again, and the page is filled in."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nanochameleon.bench.gpu import machine, page, part, run, steps, toy
from nanochameleon.bench.gpu.context import ROOT, Context
from nanochameleon.bench.gpu.plan import DRY, ON_GPU
from nanochameleon.bench.rows import Row, make_row
from nanochameleon.cli import parse_run
from nanochameleon.errors import UserError

CPU = torch.device("cpu")
PAGE = (ROOT / "docs" / "results" / "gpu.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_every_cell_of_the_page_has_a_figure_and_every_figure_a_cell():
    cells = page.CELL.findall(PAGE)
    assert set(cells) <= set(page.figures(ON_GPU)) and len(cells) == len(set(cells))
    assert page.figures(ON_GPU).keys() == page.figures(DRY).keys()


def test_a_cell_without_a_figure_is_an_error():
    with pytest.raises(KeyError, match="unknown"):
        page.fill("| not measured <!-- unknown --> |", [], page.figures(ON_GPU))


def row(case: str, variant: str, value: float, unit: str) -> Row:
    return Row("train", case, variant, value, unit, None, None, "NVIDIA H100", "2.13.0", "abc")


def test_measured_figures_are_filled_in_and_others_stay():
    figures = {"speed": ("1.4B", "nano", "tokens/s"), "copy": ("copy", "torch", "TB/s")}
    text = "| x | 65k | not measured <!-- speed --> |\n| y | | not measured <!-- copy --> |\n"
    measured = [(row("1.4B", "nano", 61_234, "tokens/s"), "2026-11-29"), (row("copy", "numpy", 1, "TB/s"), "today")]
    filled = page.fill(text, measured, figures)
    assert filled == text.replace("not measured <!-- speed", "61,234 tokens/s (NVIDIA H100, 2026-11-29) <!-- speed")
    again = page.fill(filled, [(row("1.4B", "nano", 1.23456, "tokens/s"), "2027-01-01")], figures)
    assert "| 65k | 1.23 tokens/s (NVIDIA H100, 2027-01-01) <!-- speed --> |" in again
    assert page.fill(filled, [], figures) == filled


def test_the_page_is_no_other_text_after_it_is_filled():
    """With a row for each figure every cell is filled, and nothing but cells changes."""
    figures = page.figures(ON_GPU)
    filled = page.fill(
        PAGE, [(row(case, variant, 1, unit), "2026-11-29") for case, variant, unit in figures.values()], figures
    )
    bare = re.compile(page.CELL.pattern)
    assert "not measured <!--" not in filled and bare.sub("", filled) == bare.sub("", PAGE)


# ---------------------------------------------------------------------------------------------------------------------
# The parts


@pytest.fixture
def fake_parts(tmp_path, monkeypatch):
    """Three parts: one that writes a row, one that hangs after a row, one that fails. Returns a run's arguments."""
    script = tmp_path / "part.py"
    script.write_text(
        "import json, sys, time\n"
        "name, folder = sys.argv[1:3]\n"
        f"row = {json.dumps(asdict(make_row('gpu', 'copy', 'torch', 1.5, 'TB/s', CPU)))!r}\n"
        "open(f'{folder}/{name}.json', 'w').write(f'[{row}]')\n"
        "print('part', name)\n"
        "name == 'hangs' and time.sleep(60)\n"
        "sys.exit(name == 'fails')\n"
    )
    monkeypatch.setattr(run, "COMMAND", [sys.executable, str(script)])
    monkeypatch.setattr(run, "PARTS", {"hangs": (0.5, "x"), "fails": (30, "y"), "works": (30, "z")})
    return run.GPUArgs(dry=True, out=tmp_path / "out", minutes=5)


def test_a_part_that_hangs_or_fails_does_not_stop_the_next(fake_parts, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(fake_parts)  # its five minutes are those of the other two parts
    log = (fake_parts.folder / run.LOG).read_text()
    assert stop.value.code == 1 and capsys.readouterr().out == log
    assert "hangs: out of time" in log and "fails: failed" in log and "works: done" in log and "part works" in log
    assert "not finished: hangs, fails" in log
    filled = (fake_parts.folder / "gpu.md").read_text()
    assert filled.startswith("**A dry run") and "1.5 TB/s (" in filled
    assert (ROOT / "docs" / "results" / "gpu.md").read_text(encoding="utf-8") == PAGE


def test_finished_parts_are_not_run_again(fake_parts, monkeypatch):
    with pytest.raises(SystemExit):
        run.main(fake_parts)
    monkeypatch.setattr(run, "PARTS", {"fails": (30, "y"), "works": (30, "z")})
    ran = []
    monkeypatch.setattr(run, "run_part", lambda words, seconds, log: ran.append(words[0]) or "done")
    run.main(fake_parts)
    assert ran == ["fails"]
    monkeypatch.setattr(run, "sources", lambda: "changed")
    run.main(fake_parts)
    assert ran == ["fails", "fails", "works"]


def test_training_steps_and_generation_fit_into_the_first_call():
    names = list(run.PARTS)
    assert "steps" in (first := names[: names.index("generation") + 1])
    assert sum(run.PARTS[name][0] for name in first) < run.GPUArgs().seconds


def test_a_part_may_take_what_those_after_it_do_not_need(fake_parts, monkeypatch):
    limits = []
    monkeypatch.setattr(run, "PARTS", {"fails": (10, "y"), "works": (12, "z")})  # five times that in a dry run
    monkeypatch.setattr(run, "run_part", lambda words, seconds, log: limits.append(seconds) or "done")
    for minutes in (3, 1):
        run.main(run.GPUArgs(dry=True, out=fake_parts.out, minutes=minutes, overwrite=True))
    assert limits == pytest.approx([120, 180, 50, 60], abs=5)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_are_a_number_above_0(fake_parts, minutes):
    with pytest.raises(UserError, match="--minutes must be a number above 0, not"):
        run.main(run.GPUArgs(dry=True, out=fake_parts.out, minutes=minutes))


@pytest.mark.parametrize("part", [3, {}, {"result": "done", "key": "x", "date": 3}, {"result": "done", "key": "x"}])
def test_a_damaged_state_is_one_sentence(fake_parts, part):
    fake_parts.out.mkdir()
    (fake_parts.out / run.STATE).write_text(json.dumps({"works": part}))
    with pytest.raises(UserError, match=r"parts\.json is damaged: delete it"):
        run.main(fake_parts)


class Crash:
    """Ends the process that gets it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_training_step_that_crashes_does_not_end_its_part(tmp_path):
    context = Context(DRY, tmp_path)
    with context.guard("a step"):
        steps.measure_apart(context, Crash(), Crash(), Crash())
    assert context.failed == ["a step"]


def test_no_part_starts_without_time(fake_parts, monkeypatch):
    monkeypatch.setattr(run, "run_part", None)
    with pytest.raises(SystemExit):
        run.main(run.GPUArgs(dry=True, out=fake_parts.out, minutes=0.1))
    assert (fake_parts.folder / run.LOG).read_text().count("not started, since the time is over") == 3


def test_a_command_that_is_stopped_ends_its_part(fake_parts, tmp_path, monkeypatch):
    """Ctrl-C does not reach the part by itself, since it has a session of its own."""
    started = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout == 30:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(run.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_part(["hangs", str(tmp_path)], 30, run.Log(tmp_path / "log.txt"))
    assert started[0].poll() == -signal.SIGKILL


def test_a_log_has_the_last_state_of_a_bar_and_no_home_folder(tmp_path, capsys):
    log = run.Log(tmp_path / "log.txt")
    log.copy([b"a 1%\ra 100%\n", f"File {Path.home()}/x\n".encode(), b"\xff\n"])
    assert (tmp_path / "log.txt").read_text() == capsys.readouterr().out == "a 100%\nFile ~/x\n\ufffd\n"


def test_a_part_writes_each_row_at_once_and_ends_with_1_after_a_failure(tmp_path, monkeypatch):
    def measure(context):
        yield row("1.4B", "nano", 1.0, "tokens/s")
        assert len(json.loads((tmp_path / "x.json").read_text())) == 1
        with context.guard("second"):
            raise ValueError("wrong")
        yield row("1.4B", "nano", 2.0, "tokens/s")

    monkeypatch.setitem(part.PARTS, "x", measure)
    with pytest.raises(SystemExit) as stop:
        part.main("x", tmp_path, dry=False)
    assert stop.value.code == 1 and [each["value"] for each in json.loads((tmp_path / "x.json").read_text())] == [1, 2]


def test_the_fingerprint_is_of_the_kernels_too(tmp_path, monkeypatch):
    for name in ("nanochameleon/a.py", "kernels/b.cu", "train.py", "sample.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    before = run.sources()
    (tmp_path / "kernels/b.cu").write_text("2")
    assert run.sources() != before


@pytest.mark.parametrize("name", ["attention", "kernels", "generation"])
def test_a_dry_part_measures_all_of_its_figures(name, tmp_path, emulated_gpu):
    context = Context(DRY, tmp_path)
    rows = list(part.PARTS[name](context))
    assert not context.failed
    figures = {"attention": ("attention-",), "generation": ("first-", "last-", "image", "company"),
               "kernels": tuple({key.partition("-")[0] for key in page.kernel_figures(DRY)})}[name]  # fmt: skip
    wanted = {key: each for key, each in page.figures(DRY).items() if key.startswith(figures)}
    found = {(each.case, each.variant, each.unit) for each in rows}
    missing = {key for key, each in wanted.items() if each not in found}
    on_gpus_alone = {f"attention-{way}-{p}" for way in ("flash", "efficient") for p in ("f", "fb")}
    assert missing == (on_gpus_alone if name == "attention" else set())


def test_a_case_that_fails_or_does_not_fit_leaves_the_others(tmp_path, capsys):
    context = Context(DRY, tmp_path)
    for error in (torch.OutOfMemoryError("x"), AssertionError("wrong")):
        with context.guard(type(error).__name__):
            raise error
    assert context.failed == ["AssertionError"]
    assert "does not fit into the memory" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The toy, and machines without a GPU


@pytest.mark.parametrize("plan", [DRY, ON_GPU])
def test_the_toys_options_are_those_of_train_py(plan, tmp_path):
    for precision, compiled in (("bf16", "auto"), ("fp32", "off")):
        _, *words = toy.options(Context(plan, tmp_path), precision)
        cfg = parse_run([str(word) for word in words])
        assert cfg.train.precision == precision and cfg.parallel.compile == compiled
        assert cfg.device == plan.device and cfg.train.save_every < cfg.train.steps


def test_a_training_is_stopped_once_it_has_a_checkpoint(tmp_path):
    # A shell's background jobs ignore SIGINT, and pass that on. train.py does not care: it sets its own handler.
    heed = "import pathlib, signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    script = tmp_path / "train.py"
    script.write_text(heed + "pathlib.Path(sys.argv[1], 'step-000004').mkdir(); time.sleep(60)")
    assert toy.stop_after_a_checkpoint([script, tmp_path], tmp_path, 120.0) == -signal.SIGINT


@pytest.mark.parametrize(
    ("driver", "cuda", "sentence"),
    [
        (None, "13.0", "there is no NVIDIA GPU here"),
        ("535.104", None, "built for CPUs alone"),
        ("535.104", "13.0", "535.104 is too old .* 580 or newer, or export PIP_EXTRA_INDEX_URL"),
        ("580.65", "13.0", "torch finds no GPU"),
    ],
)
def test_one_sentence_for_a_machine_without_a_gpu(driver, cuda, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine, "driver", lambda: driver)
    with pytest.raises(UserError, match=sentence):
        machine.check_gpu()
