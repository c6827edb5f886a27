"""What lesson 5's answers must do: checked against optim.py and the scenes of the world."""

import math

import torch

from checks import Wrong, close, compare
from nanochameleon.config import OptimConfig
from nanochameleon.optim import learning_rate, orthogonalize


def warmup_cosine(answer):
    """The rate equals `learning_rate`'s at every step of three runs, one of them shorter than its warm-up."""

    def spec(step, total, peak, warmup, last):
        return learning_rate(
            step, total, OptimConfig("muon", peak, warmup_steps=warmup, schedule="cosine", min_lr_ratio=last)
        )

    runs = [(10, 1.0, 4, 0.1), (6, 2.0, 10, 0.5), (7, 1.0, 0, 0.0)]  # total, peak, warmup, last
    compare(answer, spec, ((step, *run) for run in runs for step in range(run[0])), 1e-6)


def second_background(answer):
    """A caption in three leaves one of two backgrounds open: ln 2 / 3 nats."""
    close(answer, math.log(2) / 3, 0.005)


def stays_small(answer):
    """After orthogonalize the largest singular value is in [0.6, 1.3], and the smallest is below 0.3."""
    try:
        matrix = torch.as_tensor(answer).float()
    except (TypeError, ValueError, RuntimeError):  # no numbers, or rows of different length
        matrix = torch.zeros(1, 1)
    if matrix.ndim != 2 or max(matrix.shape) > 64 or not matrix.isfinite().all() or not matrix.any():
        raise Wrong("the answer is a matrix of numbers, at most 64 x 64, and not all zeros")
    values = torch.linalg.svdvals(orthogonalize(matrix[None])[0])
    if not 0.6 <= values.max() <= 1.3:
        raise Wrong(f"the largest singular value is {values.max():.2f} afterwards, which is not near 1")
    if values.min() > 0.3:
        raise Wrong(
            f"the smallest singular value is {values.min():.2f} afterwards: the statement holds for your matrix"
        )
