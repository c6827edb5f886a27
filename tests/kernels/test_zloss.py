"""Cross-entropy with log Z: equal to the reference and to the formula in float64, in value and in gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_good_as

from nanochameleon.kernels import linear_zloss_cross_entropy
from nanochameleon.kernels.zloss.cross_entropy import (
    zloss_cross_entropy,
    zloss_cross_entropy_by_hand,
    zloss_cross_entropy_reference,
)
from nanochameleon.kernels.zloss.linear import linear_zloss_cross_entropy_reference


@st.composite
def problems(draw):
    """(logits (N, V) float64 that bfloat16 holds exactly, targets (N,)), with large offsets and lone peaks."""
    n, v = draw(st.integers(0, 6)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    size, offset = draw(st.sampled_from([0.1, 1.0, 30.0])), draw(st.sampled_from([0.0, -200.0, 1_000.0]))
    logits = (offset + size * torch.randn(n, v, generator=generator)).bfloat16().double()
    return logits, torch.randint(v, (n,), generator=generator)


def by_hand(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none"), logits.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(problem=problems())
def test_values_are_the_formula_s_and_never_narrower_than_float32(dtype, problem):
    logits, targets = problem
    truths = by_hand(logits, targets)
    results = zloss_cross_entropy(logits.to(dtype), targets)
    scale = 2 * logits.abs().max().item() + 1 if logits.numel() else 1  # log Z and the logit cancel
    for result, plain, truth in zip(results, by_hand(logits.float(), targets), truths, strict=True):
        assert_as_good_as(result, plain, truth, scale)


@given(problems(), st.integers(0, 100))
def test_the_gradient_is_the_reference_s_for_any_upstream_gradients(problem, seed):
    logits, targets = problem
    generator = torch.Generator().manual_seed(seed)
    g, h = torch.randn(2, len(logits), generator=generator).double()
    gradients = []
    for function in (zloss_cross_entropy, zloss_cross_entropy_reference):
        x = logits.clone().requires_grad_()
        cross_entropy, log_z = function(x, targets)
        gradients += torch.autograd.grad((g * cross_entropy + h * log_z.square()).sum(), x)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@given(problems())
def test_each_row_of_the_gradient_sums_to_that_of_the_z_term(problem):
    """The softmax sums to 1 and so does the target: only 2 z log Z is left of the whole row."""
    logits, targets = problem
    x = logits.clone().requires_grad_()
    cross_entropy, log_z = zloss_cross_entropy(x, targets)
    (gradient,) = torch.autograd.grad((cross_entropy + 1e-5 * log_z.square()).sum(), x)
    torch.testing.assert_close(gradient.sum(-1), 2e-5 * log_z.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(problem=problems())
def test_inputs_are_not_written_and_gradients_have_their_type(dtype, problem):
    logits, targets = problem[0].to(dtype, copy=True).requires_grad_(), problem[1]
    before = logits.detach().clone(), targets.clone()
    cross_entropy, log_z = zloss_cross_entropy(logits, targets)
    (cross_entropy + log_z).sum().backward()
    assert torch.equal(logits.detach(), before[0]) and torch.equal(targets, before[1])
    assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


@pytest.mark.parametrize("function", [zloss_cross_entropy_reference, zloss_cross_entropy_by_hand])
@pytest.mark.parametrize("targets", [[2, 0, -100, 4], [-100] * 4])
def test_gradients_are_differences(function, targets):
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, torch.tensor(targets)), logits)


@pytest.mark.parametrize("function", [linear_zloss_cross_entropy_reference, linear_zloss_cross_entropy])
def test_so_they_are_with_the_output_layer(function):
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    assert torch.autograd.gradcheck(lambda x, w: function(x, w, torch.tensor([2, 0, -100, 4])), (hidden, weight))


def test_either_output_alone_can_be_learnt_from():
    logits, targets = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 4, 2])
    one_hot = torch.nn.functional.one_hot(targets, 5)
    for output, expected in ((0, logits.softmax(-1) - one_hot), (1, logits.softmax(-1))):
        x = logits.clone().requires_grad_()
        zloss_cross_entropy(x, targets)[output].sum().backward()
        torch.testing.assert_close(x.grad, expected)


def test_by_hand():
    """Logits ln 1, ln 3: Z is 4 and the second has probability 3/4."""
    cross_entropy, log_z = zloss_cross_entropy(torch.tensor([[1.0, 3.0]]).log(), torch.tensor([1]))
    assert log_z.item() == pytest.approx(math.log(4)) and cross_entropy.item() == pytest.approx(math.log(4 / 3))
