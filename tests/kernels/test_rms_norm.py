"""RMSNorm: the compiled op against the formula in float64, and the type that autocast wants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_good_as

from nanochameleon.kernels import rms_norm, use_kernels
from nanochameleon.kernels.rms_norm import rms_norm_reference


def outcome(function, x, weight, upstream, dtype) -> list[torch.Tensor]:
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    y = function(x, weight, 1e-5)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), upstream.to(y.dtype))]


def steepest(x, weight, upstream) -> float:
    """A bound of the terms that a gradient is made of: upstream * weight / rms, and upstream * x / rms."""
    if not x.numel():
        return 0.0
    rms = (x.square().mean(-1) + 1e-5).sqrt()
    return (upstream.abs().max() * (weight.abs().max() / rms.min() + x.abs().max() / rms.min())).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(0, 5), st.sampled_from([1, 3, 16, 40, 192]), st.sampled_from([1e-3, 1.0, 100.0]), st.integers(0, 99))
def test_numba_is_as_good_as_the_reference(dtype, n, d, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(2, n, d, generator=generator).bfloat16().double() for _ in range(2))
    x, weight = (size * x).bfloat16().double(), torch.randn(d, generator=generator).bfloat16().double()
    truth, naive = (outcome(rms_norm_reference, x, weight, upstream, kind) for kind in (torch.float64, dtype))
    with use_kernels("numba"):
        result = outcome(rms_norm, x, weight, upstream, dtype)
    for y, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(y, plain, exact, 4 * d * (1 + steepest(x, weight, upstream)))


@pytest.mark.parametrize("name", ["reference", "numba"])
def test_under_autocast_the_result_is_bfloat16_and_gradients_are_as_wide_as_inputs(name):
    x, weight = torch.randn(3, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    with use_kernels(name), torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(x, weight, 1e-5)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), rms_norm_reference(x, weight, 1e-5), rtol=2**-8, atol=0)


def test_opcheck():
    x, weight = torch.randn(3, 10, requires_grad=True), torch.ones(10, requires_grad=True)
    for bf16 in (False, True):
        torch.library.opcheck(torch.ops.nanochameleon.rms_norm.default, (x, weight, 1e-5, bf16))
