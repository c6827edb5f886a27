"""A run that is stopped anywhere resumes with the same command and ends with the same bits."""

import errno
import io
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace

import pytest
from tiny import training_config
from train_helpers import (
    KilledHere,
    assert_same_weights,
    contents,
    interrupt_in_call,
    killed,
    steps_of,
    train_until_stopped,
)

import train
from nanochameleon.data import build as prepare
from nanochameleon.errors import UserError, exit_on_user_error
from nanochameleon.training import checkpoint, run_folder, train_tokenizers
from nanochameleon.training.monitor import read_metrics
from nanochameleon.training.recovery import Progress
from nanochameleon.training.run import command, read_config


def test_a_run_stopped_in_four_places_ends_with_the_same_bits(finished, tmp_path, monkeypatch, capsys):
    """Invariant 21 on the whole script: in the image tokenizer before and after its codebook is put, in the
    transformer before and after its first regular checkpoint."""
    cfg = training_config(tmp_path / "stopped")
    monkeypatch.setattr(train, "make_report", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "toy", "--out", "a b", "--overwrite"])
    places = [
        (train_tokenizers, "tokenizer_loss", 1, "image_tokenizer", [1]),
        (train_tokenizers, "tokenizer_loss", 4, "image_tokenizer", [5]),
        (train, "forward_backward", 2, ".", [2]),
        (train, "forward_backward", 6, ".", [8, 5]),  # where a sheet of samples is due, too
    ]
    for owner, name, number, where, steps in places:
        with monkeypatch.context() as patch:
            interrupt_in_call(patch, owner, name, number)
            train_until_stopped(cfg)
        assert steps_of(cfg.folder / where) == steps
        again = command("train.py", "toy", "--out", "a b")  # --overwrite would start again
        assert f"to resume: {again}\n" in capsys.readouterr().out
    train.main(cfg)
    assert_same_weights(cfg.folder, finished)
    assert_same_weights(cfg.folder / "image_tokenizer", finished / "image_tokenizer")
    assert contents(cfg.folder / "samples") == contents(finished / "samples")
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (cfg.folder, finished))
    for line in (*lines, *expected):
        for name in ("seconds", "tokens_per_second", "mfu", "memory_gib"):
            del line[name]
    assert lines == expected


def test_a_finished_run_started_again_trains_nothing_and_reports_the_same(copy, finished, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    for owner, name in (
        (train, "forward_backward"),
        (train_tokenizers, "tokenizer_loss"),
        (train_tokenizers.TextTokenizer, "train"),
    ):
        monkeypatch.setattr(owner, name, fail)
    (copy / "report.json").unlink()
    train.main(training_config(copy))
    report, expected = (json.loads((folder / "report.json").read_text()) for folder in (copy, finished))
    for name in ("seconds", "peak_memory_gib"):
        del report[name], expected[name]
    assert report == expected
    written = ("report.json", "report.html", "seconds.json", "config.json", "samples.png", "curves.png")
    again, before = ({k: v for k, v in contents(f).items() if k not in written} for f in (copy, finished))
    assert again == before


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_run_goes_to_its_end_when_nothing_can_be_printed(number, before_transformer, finished, monkeypatch):
    """The reader of its output has gone, or the disk of its log is full: the run's folder is not to blame."""

    def fail(self, text):
        raise OSError(number, os.strerror(number))

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, type("Broken", (io.TextIOBase,), {"write": fail})())
    monkeypatch.setattr(train, "make_report", lambda *_: None)
    code = 0
    try:
        exit_on_user_error(lambda: train.main(training_config(before_transformer)))
    except SystemExit as end:
        code = end.code
    assert code == (2 if number == errno.ENOSPC else 0)
    assert_same_weights(before_transformer, finished)


def test_a_stop_while_documents_are_tokenized_leaves_no_half_of_them(before_transformer, monkeypatch):
    shutil.rmtree(before_transformer / "data")
    before = set(contents(before_transformer))
    monkeypatch.setattr(prepare, "CHUNK", 8)
    interrupt_in_call(monkeypatch, prepare, "fuse", 2)
    train_until_stopped(training_config(before_transformer))
    assert set(contents(before_transformer)) == before


def test_a_stop_in_the_last_step_comes_before_the_report(before_transformer, monkeypatch):
    monkeypatch.setattr(train, "make_report", None)
    interrupt_in_call(monkeypatch, train, "forward_backward", 12)
    train_until_stopped(training_config(before_transformer))
    assert steps_of(before_transformer) == [12, 10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_report_ends_it_at_once_and_prints_how_to_resume(number, copy, monkeypatch, capsys):
    def interrupted(*_):
        signal.raise_signal(number)
        raise AssertionError("the report continues")

    monkeypatch.setattr(train, "make_report", interrupted)
    train_until_stopped(training_config(copy), 128 + number)
    assert "to resume: " in capsys.readouterr().out


@pytest.mark.parametrize("stage", [".", "image_tokenizer"])
def test_where_all_checkpoints_are_damaged_nothing_starts_again_by_itself(stage, copy):
    for folder in checkpoint.checkpoints(copy / stage):
        (folder / "state.json").write_text("cut")
    before = contents(copy)
    with pytest.raises(UserError, match=r"no whole checkpoint.*--overwrite"):
        train.main(training_config(copy))
    written = dict.fromkeys(("config.json", "seconds.json"), b"")  # before any stage
    assert contents(copy) | written == before | written


def test_the_precision_is_decided_once_before_any_stage_and_printed(tmp_path, monkeypatch, capsys):
    """Also where a kill came before the first checkpoint, and another machine would decide otherwise; but where it came
    before anything was made, as on a machine without the GPU, the next start decides."""
    cfg = training_config(tmp_path / "run")
    cfg = replace(cfg, train=replace(cfg.train, precision="auto"))
    choices = iter([("fp32", "no GPU"), ("bf16", "a GPU"), ("fp32", "no GPU")])
    monkeypatch.setattr(run_folder, "pick_precision", lambda *_: next(choices))
    starts = [("store_images", cfg, "fp32", "no GPU"), ("train_image_tokenizer", cfg, "bf16", "a GPU"),
              ("store_images", cfg, "bf16", "as in this run so far"),
              ("store_images", replace(cfg, overwrite=True), "fp32", "no GPU")]  # fmt: skip
    for killed_in, start, precision, why in starts:
        with monkeypatch.context() as patch, pytest.raises(KilledHere):
            patch.setattr(train, killed_in, killed)
            train.main(start)
        assert read_config(cfg.folder).train.precision == precision
        assert f"matmuls in {precision}: {why}\n" in capsys.readouterr().out


def test_kernels_that_the_precision_does_not_have_are_refused_before_any_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nanochameleon.kernels.cpu.bf16.matmul.why_unavailable", lambda: None)
    monkeypatch.setattr(run_folder, "pick_precision", lambda *_: ("fp32", "no bf16 here"))
    monkeypatch.setattr(train, "run_all", killed)
    monkeypatch.setenv("NANOCHAMELEON_KERNELS", "bf16")
    cfg = training_config(tmp_path / "run")
    for precision in ("fp32", "auto"):
        train_until_stopped(replace(cfg, train=replace(cfg.train, precision=precision)), code=2)
        assert re.fullmatch(
            r"error: NANOCHAMELEON_KERNELS: the bf16 .* bfloat16, not float32\n", capsys.readouterr().err
        )
        assert not cfg.folder.exists()
    with pytest.raises(KilledHere):
        train.main(replace(cfg, train=replace(cfg.train, precision="bf16")))


def test_a_state_of_something_else_is_a_sentence(tmp_path):
    for state in ({}, {"lost": 1}, {"step": "ten"}, {"step": -1}, {"loss": []}):
        with pytest.raises(UserError, match=f"{tmp_path} is of another stage or version"):
            Progress.read(state, tmp_path)


def test_a_state_under_older_names_is_read(tmp_path):
    older = {"step": 4, "tokens": 9, "passed": 1, "left_out": 2, "loss": None, "failed": 3}
    assert Progress.read(older, tmp_path) == Progress(4, 9, 1, 2, None, 3)
