"""What several tests of train.py share: folders as bytes, stops at a chosen call, the shape of a report."""

import itertools
import math
import os
import signal
from pathlib import Path

import pytest
import torch

import train
from nanochameleon.config import RunConfig
from nanochameleon.errors import exit_on_user_error
from nanochameleon.training import checkpoint


class KilledHere(BaseException):
    """In place of a kill: nothing catches it."""


def killed(*_):
    raise KilledHere


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
