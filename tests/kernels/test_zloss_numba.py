"""The compiled loss against the formula in float64: any vocabulary size, ignored rows, odd memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_problems import assert_good, by_autograd, overwriting, problems
from tolerance import assert_as_good_as

from nanochameleon.kernels import linear_zloss_cross_entropy, use_kernels, zloss_cross_entropy
from nanochameleon.kernels.zloss import linear
from nanochameleon.kernels.zloss.cross_entropy import (
    zloss_cross_entropy_,
    zloss_cross_entropy_reference,
    zloss_gradient_,
)

FACTORS = dict(z_loss=st.sampled_from([0.0, 1e-3, 0.5]), scale=st.sampled_from([1.0, 0.25]))


def in_two_passes(logits: torch.Tensor, targets: torch.Tensor, z_loss: float, scale: float) -> list[torch.Tensor]:
    """log Z, then the gradient from it."""
    gradient = logits.clone()
    with use_kernels("numba"):
        cross_entropy, log_z = zloss_cross_entropy(logits, targets)
        zloss_gradient_(gradient, targets, log_z, z_loss, scale)
    return [cross_entropy, log_z, gradient]


WAYS = {"in one pass": overwriting("numba"), "in two passes": in_two_passes}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(problem=problems(), **FACTORS)
def test_loss_and_gradient_are_as_good_as_those_of_torch(way, dtype, problem, z_loss, scale):
    logits, targets = problem
    assert_good(WAYS[way](logits.to(dtype), targets, z_loss, scale), logits, targets, dtype, z_loss, scale)


ROWS = {
    "rising": torch.linspace(-100, 400, 5_000),
    "falling": torch.linspace(400, -100, 5_000),
    "a peak at the end": torch.cat([torch.zeros(4_999), torch.tensor([90.0])]),
    "a peak at the start": torch.cat([torch.tensor([90.0]), torch.zeros(4_999)]),
    "nothing at first": torch.cat([torch.full((2_100,), -torch.inf), torch.linspace(-3, 3, 2_900)]),
    "steps": torch.linspace(0, 8, 5_000).floor() * 20,
    "far from zero": torch.linspace(-1, 1, 5_000) * 1e30,
    "far below": torch.linspace(-1.0, -0.5, 5_000) * 2e38,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_wherever_the_largest_of_a_long_row_is(name, dtype, way):
    """Sums of 2^(x - shift) whose shift follows the largest from block to block."""
    logits = ROWS[name].to(dtype).double().repeat(3, 1)
    targets, z_loss = torch.tensor([4_999, -100, 2_500]), 0.0 if "far" in name else 1e-3
    result = WAYS[way](logits.to(dtype), targets, z_loss, 0.25)
    naive, truth = (by_autograd(logits.to(kind), targets, z_loss, 0.25) for kind in (dtype, torch.float64))
    size = logits.masked_fill(logits.isinf(), 0).abs().max().item()
    for x, plain, exact, scale in zip(result, naive, truth, (size, size, min(size, 1e4)), strict=True):
        assert_as_good_as(x, plain, exact, 2 * scale + 1)


def test_the_least_number_of_all_is_a_number():
    logits = torch.full((1, 50), torch.finfo(torch.float32).min)
    with use_kernels("numba"):
        loss, log_z = zloss_cross_entropy(logits, torch.tensor([3]))
    assert log_z.item() == logits[0, 0] and loss.item() == 0


def test_logits_that_cannot_be_overwritten_are_refused():
    targets = torch.tensor([1, 2])
    for logits in (torch.randn(5, 2).t(), torch._neg_view(torch.randn(2, 5))):
        with pytest.raises(ValueError, match="must be contiguous"):
            zloss_cross_entropy_(logits, targets, 0.0, 1.0)
        with pytest.raises(ValueError, match="must be contiguous"):
            zloss_gradient_(logits, targets, torch.zeros(2), 0.0, 1.0)


@given(problems(), st.sampled_from([-50.0, 3.0, 400.0]))
def test_a_shift_of_all_logits_moves_log_z_alone(problem, c):
    logits, targets = problem
    with use_kernels("numba"):
        loss, log_z = zloss_cross_entropy(logits.float(), targets)
        loss_c, log_z_c = zloss_cross_entropy(logits.float() + c, targets)
    tolerance = dict(rtol=0, atol=1e-6 * (2_000 + abs(c)))
    torch.testing.assert_close(loss_c, loss, **tolerance)
    torch.testing.assert_close(log_z_c, torch.where(targets < 0, 0, log_z + c), **tolerance)


def test_other_strides():
    logits, targets = torch.randn(40, 12).t(), torch.arange(12)
    with use_kernels("numba"):
        results = [zloss_cross_entropy(x, targets) for x in (logits, logits.contiguous())]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# With the output layer


def layer_by_autograd(hidden, weight, targets, z_loss, scale) -> list[torch.Tensor]:
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss, log_z = zloss_cross_entropy_reference(x @ w.T, targets)
    gradients = torch.autograd.grad(scale * (loss + z_loss * log_z.square()).sum(), (x, w))
    return [loss.detach(), log_z.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(problem=problems(), d=st.sampled_from([1, 5, 16, 50]), **FACTORS)
@settings(max_examples=30)
def test_the_output_layer_in_chunks_is_as_good_as_in_two_steps(dtype, problem, d, z_loss, scale):
    logits, targets = problem
    generator = torch.Generator().manual_seed(logits.numel())
    inputs = [torch.randn(rows, d, generator=generator).bfloat16().double() for rows in logits.shape]
    with pytest.MonkeyPatch.context() as patch, use_kernels("numba"):
        patch.setattr(linear, "MIN_ROWS", {"cpu": 1})
        result = linear_zloss_cross_entropy(*(x.to(dtype) for x in inputs), targets, z_loss, scale)
    naive, truth = (
        layer_by_autograd(*(x.to(kind) for x in inputs), targets, z_loss, scale) for kind in (dtype, torch.float64)
    )
    size = 1 + max((x.norm(dim=-1).max().item() for x in inputs if x.numel()), default=0.0) ** 2
    for x, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(x, plain, exact, 4 * size * (1 + z_loss * size))


def test_a_wide_weight_gets_its_gradient_in_its_own_type():
    """As autocast has it: matmuls in bfloat16, and sums over chunks in float32."""
    hidden, weight, targets = torch.randn(40, 8).bfloat16(), torch.randn(70, 8), torch.arange(40)
    _, _, d_hidden, d_weight = linear_zloss_cross_entropy(hidden, weight, targets, 1e-3, 0.5)
    truth = layer_by_autograd(hidden.double(), weight.bfloat16().double(), targets, 1e-3, 0.5)
    assert d_hidden.dtype == torch.bfloat16 and d_weight.dtype == torch.float32
    torch.testing.assert_close(d_weight.double(), truth[3], rtol=0.05, atol=0.05)


def test_a_chunk_is_a_part_of_all_logits():
    """An eighth of many rows, and no chunk of so few rows that its matmuls are slow."""
    assert linear.rows_per_chunk(32_768, "cuda") == 4_096 and linear.rows_per_chunk(8_192, "cuda") == 2_048
    assert linear.rows_per_chunk(4_096, "cpu") == 512 and linear.rows_per_chunk(1_024, "cpu") == 256
    assert linear.rows_per_chunk(100, "cpu") == 100 and linear.rows_per_chunk(0, "cpu") == 0


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong


def test_a_target_beyond_the_vocabulary_is_refused():
    with use_kernels("numba"):
        with pytest.raises(IndexError, match="target 7 is out of range for 7 logits"):
            zloss_cross_entropy(torch.zeros(2, 7), torch.tensor([0, 7]))
        with pytest.raises(IndexError, match="target 7 is out of range for 7 logits"):
            linear_zloss_cross_entropy(torch.zeros(2, 3), torch.zeros(7, 3), torch.tensor([0, 7]), 0.0, 1.0)


BROKEN = {
    "nan": [torch.nan], "inf": [torch.inf], "both": [torch.inf, -torch.inf], "one -inf": [-torch.inf],
    "all -inf": [-torch.inf] * 90, "all nan": [torch.nan] * 90,
}  # fmt: skip


def assert_broken_where(results, references) -> None:
    for x, y in zip(results, references, strict=True):
        assert not (x.isfinite() & ~y.isfinite()).any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 70, 89])
@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN)
def test_what_has_diverged_is_seen_in_the_loss_and_its_gradient(values, at, dtype, way):
    logits, targets = torch.randn(3, 90), torch.tensor([5, 71, 8])
    at = min(at, 90 - len(values))
    logits[1, at : at + len(values)] = torch.tensor(values)
    result, naive = (function(logits.to(dtype), targets, 1e-2, 0.25) for function in (WAYS[way], by_autograd))
    assert_broken_where(result, naive)
    assert all(x[[0, 2]].isfinite().all() for x in result)  # the other rows
    if values == [-torch.inf] and at != 71:
        assert all(x.isfinite().all() for x in result)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_so_it_is_with_the_output_layer(where, value):
    tensors = {"hidden": torch.randn(3, 20), "weight": torch.randn(90, 20).abs()}
    tensors[where][1, 3] = value
    targets = torch.tensor([5, 71, 8])
    result, naive = (
        function(*tensors.values(), targets, 1e-2, 0.25) for function in (linear_zloss_cross_entropy, layer_by_autograd)
    )
    assert not all(x.isfinite().all() for x in naive)
    assert_broken_where(result, naive)
