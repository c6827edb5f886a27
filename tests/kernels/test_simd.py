"""Vectors: 2^x to a few units in the last place, the ends of rows, and processors without vector extensions."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit

from nanochameleon.kernels.cpu import exp2 as powers
from nanochameleon.kernels.cpu import simd
from nanochameleon.kernels.cpu.simd import W, load, load_first, load_first_bf16, store, store_first, store_first_bf16

ULP = 2.0**-23


@pytest.fixture(params=["AVX-512", "any processor"])
def exp2(request, monkeypatch):
    """Both ways to write it, as far as this processor has them."""
    if request.param == "AVX-512" and not powers.HAS_SCALEF:
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(powers, "HAS_SCALEF", request.param == "AVX-512")

    @njit
    def run(x, y, n):
        for i in range(0, n, W):
            store(y + 4 * i, powers.exp2(load(x + 4 * i)))

    def call(x):
        y = torch.empty_like(x)
        run(x.data_ptr(), y.data_ptr(), len(x))
        return y

    return call


def test_powers_of_two_are_right_to_a_few_units_in_the_last_place(exp2):
    x = torch.cat([torch.linspace(-126, 127, 10_000), torch.arange(-126.0, 127), torch.linspace(-1, 1, 10_000)])
    x = x[: len(x) // W * W]
    truth = x.double().exp2()
    assert ((exp2(x).double() - truth) / truth).abs().max() < 3 * ULP


def test_what_is_far_above_is_infinity(exp2):
    x = torch.tensor([128.01, 129.0, 255.5, 1e4, 1e30, torch.inf, *[0.0] * (W - 6)])
    assert (exp2(x)[:6] == torch.inf).all()


def test_what_is_far_below_is_next_to_nothing_and_nan_stays(exp2):
    payload = np.array([0x7FC00001, 0xFFC00000, 0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    x = torch.tensor([-126.5, -127.0, -149.0, -1e4, -1e30, -torch.inf, *payload, *[0.0] * (2 * W - 10)])
    y = exp2(x)
    assert (y[:6] >= 0).all() and (y[:6] <= 2.0**-126 * (1 + 3 * ULP)).all()
    assert y[6:10].isnan().all() and ((y[10:] - 1).abs() <= ULP).all()


@njit
def copy_first(x, y, n, narrow):
    if narrow:
        store_first_bf16(y, n, load_first_bf16(x, n, simd.splat(np.float32(5))))
    else:
        store_first(y, n, load_first(x, n, simd.splat(np.float32(5))))


@njit
def load_all(x, y, n, narrow):
    fives = simd.splat(np.float32(5))
    store(y, load_first_bf16(x, n, fives) if narrow else load_first(x, n, fives))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [-1, 0, 1, W - 1, W, W + 3])
def test_the_first_lanes_alone_are_read_and_written(n, dtype):
    x, y, wide = torch.randn(W).to(dtype), torch.zeros(2 * W, dtype=dtype), torch.empty(W)
    inside = min(max(n, 0), W)
    copy_first(x.data_ptr(), y.data_ptr(), n, dtype == torch.bfloat16)
    assert torch.equal(y[:inside], x[:inside]) and not y[inside:].any()
    load_all(x.data_ptr(), wide.data_ptr(), n, dtype == torch.bfloat16)
    assert torch.equal(wide[:inside], x[:inside].float()) and (wide[inside:] == 5).all()


WITHOUT_EXTENSIONS = """
import numpy as np
from numba import njit
from nanochameleon.kernels.cpu.exp2 import exp2
from nanochameleon.kernels.cpu.simd import W, load, rope, store

@njit
def run(x, y):
    store(y, exp2(load(x)))
    store(y + 4 * W, rope(load(x), load(x)))

x, y = np.arange(W, dtype=np.float32), np.zeros(2 * W, np.float32)
run(x.ctypes.data, y.ctypes.data)
z = (x[::2] + 1j * x[1::2]) ** 2  # rotating a pair by itself squares it
assert np.allclose(y[:W], 2**x) and np.allclose(y[W::2], z.real) and np.allclose(y[W + 1 :: 2], z.imag)
print("lanes:", W)
"""


@pytest.mark.parametrize("processor", [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_CPU_FEATURES": ""}], ids=str)
def test_a_processor_without_vector_extensions_computes_with_what_it_has(processor):
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSIONS], env=os.environ | processor, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "lanes: 8\n"), run.stderr[-2_000:]
