"""The checks of lesson 10."""

import numpy as np
import torch

from checks import Wrong, close, compare
from nanochameleon.bench.scaling import TOKENS
from nanochameleon.evaluate.agreement import krippendorff_alpha
from nanochameleon.presets import chameleon_7b
from nanochameleon.training.flops import PEAK_FLOPS, flops_per_token


def reduce_scatter(answer):
    """Each rank gets its own shard of the sum, for 1 to 4 ranks."""
    rng = np.random.default_rng(0)
    inputs = [(rng.integers(10, size=(n, n * length)).tolist(),) for n in (1, 2, 3, 4) for length in (1, 2, 3)]

    def spec(parts):
        total = [sum(values) for values in zip(*parts, strict=True)]
        size = len(total) // len(parts)
        return [total[rank * size : (rank + 1) * size] for rank in range(len(parts))]

    compare(answer, spec, inputs)


def days_on_64_gpus(answer):
    """Tokens times FLOPs, over what 64 H100s do in a day at 40%."""
    flops = TOKENS * flops_per_token(chameleon_7b().model, 4_096)
    close(answer, flops / (64 * 0.4 * PEAK_FLOPS["H100"]) / 86_400, 3)


def answers_needed(answer):
    """With no event in n, the interval ends at the p with (1 - p)^n = 0.025."""
    close(answer, np.log(0.025) / np.log(1 - 0.001), 50)


def agreement_without_alpha(answer):
    """Three people, ten answers or more, full agreement on 80% of them, and alpha of 0 or less."""
    answer = answer.tolist() if isinstance(answer, (np.ndarray, torch.Tensor)) else answer
    lists = isinstance(answer, (list, tuple)) and all(hasattr(ratings, "__len__") for ratings in answer)
    if not lists or len(answer) != 3 or len(set(map(len, answer))) != 1 or len(answer[0]) < 10:
        raise Wrong("give three lists of the same length, with ten ratings or more")
    same = np.mean([len(set(votes)) == 1 for votes in zip(*answer, strict=True)])
    if same < 0.8:
        raise Wrong(f"all three agree on {same:.0%} of the answers, which is less than 80%")
    if len({value for ratings in answer for value in ratings}) == 1:
        raise Wrong("all ratings are the same, so chance alone gives full agreement and alpha is undefined")
    alpha = krippendorff_alpha(answer)
    if alpha > 0:
        raise Wrong(f"alpha is {alpha:.2f}, which is more than 0")
