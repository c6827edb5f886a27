"""What ops are given besides the usual: another default type, weights with strides, shapes that do not fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochameleon.kernels import rms_norm, swiglu, use_kernels, zloss_cross_entropy
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy_reference


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def default(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def test_kernels_ignore_the_default_dtype(default):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 50, generator=generator, dtype=torch.float32)
    targets, weight = torch.arange(300) % 50, torch.ones(50, dtype=torch.float32).requires_grad_()
    with use_kernels("numba"):
        loss, log_z = zloss_cross_entropy(logits, targets)
        normed = rms_norm(logits, weight, 1e-5)
    expected, _ = zloss_cross_entropy_reference(logits, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    (given,) = torch.autograd.grad(normed.sum(), weight)
    factor = (logits.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(given, (logits * factor).sum(0), rtol=1e-4, atol=1e-4)
    assert loss.dtype == log_z.dtype == given.dtype == torch.float32


def test_a_weight_may_have_strides():
    x, weight = torch.randn(5, 32), torch.randn(64)[::2]
    with use_kernels("numba"):
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm(x, weight.clone(), 1e-5))


@pytest.mark.parametrize("name", ["numba", "reference"])
def test_shapes_that_do_not_fit_raise(name):
    with use_kernels(name):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            zloss_cross_entropy(torch.zeros(4, 8), torch.zeros(2, dtype=torch.long))
        with pytest.raises((ValueError, RuntimeError)):
            swiglu(torch.zeros(4, 64), torch.zeros(4, 32))


def test_inputs_that_do_not_fit_raise_or_give_what_the_reference_gives():
    """mismatches.py, in a process of its own: reading beyond a tensor ends it there. Its last words name the inputs."""
    file = Path(__file__).with_name("mismatches.py")
    command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-6_000:]}\n{done.stderr[-2_000:]}"
