"""Problems for the loss, and what it makes of them: cross-entropy, log Z and the gradient of their sum."""

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from tolerance import assert_as_good_as
from torch import Tensor

from nanochameleon.kernels import use_kernels
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy_, zloss_cross_entropy_reference

SIZES = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 130, 940, 1_025]


@st.composite
def problems(draw, sizes=SIZES):
    """(logits (N, V) float64 that bfloat16 holds exactly, targets of which some are ignored), with large offsets."""
    n, v = draw(st.integers(0, 9)), draw(st.sampled_from(sizes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    size, offset = draw(st.sampled_from([0.1, 1.0, 30.0])), draw(st.sampled_from([0.0, -200.0, 1_000.0]))
    logits = (offset + size * torch.randn(n, v, generator=generator)).bfloat16().double()
    targets = torch.randint(v, (n,), generator=generator)
    ignored = torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return logits, torch.where(ignored, -100, targets)


def by_autograd(logits: Tensor, targets: Tensor, z_loss: float, scale: float) -> list[Tensor]:
    """Cross-entropy, log Z and the gradient, by torch's operations in the type of the logits."""
    x = logits.detach().requires_grad_()
    cross_entropy, log_z = zloss_cross_entropy_reference(x, targets)
    (gradient,) = torch.autograd.grad(scale * (cross_entropy + z_loss * log_z.square()).sum(), x)
    return [cross_entropy.detach(), log_z.detach(), gradient]


def overwriting(kernels: str) -> Callable:
    """zloss_cross_entropy_ with these kernels, as by_autograd."""

    def run(logits: Tensor, targets: Tensor, z_loss: float, scale: float) -> list[Tensor]:
        gradient = logits.clone()
        with use_kernels(kernels):
            return [*zloss_cross_entropy_(gradient, targets, z_loss, scale), gradient]

    return run


def assert_good(result: list[Tensor], logits: Tensor, targets: Tensor, dtype, z_loss: float, scale: float) -> None:
    """At most twice the error of torch's operations in this type; nothing where a target is ignored."""
    naive, truth = (by_autograd(logits.to(kind), targets, z_loss, scale) for kind in (dtype, torch.float64))
    largest = logits.masked_fill(logits.isinf(), 0).abs().max().item() if logits.numel() else 0.0
    # log Z and the target's logit cancel, and a rounded log Z changes each power by as much
    value = 2 * largest + 1
    for ours, plain, exact, size in zip(result, naive, truth, (1, 1, scale * (1 + 2 * z_loss * value)), strict=True):
        assert_as_good_as(ours, plain, exact, 4 * size * value)
    assert all((x[targets < 0] == 0).all() for x in result)
