"""What lesson 6's answers must do: checked against autograd and transformer.py."""

import math

import torch

from checks import Wrong, close, compare, same
from nanochameleon.losses import next_token_loss
from nanochameleon.packing import IGNORE
from nanochameleon.transformer import QKNorm
from nanochameleon.vocab import Vocab


def z_loss_gradient(answer):
    """The gradient equals that of `next_token_loss`, with rows that are ignored and logits of 1e4."""

    def spec(logits, targets, z):
        x = logits.clone().requires_grad_()
        next_token_loss(x, targets, Vocab.toy(8, 0), z).loss.backward()
        return x.grad

    torch.manual_seed(0)
    inputs = [(2 * torch.randn(2, 3).double(), torch.tensor([2, 0]), z) for z in (0.0, 0.1)]
    inputs += [(torch.randn(3, 4).double(), torch.tensor([IGNORE, 3, -1]), 0.01)]
    inputs += [(1e4 * torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 4]), 1e-5)]
    compare(answer, spec, inputs)


def largest_logit_at_128(answer):
    """Two vectors of length sqrt(E) give at most E, divided by sqrt(E)."""
    close(answer, math.sqrt(128), 0.05)


def not_undone(answer):
    """Norms of queries and of the scaled ones differ by more than 0.1."""
    if isinstance(answer, bool) or not same(0.0, answer, math.inf) or not 0 < answer < math.inf:
        raise Wrong("the answer is a positive number")
    torch.manual_seed(0)
    norm, queries = QKNorm(1, 32, 1e-5), torch.randn(1, 16, 2, 32)
    change = float((norm(float(answer) * queries) - norm(queries)).detach().abs().max())
    if change <= 0.1:
        raise Wrong(f"for {answer} the norms differ by at most {change:.4f}: the scale is undone")
