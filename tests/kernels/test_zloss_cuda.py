"""The loss on a GPU, on logits and with the output layer, against float64.

Run on a CPU through the very calls that launch the kernels on a GPU: see emulator.py.
"""

import pytest
import torch
import torch.nn.functional as F
from attention_problems import generator, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_problems import by_autograd
from tolerance import assert_as_good_as

from nanochameleon.kernels import linear_zloss_cross_entropy, use_kernels, zloss_cross_entropy
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.gpu.emulator.emulator import emulated
from nanochameleon.kernels.zloss import linear
from nanochameleon.kernels.zloss.cross_entropy import (
    zloss_cross_entropy_,
    zloss_cross_entropy_reference,
    zloss_gradient_,
)

pytestmark = pytest.mark.usefixtures("emulated_gpu")
NARROW = torch.bfloat16


@st.composite
def logits(draw):
    """(logits in float64 whose values bfloat16 holds, targets with some ignored)"""
    n, v, numbers = draw(st.integers(1, 5)), draw(st.sampled_from([1, 7, 8, 64, 97, 1_000])), generator(draw(seeds))
    x = draw(st.sampled_from([0.1, 3.0, 50.0])) * torch.randn(n, v, generator=numbers)
    return x.to(NARROW).double(), torch.randint(-1, v, (n,), generator=numbers)


def compare_losses(result, x, targets, dtype, z_loss, scale) -> None:
    naive, truth = (by_autograd(x.to(kind), targets, z_loss, scale) for kind in (dtype, torch.float64))
    size = 1 + x.abs().max().item()
    sizes = size, size, scale * (1 + 2 * z_loss * size) * size
    for ours, plain, exact, s in zip(result, naive, truth, sizes, strict=True):
        assert_as_good_as(ours, plain, exact, scale=4 * s)


@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
@given(problem=logits(), z_loss=st.sampled_from([0.0, 0.3]))
def test_the_loss_and_then_its_gradient_are_as_good_as_the_reference(dtype, problem, z_loss):
    x, targets = problem
    buffer, scale = x.to(dtype), 0.25
    with use_kernels("cuda"):
        loss, log_z = zloss_cross_entropy(buffer, targets)
        zloss_gradient_(buffer, targets, log_z, z_loss, scale)
    compare_losses([loss, log_z, buffer], x, targets, dtype, z_loss, scale)


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
@settings(max_examples=25)
@given(problem=logits(), z_loss=st.sampled_from([0.0, 0.3]))
def test_the_gradient_in_the_logits_place(dtype, generation, problem, z_loss):
    """In one pass where rows are multiples of 16 bytes, else in two; with the copies of either generation."""
    x, targets = problem
    buffer = x.to(dtype)
    with emulated(generation):
        loss, log_z = gpu.zloss_overwrite(buffer, targets, z_loss, 0.25, gpu.shared_kilobytes(0))
    compare_losses([loss, log_z, buffer], x, targets, dtype, z_loss, 0.25)


@pytest.mark.parametrize("generation", [80, 90])
def test_a_row_as_wide_as_a_vocabulary(generation):
    """Several bulk copies, all of a block's 1,024 threads."""
    x, targets = torch.randn(2, 40_000, generator=generator(0)).to(NARROW).double(), torch.tensor([39_999, 7])
    buffer = x.to(NARROW)
    with emulated(generation):
        loss, log_z = gpu.zloss_overwrite(buffer, targets, 1e-2, 0.5, gpu.shared_kilobytes(0))
    compare_losses([loss, log_z, buffer], x, targets, NARROW, 1e-2, 0.5)


@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
@pytest.mark.parametrize("target", [64, 65, 10**12])
def test_a_target_beyond_the_vocabulary_has_no_loss(dtype, target):
    """NaN, where reading on would give the logit of another row. Other rows are as they were."""
    x, targets = torch.randn(3, 64, generator=generator(0)).to(dtype), torch.tensor([5, target, -1])
    one_pass, two_passes = x.clone(), x.clone()
    losses = [gpu.zloss_forward(x, targets)[0]]
    losses += [gpu.zloss_overwrite(x, targets, 1e-2, 0.5, kb)[0] for x, kb in ((one_pass, 227), (two_passes, 2))]
    for loss in losses:
        assert loss[1].isnan() and loss[[0, 2]].isfinite().all() and loss[2] == 0
    for gradient in (one_pass, two_passes):
        assert gradient[1].isnan().all() and gradient[0].isfinite().all() and not gradient[2].any()


def test_a_target_in_another_part_of_the_vocabulary_has_a_gradient():
    """The softmax alone: its row's target is in the logits of another rank."""
    x = torch.randn(2, 64, generator=generator(0))
    log_z, buffer = x.logsumexp(-1), x.clone()
    with use_kernels("cuda"):
        zloss_gradient_(buffer, torch.tensor([64, 3]), log_z, 0.0, 1.0)
    torch.testing.assert_close(buffer, x.softmax(-1) - F.one_hot(torch.tensor([64, 3]), 65)[:, :64])


@pytest.mark.parametrize("wrong", [torch.zeros(2).long(), torch.zeros(3), torch.zeros(3, 1).long()])
def test_targets_that_do_not_fit_are_refused(monkeypatch, wrong):
    monkeypatch.setattr(gpu, "start", None)
    x, weight = torch.randn(3, 8), torch.randn(8, 8)
    with use_kernels("cuda"):
        for function, inputs in (
            (zloss_cross_entropy, (x, wrong)), (zloss_cross_entropy_, (x, wrong, 0.1, 0.5)),
            (linear_zloss_cross_entropy, (x, weight, wrong, 0.1, 0.5)),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="targets must be"):
                function(*inputs)


def test_rows_that_start_anywhere_are_read_number_by_number():
    """Slices of 16-bit rows are not 16 byte aligned, though their width may be a multiple."""
    x, targets = torch.randn(3, 64, generator=generator(0)).to(NARROW), torch.tensor([0, 63, -1])
    buffer = torch.zeros(3 * 64 + 3, dtype=NARROW)
    moved = buffer[3:].view(3, 64).copy_(x)
    assert not gpu.fits_one_pass(moved, 227)
    loss, log_z = gpu.zloss_overwrite(moved, targets, 1e-2, 0.5, 227)
    compare_losses([loss, log_z, moved], x.double(), targets, NARROW, 1e-2, 0.5)


@pytest.mark.parametrize("dtype", [NARROW, torch.float32])
@settings(max_examples=15)
@given(st.integers(1, 40), st.sampled_from([5, 64]), st.sampled_from([3, 16]), seeds)
def test_the_output_layer_in_chunks(dtype, n, v, d, seed):
    numbers = generator(seed)
    hidden, weight = (torch.randn(rows, d, generator=numbers).to(NARROW).double() for rows in (n, v))
    targets, z_loss, scale = torch.randint(-1, v, (n,), generator=numbers), 0.1, 1 / n

    def plain(kind: torch.dtype) -> list[torch.Tensor]:
        x, w = (y.to(kind).requires_grad_() for y in (hidden, weight))
        loss, log_z = zloss_cross_entropy_reference(F.linear(x, w), targets)
        total = scale * (loss + z_loss * log_z.square()).sum()
        return [loss.detach(), log_z.detach(), *torch.autograd.grad(total, (x, w))]

    with pytest.MonkeyPatch.context() as patch, use_kernels("cuda"):
        patch.setattr(linear, "MIN_ROWS", {"cpu": 1})
        result = linear_zloss_cross_entropy(hidden.to(dtype), weight.to(dtype), targets, z_loss, scale)
    size = 1 + hidden.norm(dim=1).max().item() * weight.norm(dim=1).max().item()
    for ours, naive, exact in zip(result, plain(dtype), plain(torch.float64), strict=True):
        assert_as_good_as(ours, naive, exact, scale=4 * size)
