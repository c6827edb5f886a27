"""Plausible wrong answers to lesson 5."""

import math

import torch


def no_first_step(step, total, peak, warmup, last):
    """The warm-up starts at 0: the first step does not move."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2)


def one_late(step, total, peak, warmup, last):
    """The last step is total - 1, not total."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2)


def falls_to_zero(step, total, peak, warmup, last):
    """`last` is forgotten."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


WRONG = {
    "warmup_cosine": [no_first_step, one_late, falls_to_zero],
    # the whole bit; the caption's share of it; nothing; bits, not nats
    "second_background": [math.log(2), 2 / 3 * math.log(2), 0.0, 1 / 3],
    # equal singular values; a wide range that five steps still bring near 1; too large
    "stays_small": [torch.eye(8), torch.diag(torch.linspace(0.1, 1.0, 8)), torch.ones(65, 65)],
}
