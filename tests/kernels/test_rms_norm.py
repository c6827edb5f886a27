"""RMSNorm alone and with the residual sum: the compiled ops against the formula in float64, and the types that autocast
wants."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_good_as

from nanochameleon.kernels import add_norm, norm_add, rms_norm, use_kernels
from nanochameleon.kernels.block.rms_norm import add_norm_reference, norm_add_reference, rms_norm_reference

PAIRS = {  # with the same arguments for all: x, branch, weight -> the results
    "rms_norm": [lambda x, b, w, f=f: (f(x, w, 1e-5),) for f in (rms_norm, rms_norm_reference)],
    "add_norm": [lambda x, b, w, f=f: f(x, b, w, 1e-5) for f in (add_norm, add_norm_reference)],
    "norm_add": [lambda x, b, w, f=f: (f(x, b, w, 1e-5),) for f in (norm_add, norm_add_reference)],
}


def outcome(function, inputs, upstream, dtype) -> list[torch.Tensor]:
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    results = function(*inputs)
    total = sum((y * g.to(y.dtype)).sum() for y, g in zip(results, upstream, strict=False))
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    return [y.detach() for y in results] + [g for g in gradients if g is not None]


def steepest(x, weight, upstream) -> float:
    """A bound of the terms that a gradient is made of: upstream * weight / rms, and upstream * x / rms."""
    if not x.numel():
        return 0.0
    rms = (x.square().mean(-1) + 1e-5).sqrt()
    return (upstream.abs().max() * (1 + weight.abs().max() / rms.min() + x.abs().max() / rms.min())).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
@given(st.integers(0, 5), st.sampled_from([1, 3, 16, 40, 192]), st.sampled_from([1e-3, 1.0, 100.0]), st.integers(0, 99))
def test_numba_is_as_good_as_the_reference(name, dtype, n, d, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x, branch, *upstream = (torch.randn(2, n, d, generator=generator).bfloat16().double() for _ in range(4))
    x, branch = ((size * y).bfloat16().double() for y in (x, branch))
    weight = torch.randn(d, generator=generator).bfloat16().double()
    ours, reference = PAIRS[name]
    truth, naive = (outcome(reference, (x, branch, weight), upstream, kind) for kind in (torch.float64, dtype))
    with use_kernels("numba"):
        result = outcome(ours, (x, branch, weight), upstream, dtype)
    normed = {"rms_norm": x, "add_norm": x + branch, "norm_add": branch}[name]
    scale = 4 * d * (1 + steepest(normed, weight, torch.stack(upstream))) + 2 * size
    for y, plain, exact in zip(result, naive, truth, strict=True):
        assert_as_good_as(y, plain, exact, scale)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_a_weight_of_another_dtype_leaves_torch_its_one_kernel(name, x_dtype, weight_dtype):
    """FSDP casts weights to bfloat16, and torch warns once a process where it takes many kernels in place of one."""
    x, branch, weight = torch.randn(3, 16).to(x_dtype), torch.randn(3, 16).to(x_dtype), torch.randn(16).to(weight_dtype)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results = PAIRS[name][1](x, branch, weight)
    finally:
        torch.set_warn_always(before)
    exact = PAIRS[name][1](x.double(), branch.double(), weight.double())
    for y, truth in zip(results, exact, strict=True):
        assert y.dtype == x_dtype
        torch.testing.assert_close(
            y.double(), truth, rtol=0, atol=2 * torch.finfo(x_dtype).eps * truth.abs().max().item()
        )


@pytest.mark.parametrize("kernels", ["reference", "numba"])
@pytest.mark.parametrize("name", PAIRS)
def test_under_autocast_what_is_read_next_is_bfloat16_and_the_stream_stays_wide(name, kernels):
    x, weight = torch.randn(3, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    branch = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    with use_kernels(kernels), torch.autocast("cpu", torch.bfloat16):
        results = PAIRS[name][0](x, branch, weight)
    assert [y.dtype for y in results] == {
        "rms_norm": [torch.bfloat16], "add_norm": [torch.float32, torch.bfloat16], "norm_add": [torch.float32],
    }[name]  # fmt: skip
    sum(y.float().square().sum() for y in results).backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    expected = PAIRS[name][1](*(y.detach().double() for y in (x, branch, weight)))
    for y, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-7)
    if name != "rms_norm":
        assert branch.grad.dtype == torch.bfloat16
    if name == "add_norm":
        torch.testing.assert_close(branch.grad, x.grad.bfloat16())


@pytest.mark.parametrize("name", PAIRS)
def test_inputs_of_other_strides_are_read_right_and_never_written(name):
    wide, weight = torch.randn(6, 2, 20), torch.randn(20)
    x, branch = wide.unbind(1)
    before = wide.clone()
    with use_kernels("numba"):
        result = PAIRS[name][0](x, branch, weight)
        expected = PAIRS[name][0](x.contiguous(), branch.contiguous(), weight)
    assert all(torch.equal(y, z) for y, z in zip(result, expected, strict=True)) and torch.equal(wide, before)


@pytest.mark.parametrize("name", PAIRS)
def test_gradcheck(name):
    x, branch, weight = (torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((3, 6), (3, 6), (6,)))
    assert torch.autograd.gradcheck(PAIRS[name][0], (x, branch, weight))


def test_opcheck():
    x, branch, weight = torch.randn(3, 10, requires_grad=True), torch.randn(3, 10), torch.ones(10, requires_grad=True)
    ops = torch.ops.nanochameleon
    for bf16 in (False, True):
        torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-5, bf16))
        narrow = branch.bfloat16().requires_grad_()
        torch.library.opcheck(ops.add_norm.default, (x, narrow, weight, 1e-5, bf16))
        torch.library.opcheck(ops.norm_add.default, (x, narrow if bf16 else branch, weight, 1e-5))
