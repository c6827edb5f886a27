"""SwiGLU: the compiled op against the formula in float64, where the gate is flat too."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_good_as

from nanochameleon.kernels import swiglu, use_kernels
from nanochameleon.kernels.block.swiglu import swiglu_reference


def outcome(function, a, b, upstream, dtype) -> list[torch.Tensor]:
    a, b = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
    y = function(a, b)
    return [y.detach(), *torch.autograd.grad(y, (a, b), upstream.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.sampled_from([0, 1, 7, 16, 511, 512, 1_100]), st.sampled_from([0.1, 3.0, 200.0]), st.integers(0, 99))
def test_numba_is_as_good_as_the_reference(dtype, n, size, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, upstream = (torch.randn(n, generator=generator).bfloat16().double() for _ in range(3))
    a = (size * a).bfloat16().double()
    truth, naive = (outcome(swiglu_reference, a, b, upstream, kind) for kind in (torch.float64, dtype))
    with use_kernels("numba"):
        result = outcome(swiglu, a, b, upstream, dtype)
    for y, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(y, plain, exact, 2 * (1 + size) * (1 + exact.abs().max().item() if n else 1))


def test_far_from_zero_it_is_finite_and_right():
    a = torch.tensor([-1e30, -200.0, -87.5, 0.0, 200.0, 1e30], requires_grad=True)
    with use_kernels("numba"):
        y = swiglu(a, torch.ones(6))
    (slope,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(y[1:].detach(), swiglu_reference(a, torch.ones(6))[1:].detach(), rtol=1e-6, atol=1e-30)
    assert y.isfinite().all() and y[0].abs() < 1e-6 and slope.isfinite().all()


def test_gradcheck():
    a, b = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (a, b))


def test_opcheck():
    inputs = [torch.randn(3, 10, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(torch.ops.nanochameleon.swiglu.default, inputs)
