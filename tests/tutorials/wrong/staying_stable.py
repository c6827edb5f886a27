"""Plausible wrong answers to lesson 6."""

import torch
from solutions.staying_stable import z_loss_gradient


def without_two(logits, targets, z):
    """The square's derivative has a factor of 2."""
    return z_loss_gradient(logits, targets, z / 2)


def padding_learns(logits, targets, z):
    """Rows without a target get the gradient of token 0."""
    return z_loss_gradient(logits, targets.clamp(min=0), z)


def overflows(logits, targets, z):
    """exp() before the largest logit is taken out."""
    powers = logits.exp()
    log_z = powers.sum(-1, keepdim=True).log()
    one_hot = torch.zeros_like(logits)
    valid = targets >= 0
    one_hot[valid, targets[valid]] = 1
    return (powers / powers.sum(-1, keepdim=True) * (1 + 2 * z * log_z) - one_hot) * valid[:, None]


def mean(logits, targets, z):
    """The mean over tokens, not the sum."""
    return z_loss_gradient(logits, targets, z) / len(targets)


WRONG = {
    "z_loss_gradient": [without_two, padding_learns, overflows, mean],
    "largest_logit_at_128": [128.0, 64.0, 5.66, 1.0],  # not divided; sqrt of the model's width; heads of 32
    "not_undone": [10.0, 1e6, 0.1, -1.0],
}
