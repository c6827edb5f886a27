"""Plausible wrong answers to lesson 7's exercises."""

import torch


def leaves_out_the_token_that_reaches_p(probs, p):
    ordered, order = probs.sort(descending=True, stable=True)
    return torch.zeros(len(probs), dtype=torch.bool).scatter(0, order, (ordered.cumsum(0) <= p) | (p >= 1))


def keeps_the_rarest(probs, p):
    ordered, order = probs.sort(stable=True)
    return torch.zeros(len(probs), dtype=torch.bool).scatter(0, order, ordered.cumsum(0) - ordered < p)


def a_threshold_for_each(probs, p):
    return probs >= 1 - p


WRONG = {
    "top_p": [leaves_out_the_token_that_reaches_p, keeps_the_rarest, a_threshold_for_each],
    "allowed": [(49_148, 8_192, 1), (49_150, 8_193, 1), (49_150, 8_192, 2)],
    "guidance": [([1.0, 0.0, 2.0], [0.0, 0.0, 0.0]), ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0])],
}
