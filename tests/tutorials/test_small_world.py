"""What the lessons share: the loop repeats itself from its seed, and 16 codes hold all of a small world's image."""

import math

import pytest
import torch

from nanochameleon.data.sources.scenes import draw, scenes
from small import WORLD, PatchTokenizer, small_config, start, train


def losses_and_weights(seed: int) -> tuple[list[float], torch.Tensor]:
    losses = []
    run = train(
        {"pairs": 0.5, "interleaved": 0.5}, 3, seed=seed, watch=lambda _, s: losses.append(s.next_token.loss.item())
    )
    return losses, torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_a_seed_repeats_a_training_and_another_does_not():
    (first, weights), (again, same), (other, others) = (losses_and_weights(seed) for seed in (0, 0, 1))
    assert first == again and torch.equal(weights, same)
    assert first != other and not torch.equal(weights, others)


def test_the_first_loss_is_that_of_a_guess_and_then_it_falls():
    losses, _ = losses_and_weights(0)
    run, _ = start(small_config(3), {"pairs": 1.0})
    assert losses[0] == pytest.approx(math.log(run.vocab.size), abs=0.001) and losses[2] < losses[0] - 0.1


def test_a_trained_run_is_in_eval_mode_as_a_run_promises():
    assert not train({"text": 1.0}, 1).model.training


def test_every_image_of_the_world_comes_back_from_its_codes():
    images = torch.stack([torch.from_numpy(draw(scene, WORLD)) for scene in scenes(WORLD, 5, 300)]).numpy()
    tokenizer = PatchTokenizer()
    codes = tokenizer.encode(images)
    assert codes.shape == (300, 16) and int(codes.max()) < len(tokenizer.codebook) == 49
    assert (tokenizer.decode(codes) == images).all()
