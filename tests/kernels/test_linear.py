"""Linear layers as one matmul: each as if alone, in value and gradient, and nothing copied that need not be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_good_as

from nanochameleon.kernels import linear, use_kernels
from nanochameleon.kernels.block.linear import concat_view, linear_reference


def outcome(function, x, weights, upstream, dtype) -> list[torch.Tensor]:
    x, *weights = (y.to(dtype).requires_grad_() for y in (x, *weights))
    results = function(x, weights)
    gradients = torch.autograd.grad(results, (x, *weights), [g.to(dtype) for g in upstream])
    return [y.detach() for y in results] + list(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from([(5,), (2, 7), (1, 1), (0,)]),
       st.sampled_from([1, 8, 33]), st.integers(0, 99))  # fmt: skip
def test_it_is_as_good_as_the_layers_one_by_one(dtype, widths, shape, k, seed):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator).bfloat16().double()

    x, weights, upstream = numbers(*shape, k), [numbers(n, k) for n in widths], [numbers(*shape, n) for n in widths]
    truth, naive = (outcome(linear_reference, x, weights, upstream, kind) for kind in (torch.float64, dtype))
    with use_kernels("auto"):
        result = outcome(linear, x, weights, upstream, dtype)
    for y, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(y, plain, exact, 16 * (1 + k + sum(widths) + len(x)))


def test_under_autocast_matmuls_are_bfloat16_and_gradients_as_wide_as_their_tensors():
    x, weights = torch.randn(4, 8, requires_grad=True), [torch.randn(n, 8, requires_grad=True) for n in (3, 5)]
    with use_kernels("auto"), torch.autocast("cpu", torch.bfloat16):
        results = linear(x, weights)
    assert [y.dtype for y in results] == [torch.bfloat16] * 2
    sum(y.sum() for y in results).backward()
    assert [y.grad.dtype for y in (x, *weights)] == [torch.float32] * 3
    for y, expected in zip(results, linear_reference(x, weights), strict=True):
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


def test_what_needs_no_gradient_gets_none():
    x, w = torch.randn(4, 8), torch.randn(3, 8)
    with use_kernels("auto"):
        linear(x, [w.requires_grad_()])[0].sum().backward()
        assert x.grad is None and w.grad is not None
        linear(x.requires_grad_(), [w.detach()])[0].sum().backward()
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(4, 8))


def test_gradients_that_are_adjacent_views_are_not_copied():
    whole = torch.randn(6, 9)
    assert concat_view(whole.split([2, 3, 4], 1)).data_ptr() == whole.data_ptr()
    parts = {
        "swapped": [whole[:, 2:], whole[:, :2]], "apart": [whole[:, :2], whole[:, 3:]],
        "two tensors": [whole[:, :2], whole[:, 2:].clone()], "one twice": [whole[:, :4], whole[:, :4]],
        "one row": [whole[:1, :2], whole[:1, 2:]],
    }  # fmt: skip
    for name, each in {"whole": whole.split([2, 3, 4], 1), **parts}.items():
        assert torch.equal(concat_view(each), torch.cat(tuple(each), 1)), name
