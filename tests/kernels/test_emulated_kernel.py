"""The emulator's call for learners: that of cupy.RawKernel."""

import shutil

import numpy as np
import pytest
import torch

from nanochameleon.kernels.gpu.emulator.kernel import emulated_kernel
from nanochameleon.kernels.gpu.emulator.source import EmulatorError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing, so no CUDA kernel is run here")
SCALE = """
extern "C" __global__ void scale(const float* x, float* y, int n, float factor) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = factor * x[i];
}
"""
SUM = """
extern "C" __global__ void total(const float* x, float* sum) {
  extern __shared__ float part[];
  int i = threadIdx.x;
  part[i] = x[i];
  __syncthreads();
  for (int half = blockDim.x / 2; half; half /= 2) {
    if (i < half) part[i] += part[i + half];
    __syncthreads();
  }
  if (i == 0) *sum = part[0];
}
"""


@pytest.mark.parametrize("make", [torch.zeros, lambda n: np.zeros(n, np.float32)])
def test_it_is_called_as_cupy_s_kernels_are_on_tensors_and_arrays(make):
    x, y = make(100), make(100)
    x[:] = 2
    emulated_kernel(SCALE, "scale")((2,), (64,), (x, y, np.int32(99), np.float32(3)))
    assert (y[:99] == 6).all() and y[99] == 0


def test_a_file_is_compiled_as_a_source_text_is(tmp_path):
    (tmp_path / "scale.cu").write_text(SCALE)
    y = np.zeros(32, np.float32)
    emulated_kernel(tmp_path / "scale.cu", "scale")((1,), (32,), (np.ones_like(y), y, np.int32(32), np.float32(5)))
    assert (y == 5).all()


@pytest.mark.parametrize("name", ["times", "index", "softmax"])
def test_a_kernel_may_be_named_as_a_function_of_libc(name):
    x = torch.ones(2)
    emulated_kernel(f'extern "C" __global__ void {name}(float* x) {{ x[1] = 7; }}', name)((1,), (1,), (x,))
    assert x.tolist() == [1, 7]


def test_a_file_that_was_edited_is_compiled_again(tmp_path):
    for factor in (2, 3):
        (tmp_path / "twice.cu").write_text(f'extern "C" __global__ void twice(float* x) {{ x[0] *= {factor}; }}')
        emulated_kernel(tmp_path / "twice.cu", "twice")((1,), (1,), (x := torch.ones(1),))
        assert x.item() == factor


def test_shared_memory_of_the_launch_has_a_name_in_the_kernel():
    x, total = torch.arange(128.0), torch.zeros(1)
    emulated_kernel(SUM, "total")((1,), (128,), (x, total), shared_mem=512)
    assert total.item() == 127 * 64
    with pytest.raises(EmulatorError, match=r"shared memory byte 256 .*the launch asks for 256 bytes"):
        emulated_kernel(SUM, "total")((1,), (128,), (x, total), shared_mem=256)


def test_what_cannot_be_called_is_said_in_a_sentence():
    scale, x = emulated_kernel(SCALE, "scale"), torch.zeros(64)
    for arguments, sentence in {
        (x, x, 64, np.float32(1)): "argument 2 has Python's type int",
        (x, x[::2], np.int32(1), np.float32(1)): "argument 1 must be a contiguous",
        (x, x, np.float32(1), np.float32(1)): "the call gives",
    }.items():
        with pytest.raises(EmulatorError, match=sentence):
            scale((1,), (64,), arguments)
    for grid, block, shared in ((0,), (64,), 0), ((1,), (1_025,), 0), ((1,), (64,), 10**6):
        with pytest.raises(EmulatorError, match="at most"):
            scale(grid, block, (x, x, np.int32(64), np.float32(1)), shared_mem=shared)
    with pytest.raises(EmulatorError, match="no kernel scala"):
        emulated_kernel(SCALE, "scala")
    with pytest.raises(EmulatorError, match=r"g\+\+ refuses it.*foo"):
        emulated_kernel(SCALE.replace("if", "foo; if"), "scale")


LARGE = """extern "C" __global__ void large(float* x, int n) {
  float own[SIZE];
  for (int i = 0; i < SIZE; i++) own[i] = i;
  __syncthreads();
  x[threadIdx.x] = own[n];
}"""


def test_a_thread_has_half_a_megabyte_of_its_own_and_more_is_a_sentence():
    """Without closed memory around stacks this would end the process, or change another thread's numbers."""
    x = torch.zeros(64)
    emulated_kernel(LARGE.replace("SIZE", "100000"), "large")((1,), (64,), (x, np.int32(99_999)))
    assert (x == 99_999).all()
    for size in ("200000", "5000000"):
        with pytest.raises(EmulatorError, match=r"thread \d+: its arrays and calls need more than 512 KB"):
            emulated_kernel(LARGE.replace("SIZE", size), "large")((1,), (64,), (x, np.int32(0)))


def test_a_division_by_zero_is_named():
    source = 'extern "C" __global__ void divide(int* x) { x[0] = 5 / x[0]; }'
    with pytest.raises(EmulatorError, match=r"thread 0: a whole number is divided by zero .*kernel:1"):
        emulated_kernel(source, "divide")((1,), (1,), (torch.zeros(1, dtype=torch.int32),))
