"""models/make_toy.py trains what is missing, by commands that train.py takes."""

import sys
from pathlib import Path

import pytest

from nanochameleon.cli import parse_run

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import make_toy


class Trained(Exception):
    """Raised where training is over."""


def commands(monkeypatch, args: make_toy.Args) -> list[list[str]]:
    """The commands that it would run."""
    seen = []

    def convert(_):
        raise Trained

    monkeypatch.setattr(make_toy.subprocess, "run", lambda command, check: seen.append(command))
    monkeypatch.setattr(make_toy, "convert", convert)
    with pytest.raises(Trained):
        make_toy.make(args)
    return seen


def test_runs_that_are_missing_are_trained_one_from_the_other(tmp_path, monkeypatch):
    args = make_toy.Args(tmp_path / "first run", tmp_path / "align", tmp_path / "model")
    toy, align = commands(monkeypatch, args)
    assert toy[:2] == align[:2] == [sys.executable, "train.py"]
    first, second = parse_run(toy[2:]), parse_run(align[2:])
    assert (first.name, first.train.steps, first.out) == ("toy", 6_000, args.toy)
    assert (second.name, second.train.steps, second.out, second.init_from) == ("align", 3_000, args.align, args.toy)


def test_runs_with_a_report_are_taken(tmp_path, monkeypatch):
    args = make_toy.Args(tmp_path / "toy", tmp_path / "align", tmp_path / "model")
    args.toy.mkdir()
    (args.toy / "report.json").write_text("{}")
    (only,) = commands(monkeypatch, args)
    assert only[2] == "align"
