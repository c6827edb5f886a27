"""The library in one call: images and text as sample.py makes them, and mistakes as one sentence."""

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import tiny_run

from nanochameleon.errors import UserError
from nanochameleon.generation.complete import complete
from nanochameleon.training.run import Run
from nanochameleon.weights.model_folder import open_model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = open_model(tiny_run(tmp_path_factory.mktemp("runs") / "tiny"), "cpu")
    with torch.no_grad():  # so that tokens differ
        run.model.output.weight.copy_(torch.randn(run.model.output.weight.shape, generator=torch.Generator()) / 4)
    return run


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


def test_words_become_an_image_and_an_image_and_a_question_become_words(run, tmp_path):
    (image,) = complete(run, "a red ta")
    side = run.cfg.vqgan.resolution
    assert isinstance(image, PIL.Image.Image) and image.size == (side, side)
    image.save(tmp_path / "image.png")
    answer = complete(run, str(tmp_path / "image.png"), "what is it?")
    assert all(isinstance(part, str) for part in answer) and len(answer) <= 1  # neighbouring texts are one


def test_the_seed_decides_and_a_short_limit_on_text_does_not_cut_an_image(run):
    short = replace(run, cfg=replace(run.cfg, sample=replace(run.cfg.sample, max_new_tokens=2, image_temperature=1.0)))
    first, again, other = (np.asarray(complete(short, "a", seed=seed)[0]) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_text_and_images_come_in_their_order(run):
    sample = replace(run.cfg.sample, temperature=1.0, image_temperature=1.0, max_new_tokens=60)
    kinds = {type(part) for seed in range(8) for part in complete(replace(run, cfg=replace(run.cfg, sample=sample)),
                                                                   "a", mode="free", seed=seed)}  # fmt: skip
    assert kinds <= {str, PIL.Image.Image} and str in kinds


def test_an_image_that_cannot_be_read_is_named(run):
    with pytest.raises(UserError, match="missing"):
        complete(run, "missing.png")
