"""train.py from raw data to the report, at a size of seconds: what it leaves, stops and goes on with, and refuses."""

import errno
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import SHAPES_VQGAN, nano_folder, released_model, training_config

from nanochameleon.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from nanochameleon.convert import Args, convert
from nanochameleon.data import build as prepare
from nanochameleon.data.build import open_loader
from nanochameleon.data.sources.alignment import CATEGORIES
from nanochameleon.data.sources.shapes import World, draw, draw_scene
from nanochameleon.errors import OwnError, UserError, exit_on_user_error
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.presets import mixed
from nanochameleon.training import checkpoint, run, train_tokenizers
from nanochameleon.training.image_targets import corrupt_image_tokens, mask_targets
from nanochameleon.training.monitor import read_metrics
from nanochameleon.training.objective import Objective
from nanochameleon.training.run import (
    CONFIG,
    TEXT_TOKENIZER,
    command,
    config_to_json,
    open_image_tokenizer,
    read_config,
    start_folder,
)
from nanochameleon.training.signals import GracefulShutdown
from nanochameleon.weights.model_folder import open_model_files
from nanochameleon.weights.tokenizer_json import load_text_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A whole run that nothing disturbed. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(training_config(folder)) == folder
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The whole run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def before_transformer(copy) -> Path:
    """The run with tokenizers and data, as it is before the transformer's first step."""
    for folder in checkpoint.checkpoints(copy):
        shutil.rmtree(folder)
    for name in ("metrics.jsonl", "report.json", "report.html", "samples.png", "curves.png"):
        (copy / name).unlink()
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(folder)]


def assert_same_weights(folder: Path, other: Path) -> None:
    """Bitwise, of everything that the newest checkpoints hold."""
    (tensors, state), (expected, expected_state) = checkpoint.load(folder), checkpoint.load(other)
    assert state == expected_state and set(tensors) == set(expected)
    for group, content in expected.items():
        assert set(tensors[group]) == set(content)
        assert [name for name in content if not torch.equal(tensors[group][name], content[name])] == []


def train_until_stopped(cfg: RunConfig, code: int = 130) -> None:
    with pytest.raises(SystemExit) as stop:
        exit_on_user_error(lambda: train.main(cfg))
    assert stop.value.code == code


def interrupt_in_call(patch: pytest.MonkeyPatch, owner, name: str, number: int) -> None:
    """This process gets SIGINT, as by Ctrl-C, in call `number` of the function owner.name."""
    real, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    patch.setattr(owner, name, wrapped)


# --- what a run leaves ---------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(finished):
    assert steps_of(finished) == [12, 10] and steps_of(finished / "image_tokenizer") == [6]
    assert [path.name for path in (finished / "samples").iterdir()] == ["step-000008.png"]
    assert [line["step"] for line in read_metrics(finished / "metrics.jsonl")] == [0, 5, 10, 11]
    for name in ("samples.png", "curves.png", "samples/step-000008.png"):
        with Image.open(finished / name) as image:
            assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 3
    page = (finished / "report.html").read_text()
    assert page.count("<img") >= 2 + 4 and f"sample.py {finished}" in page
    assert read_config(finished) == training_config(finished)


def test_the_first_loss_is_that_of_a_guess_among_all_ids(finished):
    first, guess = read_metrics(finished / "metrics.jsonl")[0], math.log(read_config(finished).model.vocab_size)
    assert [first[name] for name in ("loss_text", "loss_image", "log_z")] == pytest.approx([guess] * 3, rel=1e-5)
    assert first["z_loss"] == pytest.approx(1e-5 * guess**2, rel=1e-4)
    assert first["loss"] == pytest.approx(guess + first["z_loss"], rel=1e-5)


SHARE, AMOUNT = "a share", "an amount"
STAGES = ("text_tokenizer", "image_tokenizer", "data", "transformer", "report")
FACTS = ("background", "count", "shapes", "colours", "sizes")  # and the relation, where a pair was drawn
REPORT = {
    "precision": "fp32",
    "seconds": {"total": AMOUNT} | dict.fromkeys(STAGES, AMOUNT),
    "peak_memory_gib": AMOUNT,
    "tokenizer": dict.fromkeys(("oracle_on_clean", "oracle_on_reconstructions", "codebook_used"), SHARE),
    "text_to_image": {
        "seen": {"all_facts": SHARE, "by_fact": dict.fromkeys(FACTS, SHARE)},
        "held_out": {"all_facts": SHARE},
    },
    "captions": {"facts": SHARE},
    "questions": {"accuracy": SHARE, "question_only": SHARE},
    "bits_per_code": AMOUNT,
    "bits_per_byte": AMOUNT,
    "tokens_per_second": AMOUNT,
}


def assert_shape(report: dict, shape: dict) -> None:
    assert set(shape) <= set(report)
    for name, kind in shape.items():
        if isinstance(kind, dict):
            assert_shape(report[name], kind)
        elif kind == "fp32":
            assert report[name] == kind
        else:
            assert isinstance(report[name], float) and math.isfinite(report[name]), name
            assert 0 <= report[name] <= 1 if kind == SHARE else report[name] > 0, name


def test_the_report_has_its_shape(finished):
    report = json.loads((finished / "report.json").read_text())
    assert_shape(report, REPORT)
    assert report["tokenizer"]["oracle_on_clean"] == 1
    seconds = report["seconds"]
    assert seconds["total"] == pytest.approx(sum(value for stage, value in seconds.items() if stage != "total"))


# --- stopping and going on -----------------------------------------------------------------------------------------


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
        again = command("train.py", "toy", "--out", "a b")  # --overwrite would start anew
        assert f"goes on: {again}\n" in capsys.readouterr().out
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


def test_a_stop_while_documents_are_tokenized_is_heard_and_leaves_no_half_of_them(before_transformer, monkeypatch):
    shutil.rmtree(before_transformer / "data")
    before = set(contents(before_transformer))
    monkeypatch.setattr(prepare, "CHUNK", 8)
    interrupt_in_call(monkeypatch, prepare, "fuse", 2)
    train_until_stopped(training_config(before_transformer))
    assert set(contents(before_transformer)) == before


def test_a_stop_in_the_last_step_is_heard_before_the_report(before_transformer, monkeypatch):
    monkeypatch.setattr(train, "make_report", None)
    interrupt_in_call(monkeypatch, train, "forward_backward", 12)
    train_until_stopped(training_config(before_transformer))
    assert steps_of(before_transformer) == [12, 10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_report_ends_it_at_once_and_says_how_to_go_on(number, copy, monkeypatch, capsys):
    def interrupted(*_):
        signal.raise_signal(number)
        raise AssertionError("the report goes on")

    monkeypatch.setattr(train, "make_report", interrupted)
    train_until_stopped(training_config(copy), 128 + number)
    assert "this goes on: " in capsys.readouterr().out


@pytest.mark.parametrize("stage", [".", "image_tokenizer"])
def test_where_all_checkpoints_are_damaged_nothing_starts_anew_by_itself(stage, copy):
    for folder in checkpoint.checkpoints(copy / stage):
        (folder / "state.json").write_text("cut")
    before = contents(copy)
    with pytest.raises(UserError, match=r"no whole checkpoint.*--overwrite"):
        train.main(training_config(copy))
    written = dict.fromkeys(("config.json", "seconds.json"), b"")  # before any stage
    assert contents(copy) | written == before | written


def test_a_full_disk_is_one_sentence(copy, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard-00000.bin")

    monkeypatch.setattr(train, "write_tokens", full)
    with pytest.raises(UserError, match=r"No space left on device: 'shard-00000\.bin'"):
        train.main(training_config(copy))


def test_missing_packages_are_one_sentence():
    script = Path(train.__file__)
    run = subprocess.run([sys.executable, "-S", script, "toy"], capture_output=True, text=True)  # -S: none is found
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1 and "make demo" in run.stderr


def test_the_precision_is_decided_once_before_any_stage_and_told(tmp_path, monkeypatch, capsys):
    """Also where a kill came before the first checkpoint, and another machine would decide otherwise; but where it came
    before anything was made, as on a machine without the GPU, the next start decides."""
    cfg = training_config(tmp_path / "run")
    cfg = replace(cfg, train=replace(cfg.train, precision="auto"))
    choices = iter([("fp32", "no GPU"), ("bf16", "a GPU"), ("fp32", "no GPU")])
    monkeypatch.setattr(run, "pick_precision", lambda *_: next(choices))
    starts = [("store_images", cfg, "fp32", "no GPU"), ("train_image_tokenizer", cfg, "bf16", "a GPU"),
              ("store_images", cfg, "bf16", "as in this run so far"),
              ("store_images", replace(cfg, overwrite=True), "fp32", "no GPU")]  # fmt: skip
    for killed_in, start, precision, why in starts:
        with monkeypatch.context() as patch, pytest.raises(KilledHere):
            patch.setattr(train, killed_in, killed)
            train.main(start)
        assert read_config(cfg.folder).train.precision == precision
        assert f"matrix products in {precision}: {why}\n" in capsys.readouterr().out


def test_the_precision_is_that_of_the_checkpoints_of_an_older_version(finished, tmp_path, monkeypatch):
    cfg = training_config(tmp_path / "older", train=replace(training_config(tmp_path).train, precision="auto"))
    tensors, state = checkpoint.load(finished)
    checkpoint.save(cfg.folder, 10, tensors, state | {"step": 10, "precision": "bf16"})
    (cfg.folder / CONFIG).write_text(config_to_json(cfg))
    assert run.decide_precision(cfg, torch.device("cpu")).train.precision == "bf16"
    assert train.Progress.read(checkpoint.read_state(cfg.folder / "step-000010"), cfg.folder).step == 10
    checkpoint.save(cfg.folder, 11, tensors, state | {"step": 11, "precision": "odd"})
    monkeypatch.setattr(run, "pick_precision", lambda *_: ("fp32", "no GPU"))
    assert run.decide_precision(cfg, torch.device("cpu")).train.precision == "fp32"


def test_a_state_of_something_else_is_a_sentence(tmp_path):
    for state in ({}, {"lost": 1}, {"step": "ten"}, {"step": -1}, {"loss": []}):
        with pytest.raises(UserError, match=f"{tmp_path} is of another stage or version"):
            train.Progress.read(state, tmp_path)


class KilledHere(BaseException):
    """In place of a kill: nothing catches it."""


def killed(*_):
    raise KilledHere


@pytest.fixture
def heard_ctrl_c():
    """Ctrl-C as in a terminal: a shell starts what runs in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stop_is_heard_where_nothing_can_be_said_of_it(heard_ctrl_c, monkeypatch):
    def fail(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", fail)
    with GracefulShutdown() as stopped:
        signal.raise_signal(signal.SIGTERM)
        assert stopped()


def test_the_second_ctrl_c_stops_at_once_and_handlers_are_put_back(heard_ctrl_c):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with GracefulShutdown() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGTERM)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with GracefulShutdown():
        pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --- losses that are not finite --------------------------------------------------------------------------------------

BROKEN = {
    "nan": lambda parts: parts._replace(cross_entropy=parts.cross_entropy * math.nan),
    "infinite, with a finite gradient": lambda parts: parts._replace(cross_entropy=parts.cross_entropy + math.inf),
}


def break_losses(monkeypatch, kind: str, broken: Callable[[int], bool]) -> list[torch.Tensor]:
    """Breaks the loss of those forward passes, counted from 1; -> a list that gets the weights at each of them."""
    real, weights = Objective.forward, []

    def forward(self, batch, keys, *expected):
        if not torch.is_grad_enabled():  # a look at the attention logits
            return real(self, batch, keys, *expected)
        weights.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]))
        sums = real(self, batch, keys, *expected)
        return sums._replace(parts=BROKEN[kind](sums.parts)) if broken(len(weights)) else sums

    monkeypatch.setattr(Objective, "forward", forward)
    monkeypatch.setattr(train, "make_report", lambda *_: None)
    return weights


@pytest.mark.parametrize("kind", BROKEN)
def test_a_loss_that_is_not_finite_moves_nothing_and_its_batch_is_set_aside(kind, before_transformer, monkeypatch):
    broken = range(2, 11)  # nine in a row
    weights = break_losses(monkeypatch, kind, lambda call: call in broken)
    cfg = training_config(before_transformer)
    train.main(cfg)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [call not in broken for call in range(1, 12)]
    assert read_metrics(before_transformer / "metrics.jsonl")[1]["loss"] is None
    kept = sorted((before_transformer / "bad").iterdir())
    assert [path.name for path in kept] == [f"step-{call - 1:06d}-rank-0.safetensors" for call in broken]
    image_tokenizer = open_image_tokenizer(before_transformer, cfg, torch.device("cpu"))
    text = load_text_tokenizer(before_transformer / TEXT_TOKENIZER)
    loader = open_loader(cfg, image_tokenizer, text, before_transformer)
    learnt = corrupt_image_tokens(
        mask_targets(loader.batch(1), cfg, text.vocab), 16, text.vocab, cfg.train.image_token_noise, cfg.seed, [2, 3]
    )
    assert {name: x.tolist() for name, x in load_file(kept[0]).items()} == {
        k: x.tolist() for k, x in vars(learnt).items()
    }


def test_many_such_steps_in_a_row_roll_the_run_back_and_later_batches_follow(before_transformer, monkeypatch, capsys):
    """A checkpoint after 5 steps; of the calls that follow the second to the fourth fail, three in a row."""
    monkeypatch.setattr(train, "MAX_NONFINITE_STEPS", 3)
    weights = break_losses(monkeypatch, "nan", lambda call: 7 <= call <= 9)
    cfg = training_config(before_transformer)
    train.main(replace(cfg, train=replace(cfg.train, log_every=1)))
    assert f"back to {before_transformer / 'step-000005'}" in capsys.readouterr().err
    assert len(weights) == 9 + 7 and torch.equal(weights[9], weights[5]) and not torch.equal(weights[9], weights[8])
    state = checkpoint.load(before_transformer)[1]
    assert state["step"] == 12 and state["passed"] == 9 - 5 and state["left_out"] == 3
    assert [line["step"] for line in read_metrics(before_transformer / "metrics.jsonl")] == list(range(12))


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_rolling_back_does_not_help_gives_up_with_a_sentence(saved, before_transformer, monkeypatch):
    monkeypatch.setattr(train, "MAX_NONFINITE_STEPS", 3)
    cfg = training_config(before_transformer)
    weights = break_losses(monkeypatch, "nan", lambda call: call > 6)
    with pytest.raises(UserError, match=r"3 steps in a row had no finite loss.*--optim\.lr 0\.003"):
        train.main(replace(cfg, train=replace(cfg.train, save_every=5 if saved else 100)))
    assert len(weights) == (6 + 3 * (1 + train.MAX_ROLLBACKS) if saved else 9)


def test_failures_long_after_a_checkpoint_end_a_run_as_well(before_transformer, monkeypatch):
    """Each time three good steps follow the checkpoint of step 5, and none that is saved."""
    monkeypatch.setattr(train, "MAX_NONFINITE_STEPS", 3)
    weights = break_losses(monkeypatch, "nan", lambda call: call > 5 and (call - 6) % 6 >= 3)
    cfg = training_config(before_transformer)
    with pytest.raises(UserError, match=r"3 steps in a row had no finite loss"):
        train.main(replace(cfg, train=replace(cfg.train, save_every=5)))
    assert len(weights) == 5 + 6 * (1 + train.MAX_ROLLBACKS)
    assert checkpoint.load(before_transformer)[1]["step"] == 5


def test_a_save_that_falls_into_a_streak_of_failures_is_made_up_for_behind_it(before_transformer, monkeypatch):
    break_losses(monkeypatch, "nan", lambda call: call in (5, 6))
    cfg = training_config(before_transformer)
    train.main(replace(cfg, train=replace(cfg.train, save_every=5, keep_checkpoints=9)))
    steps = sorted(int(path.name[5:]) for path in checkpoint.checkpoints(before_transformer))
    assert steps == [7, 10, 12]


def test_roll_backs_long_ago_do_not_count(before_transformer, monkeypatch):
    """Of each six batches three in a row fail; a second roll-back to the same checkpoint would end the run."""
    for name, value in {"MAX_NONFINITE_STEPS": 3, "MAX_ROLLBACKS": 1}.items():
        monkeypatch.setattr(train, name, value)
    weights = break_losses(monkeypatch, "nan", lambda call: call > 4 and call % 6 < 3)
    cfg = training_config(before_transformer)
    train.main(replace(cfg, train=replace(cfg.train, save_every=1)))
    state = checkpoint.load(before_transformer)[1]
    assert state["step"] == 12 and state["left_out"] == 3 + 3 + 1 and len(weights) == 12 + 6


@pytest.mark.parametrize("micro_batch, fewer", [(None, "--parallel.micro-batch 1 or "), (1, "")])
def test_a_gpu_whose_memory_is_full_is_a_sentence_that_says_what_to_lower(
    micro_batch, fewer, before_transformer, monkeypatch
):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "forward_backward", full)
    cfg = training_config(before_transformer)
    cfg = replace(cfg, parallel=replace(cfg.parallel, micro_batch=micro_batch))
    rows = rf"the memory of cpu \(rank 0\) does not hold {micro_batch or 2} rows of {cfg.train.seq_len} ids at a time"
    with pytest.raises(
        OwnError,
        match=f"{rows}: go on with {fewer}--parallel.activation-checkpointing or --parallel.data-parallel fsdp",
    ):
        train.main(cfg)


def test_a_model_too_large_for_one_device_ends_without_a_report(before_transformer, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "make_report", full)
    train.main(training_config(before_transformer))
    assert "without samples and a report, since cpu does not hold the whole model" in capsys.readouterr().out


# --- folders ---------------------------------------------------------------------------------------------------------


def test_another_configuration_in_the_same_folder_is_refused_by_the_fields_name(copy):
    cfg, before = training_config(copy), contents(copy)
    others = {
        "train.steps was 12 and is 13": replace(cfg, train=replace(cfg.train, steps=13)),
        "vqgan.n_codes was 16 and is 17": replace(cfg, vqgan=replace(cfg.vqgan, n_codes=17)),
        "seed was 0 and is 1": replace(cfg, seed=1),
        "tokenizers.optim.lr was 0.003 and is 0.1": replace(
            cfg, tokenizers=replace(cfg.tokenizers, optim=replace(cfg.optim, lr=0.1))
        ),
    }
    for sentence, other in others.items():
        with pytest.raises(UserError, match=f"holds another run .*{sentence}"):
            train.main(other)
    assert contents(copy) == before


def test_what_does_not_touch_the_training_may_change(copy):
    cfg = training_config(copy)
    start_folder(
        replace(
            cfg,
            evaluation=EvalConfig(1, 1, 1),
            device="auto",
            train=replace(cfg.train, log_every=1, keep_checkpoints=1),
        )
    )
    assert read_config(copy).evaluation == EvalConfig(1, 1, 1)


def test_overwrite_starts_anew_and_nothing_of_the_old_run_is_left(copy):
    cfg = training_config(copy, seed=5, overwrite=True)
    assert start_folder(cfg) == copy
    assert set(contents(copy)) == {CONFIG} and read_config(copy).seed == 5


def test_a_restart_by_torchrun_does_not_overwrite_what_it_began(copy, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(train, "store_images", killed)
    before = contents(copy)
    with pytest.raises(KilledHere):
        train.main(training_config(copy, overwrite=True))
    assert contents(copy) | {CONFIG: b""} == before | {CONFIG: b""}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_a_folder_with_other_files_is_refused_and_untouched(name, overwrite, tmp_path):
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    (tmp_path / "mine" / name).write_text('{"model_type": "llama"}')
    (tmp_path / "mine" / "sub" / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="mine"):
        train.main(training_config(tmp_path / "mine", overwrite=overwrite))
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="file"):
            train.main(training_config(out))


# --- a folder of images --------------------------------------------------------------------------------------------


def folder_config(out: Path, path: Path | None) -> RunConfig:
    vqgan = replace(SHAPES_VQGAN, resolution=16, ch_mult=(1, 1, 1))
    return training_config(out, vqgan=vqgan, data=DataConfig("folder", path), stages=mixed(pairs=1.0))


def test_a_folder_of_images_goes_all_the_way_and_bad_ones_are_counted(tmp_path, monkeypatch, capsys):
    mine, cfg = tmp_path / "mine", folder_config(tmp_path / "run", tmp_path / "mine")
    with pytest.raises(UserError, match="mine is not a folder"):
        train.main(cfg)
    assert set(contents(tmp_path / "run")) == {CONFIG}
    mine.mkdir()
    lines = ["this is no JSON", '{"file_name": "nowhere.png", "text": "lost"}']
    for i in range(15):
        draw_to = mine / f"{i}.png"
        scene = draw_scene(World(), 0, i)
        Image.fromarray(draw(scene, World())).save(draw_to)
        lines.append(json.dumps({"file_name": draw_to.name, "text": scene.caption()}))
    (mine / "12.png").write_bytes((mine / "12.png").read_bytes()[:60])
    (mine / "13.png").write_bytes(b"")
    (mine / "14.png").write_text("words")
    (mine / "captions.jsonl").write_text("\n".join(lines))
    train.main(cfg)
    assert "12 images with 12 captions; 5 skipped: 3 unreadable images" in capsys.readouterr().out
    skipped = [json.loads(line) for line in (tmp_path / "run" / "pictures" / "skipped.jsonl").read_text().splitlines()]
    assert [item["where"] for item in skipped] == ["captions.jsonl:1", "captions.jsonl:2", "12.png", "13.png", "14.png"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["bits_per_code"] > 0 and 0 <= report["tokenizer"]["mean_absolute_error"] <= 1
    assert (tmp_path / "run" / "samples.png").exists() and (tmp_path / "run" / "report.html").exists()


def test_a_run_that_failed_before_it_began_may_begin_with_another_path(tmp_path):
    """A wrong path must not make the right one 'another run'."""
    for path in (None, tmp_path / "typo", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=str(path) if path else r"--data\.path"):
            train.main(folder_config(tmp_path / "run", path))
        assert set(contents(tmp_path / "run")) == {CONFIG}


def test_a_source_that_the_data_has_not_is_refused_before_anything_is_read(tmp_path):
    cfg = folder_config(tmp_path / "run", tmp_path)
    with pytest.raises(UserError, match=r"stages\.0\.weights names 'questions'; folder has pairs, interleaved"):
        train.main(replace(cfg, stages=mixed(pairs=0.8, questions=0.2)))


def test_emoji_without_their_packages_are_refused_in_a_sentence(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package emoji: pip install .*\[data\]"):
        train.main(training_config(tmp_path / "run", data=DataConfig("emoji")))
    assert set(contents(tmp_path / "run")) == {CONFIG}


# ---------------------------------------------------------------------------------------------------------------------
# Going on from another model


def test_a_run_begins_with_the_sizes_tokenizers_and_weights_of_another(finished, tmp_path):
    """From a run and from our layout; the context and all sizes are the other's, dropout and steps the new run's."""
    nano = convert(Args(finished, tmp_path / "nano", "nano"))
    cfg = training_config(tmp_path / "more", train=replace(training_config(tmp_path).train, steps=1, save_every=1))
    before = {name: checkpoint.load(finished / name)[0] for name in (".", "image_tokenizer")}
    runs = []
    for source in (finished, nano):
        other = replace(cfg, init_from=source, out=tmp_path / source.name / "more", model=ModelConfig(dropout=0.0))
        train.main(replace(other, optim=replace(cfg.optim, lr=1e-30, weight_decay=0.0)))
        runs.append(other.out)
    for place in runs:
        read = read_config(place)
        assert read.model == replace(read_config(finished).model, dropout=0.0) and read.vqgan == cfg.vqgan
        assert (place / "text_tokenizer.json").read_bytes() == (finished / "text_tokenizer.json").read_bytes()
        kept = checkpoint.load(place / "image_tokenizer")[0]["model"]
        assert all(torch.equal(x, kept[name]) for name, x in before["image_tokenizer"]["model"].items())
        weights = checkpoint.load(place)[0]["weights"]
        for name, x in before["."]["weights"].items():
            torch.testing.assert_close(weights[name], x, rtol=0, atol=1e-6)  # one step of nearly no length
        assert (place / "report.json").is_file()


def other_model(place: Path, layout: str) -> Path:
    """A model with the release's forms, of images as large as the shapes world's, in a layout; its tokenizer's file
    has a name that we have no use for."""
    vqgan = replace(SHAPES_VQGAN, ch=32, n_groups=32, n_codes=8, mid_attention=True)
    nano = nano_folder(place / "nano", released_model(max_seq_len=256), VQGAN(vqgan))
    content = json.loads((nano / "text_tokenizer.json").read_text())
    last = content["model"]["merges"].pop()
    token = content["model"]["vocab"].pop("".join(last))
    content["added_tokens"].append(content["added_tokens"][0] | {"id": token, "content": "<sentinel:0>"})
    (nano / "text_tokenizer.json").write_text(json.dumps(content))
    source = convert(Args(nano, place / layout, layout.split("-")[0]))
    if layout == "hf-encoder":
        (source / "vqgan_decoder.safetensors").unlink()
    return source


@pytest.mark.parametrize("layout", ["hf", "hf-encoder", "meta"])
def test_a_run_begins_with_a_model_in_another_layout_and_goes_on_without_it(layout, tmp_path, capsys):
    source, run = other_model(tmp_path, layout), tmp_path / "run"
    parts, few = open_model_files(source), training_config(tmp_path).train
    train_cfg = replace(few, steps=2, save_every=1, seq_len=256)
    cfg = training_config(run, init_from=source, train=train_cfg, stages=mixed(pairs=1.0))
    cfg = replace(cfg, evaluation=EvalConfig(1, 1, 1), model=ModelConfig(dropout=0.0))
    cfg = replace(cfg, optim=replace(cfg.optim, lr=1e-30, weight_decay=0.0))
    train.main(cfg)
    assert json.loads((run / "text_tokenizer.json").read_text()) == parts.tokenizer_json
    weights, image_tokenizer = checkpoint.load(run)[0]["weights"], checkpoint.load(run / "image_tokenizer")[0]["model"]
    for name in parts.weights.meta:
        torch.testing.assert_close(weights[name], parts.weights.get(name), rtol=0, atol=1e-6)
    assert image_tokenizer.keys() == parts.vq.meta.keys() and all(
        torch.equal(x, parts.vq.get(k)) for k, x in image_tokenizer.items()
    )
    assert ("without samples" in capsys.readouterr().out) == (layout == "hf-encoder")
    shutil.rmtree(source)
    shutil.rmtree(run / "step-000002")  # as if it had been stopped
    train.main(cfg)
    assert checkpoint.newest(run).name == "step-000002"
    train.main(replace(cfg, init_from=tmp_path / "moved"))
    with pytest.raises(UserError, match="does not exist"):
        train.main(replace(cfg, overwrite=True))
    assert (run / "step-000002").is_dir()


def test_a_run_does_not_overwrite_what_it_is_to_begin_with(finished, tmp_path):
    run = tmp_path / "run"
    inside = convert(Args(finished, run / "nano", "nano"))
    (run / CONFIG).write_text((finished / CONFIG).read_text())
    with pytest.raises(UserError, match=r"lies in .* choose another --out"):
        train.main(training_config(run, init_from=inside, overwrite=True))
    open_model_files(inside)


def test_rows_longer_than_the_other_models_context_are_refused(finished, tmp_path):
    cfg = training_config(tmp_path / "more", init_from=finished)
    with pytest.raises(UserError, match="context of 192"):
        train.main(replace(cfg, train=replace(cfg.train, seq_len=193)))
    with pytest.raises(UserError, match="does not exist"):
        train.main(replace(cfg, init_from=tmp_path / "nowhere"))
    assert not (tmp_path / "more").exists()
    with pytest.raises(UserError, match="choose another --out"):
        train.main(replace(cfg, init_from=finished, out=finished, overwrite=True))


def test_a_run_of_the_shapes_is_aligned_and_each_category_measured(finished, tmp_path):
    few = replace(training_config(tmp_path).train, steps=4, save_every=4, assistant_only_loss=True)
    stages = mixed(**dict.fromkeys(CATEGORIES, 1.0))
    cfg = training_config(tmp_path / "aligned", init_from=finished, train=few, stages=stages)
    train.main(replace(cfg, evaluation=replace(cfg.evaluation, alignment=2)))
    report = json.loads((tmp_path / "aligned" / "report.json").read_text())
    assert_shape(report, REPORT | {"alignment": dict.fromkeys(CATEGORIES, SHARE)})
    assert {path.name for path in (tmp_path / "aligned" / "data").iterdir()} == set(CATEGORIES)
    assert "alignment" not in json.loads((finished / "report.json").read_text())
