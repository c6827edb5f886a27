"""Cross-entropy with z-loss: the reference is the formula, in value and in gradient, and so is what training calls."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_problems import assert_good, by_autograd, overwriting, problems
from tolerance import assert_as_good_as

from nanochameleon.kernels import use_kernels
from nanochameleon.kernels.zloss.cross_entropy import (
    zloss_cross_entropy,
    zloss_cross_entropy_,
    zloss_gradient_,
)

SMALL = list(range(1, 12))
FACTORS = dict(z_loss=st.sampled_from([0.0, 1e-3, 0.5]), scale=st.sampled_from([1.0, 0.25, 3.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(problem=problems(SMALL))
def test_values_are_those_of_torch_and_never_narrower_than_float32(dtype, problem):
    def by_torch(x):
        valid = targets >= 0
        loss = torch.nn.functional.cross_entropy(x, targets, reduction="none")
        return loss, torch.where(valid, x.logsumexp(-1), 0)

    logits, targets = problem
    scale = 2 * logits.abs().max().item() + 1 if logits.numel() else 1  # log Z and the logit cancel
    results = zloss_cross_entropy(logits.to(dtype), targets)
    for result, plain, truth in zip(results, by_torch(logits.float()), by_torch(logits), strict=True):
        assert_as_good_as(result, plain, truth, scale)


@given(problem=problems(SMALL), **FACTORS)
def test_the_gradient_is_the_derivative_of_the_loss(problem, z_loss, scale):
    logits, targets = problem
    expected = by_autograd(logits, targets, z_loss, scale)
    result = overwriting("reference")(logits, targets, z_loss, scale)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


@given(problem=problems(SMALL), **FACTORS)
def test_each_row_of_the_gradient_sums_to_that_of_the_z_term(problem, z_loss, scale):
    """The softmax sums to 1 and so does the target: only 2 z log Z is left of the whole row."""
    logits, targets = problem
    gradient = logits.clone()
    log_z = zloss_cross_entropy_(gradient, targets, z_loss, scale)[1]
    torch.testing.assert_close(gradient.sum(-1), 2 * scale * z_loss * log_z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@given(problem=problems(SMALL), **FACTORS)
def test_types_without_kernels_go_by_the_reference(dtype, problem, z_loss, scale):
    logits, targets = problem
    logits = logits.clamp(-1_000, 1_000)
    result = overwriting("auto")(logits.to(dtype), targets, z_loss, scale)
    assert_good(result, logits, targets, dtype, z_loss, scale)


@pytest.mark.parametrize("kernels", ["reference", "numba"])
@given(problem=problems(SMALL), cut=st.integers(0, 12), **FACTORS)
def test_a_vocabulary_in_parts_has_the_same_gradient(kernels, problem, cut, z_loss, scale):
    """Each part gets log Z of all, and a target beyond its columns where another part has it."""
    logits, targets = problem[0].float(), problem[1]
    cut = min(cut, logits.shape[1])
    _, log_z, expected = overwriting(kernels)(logits, targets, z_loss, scale)
    parts = []
    for start, stop in ((0, cut), (cut, logits.shape[1])):
        part, local = logits[:, start:stop].clone(memory_format=torch.contiguous_format), targets - start
        local = torch.where((local < 0) | (local >= stop - start), stop - start, local).masked_fill(targets < 0, -1)
        with use_kernels(kernels):
            if stop > start:
                zloss_gradient_(part, local, log_z, z_loss, scale)
        parts.append(part)
    # log Z is rounded to float32, and each power changes by as much
    error = 1e-6 * (1 + logits.abs().max().item() if logits.numel() else 1)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=error, atol=2 * error * scale * (1 + 2_000 * z_loss))


@pytest.mark.parametrize("kernels", ["reference", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_alone_leave_the_logits_as_they_are(kernels, dtype):
    logits, targets = torch.randn(5, 33).to(dtype), torch.tensor([0, 32, -100, 3, 7])
    before = logits.clone(), targets.clone()
    with use_kernels(kernels):
        values = zloss_cross_entropy(logits, targets)
        assert torch.equal(logits, before[0]) and torch.equal(targets, before[1])
        for x, y in zip(values, zloss_cross_entropy_(logits, targets, 1e-5, 1.0), strict=True):
            torch.testing.assert_close(x, y)
    assert logits.dtype == dtype and not torch.equal(logits, before[0]) and torch.equal(targets, before[1])


def test_a_worked_example():
    """Logits ln 1, ln 3: Z is 4 and the second has probability 3/4."""
    logits = torch.tensor([[1.0, 3.0]]).log()
    cross_entropy, log_z = zloss_cross_entropy_(logits, torch.tensor([1]), 0.5, 2.0)
    assert log_z.item() == pytest.approx(math.log(4)) and cross_entropy.item() == pytest.approx(math.log(4 / 3))
    factor = 2 * (1 + math.log(4))
    assert logits[0].tolist() == pytest.approx([factor / 4, factor * 3 / 4 - 2])
