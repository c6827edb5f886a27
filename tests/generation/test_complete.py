"""The library in one call: images and text as sample.py makes them, and mistakes as one sentence."""

from dataclasses import replace

import pytest
from tiny import tiny_run

from nanochameleon.errors import UserError
from nanochameleon.generation.complete import complete
from nanochameleon.training.run import Run
from nanochameleon.weights.model_folder import open_model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return open_model(tiny_run(tmp_path_factory.mktemp("runs") / "tiny"), "cpu")


def test_an_image_is_drawn_whatever_the_runs_limit_of_tokens(run):
    short = replace(run, cfg=replace(run.cfg, sample=replace(run.cfg.sample, max_new_tokens=2)))
    (image,), (again,) = complete(run, "a red star"), complete(short, "a red star")
    assert image.size == (run.cfg.vqgan.resolution,) * 2 and image.tobytes() == again.tobytes()


def test_text_is_one_string_and_ends_at_the_limit(run):
    short = replace(run, cfg=replace(run.cfg, sample=replace(run.cfg.sample, max_new_tokens=5)))
    assert all(isinstance(part, str) for part in complete(short, "a red star", mode="text"))


def test_an_unknown_mode_is_named(run):
    with pytest.raises(UserError, match="mode is one of draw, answer, chat, text, free, not 'paint'"):
        complete(run, "a red star", mode="paint")
