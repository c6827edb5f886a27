"""Ops in memory full of something else: every output and every piece of scratch is written before it is read."""

import pytest
import torch
from garbage import assert_same_in_garbage

from nanochameleon.kernels import rms_norm, swiglu, use_kernels
from nanochameleon.kernels.block.rms_norm import add_norm, norm_add
from nanochameleon.losses import fused_next_token_loss, next_token_loss
from nanochameleon.vocab import Vocab

N, V = 5, 601  # rows end within a register
TARGETS = torch.tensor([0, V - 1, -100, 300, 7])
VOCAB = Vocab()
OPS = {  # x (N, V), y (N, V), weight (V,) -> the results
    "zloss": lambda x, y, w: next_token_loss(x, TARGETS, VOCAB, 1e-3, 5.0),
    "zloss in place": lambda x, y, w: next_token_loss(x * 1, TARGETS, VOCAB, 1e-3, 5.0, overwrite_logits=True),
    "linear_zloss": lambda x, y, w: fused_next_token_loss(x, y.repeat(200, 1)[:V], TARGETS, VOCAB, 1e-3, 5.0),
    "rms_norm": lambda x, y, w: [rms_norm(x, w, 1e-5)],
    "add_norm": lambda x, y, w: add_norm(x, y, w, 1e-5),
    "norm_add": lambda x, y, w: [norm_add(x, y, w, 1e-5)],
    "swiglu": lambda x, y, w: [swiglu(x, y)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_garbage_is_not_read(monkeypatch, name, dtype):
    x, y, weight = torch.randn(N, V).to(dtype), torch.randn(N, V).to(dtype), torch.randn(V)

    def run():
        inputs = [z.clone().requires_grad_() for z in (x, y, weight)]
        with use_kernels("numba"):
            results = OPS[name](*inputs)
            gradients = torch.autograd.grad(sum(z.float().square().sum() for z in results), inputs, allow_unused=True)
        return [z.detach() for z in (*results, *gradients) if z is not None]

    assert_same_in_garbage(monkeypatch, run)
