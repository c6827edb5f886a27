"""Lesson 7's exercises, solved: top-p, what the grammar allows, and guidance that takes what nobody would."""

import torch
from torch import Tensor


def top_p(probs: Tensor, p: float) -> Tensor:
    """(V,) probabilities, p -> bool (V,): the tokens that stay."""
    ordered, order = probs.sort(descending=True, stable=True)  # stable: of equal ones the first comes first
    before = ordered.cumsum(0) - ordered  # the probability of all that are likelier
    keep = (before < p) | (p >= 1)  # the token that reaches p stays
    keep[0] = True
    return torch.zeros_like(keep).scatter(0, order, keep)


# text, </s> and begin of image; the codes; the end of the image
allowed = (49_148 + 2, 8_192, 1)

# guided = without + 3 (with - without): the last token falls by little, where the others fall by much.
guidance = ([1.0, 1.0, 0.0], [10.0, 10.0, 0.5])
