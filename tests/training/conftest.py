"""A whole run of train.py at a size of seconds, which several tests read or continue."""

import shutil
import sys
from pathlib import Path

import pytest
from tiny import training_config

from nanochameleon.training import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))  # for train.py

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
