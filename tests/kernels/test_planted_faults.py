"""A fault of each kind in a kernel that is otherwise right: the emulator names it, its threads and its line."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochameleon.kernels.gpu import launch
from nanochameleon.kernels.gpu.emulator import emulator
from nanochameleon.kernels.gpu.emulator.emulator import EmulatorError, emulated
from nanochameleon.kernels.gpu.emulator.kernel import emulated_kernel

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing, so no CUDA kernel is run here")

SUM = """// y[b] = the sum of row b of x, which has n numbers
extern "C" __global__ void row_sum(const float* x, float* y, int n) {
  __shared__ float part[64];
  int t = threadIdx.x;
  float sum = 0;
  for (int i = t; i < n; i += 64) sum += x[blockIdx.x * n + i];
  part[t] = sum;
  for (int half = 32; half; half /= 2) {
    __syncthreads();
    if (t < half) part[t] += part[t + half];
  }
  if (t == 0) y[blockIdx.x] = part[0];
}
"""
WARP = """// y[b] = the largest number of row b of x, by one warp
extern "C" __global__ void row_max(const float* x, float* y, int n) {
  int t = threadIdx.x;
  float m = -1e30f;
  for (int i = t; i < n; i += 32) m = fmaxf(m, x[blockIdx.x * n + i]);
  for (int o = 16; o; o /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, o));
  if (t == 0) y[blockIdx.x] = m;
}
"""
ATTENTION = """// out[i] = the mean of v over the keys that query i attends to: 0 to i
extern "C" __global__ void causal_mean(const float* v, float* out, int t) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= t) return;
  float sum = 0;
  for (int j = 0; j <= i; j++) sum += v[j];
  out[i] = sum / (i + 1);
}
"""
FAULTS = {  # text of the kernel, what is planted in it, and what is reported
    "a missing barrier": (
        SUM, "    __syncthreads();\n", "", r"race: it (reads|writes) shared memory byte \d+ \(kernel:\d+ `.*part.*"
        r"and thread \d+ (reads|writes) it \(kernel:\d+ `.*: no barrier"),
    "a barrier of one warp where two meet": (
        SUM, "__syncthreads()", "__syncwarp()", r"race: .*shared memory byte \d+ .*and thread \d+"),
    "a wrong index": (
        SUM, "i += 64) sum += x[blockIdx.x * n + i]", "i += 64) sum += x[blockIdx.x * n + i + 1]",
        r"block \(2, 0, 0\), thread \d+: out of bounds: it reads argument 0 \(x\), element 300 \(it has 300\) "
        r"\(kernel:6"),
    "an index at which two blocks meet": (
        SUM, "y[blockIdx.x] =", "y[blockIdx.x / 2] =",
        r"block \(1, 0, 0\), thread 0: race: it writes argument 1 \(y\), element 0 .*thread 0 of block \(0, 0, 0\) "
        r"writes it .*any order"),
    "uninitialised shared memory": (
        SUM, "part[t] = sum", "if (t < n % 64) part[t] = sum",
        r"uninitialised: it reads shared memory byte \d+ \(kernel:10 .*no thread of the block has written"),
    "a write out of bounds": (
        SUM, "if (t == 0) y[blockIdx.x]", "if (t == 0) y[blockIdx.x + 1]",
        r"block \(2, 0, 0\), thread 0: out of bounds: it writes argument 1 \(y\), element 3 \(it has 3\) "
        r"\(kernel:12 `if"),
    "shared memory out of bounds": (SUM, "part[64]", "part[63]", "array's index .*kernel:7"),
    "the mask of a shuffle": (
        WARP, "0xffffffff", "0xffff", r"thread 16: the mask 0xffff of its __shfl_xor_sync \(kernel:6\) leaves out"),
    "a shuffle that some lanes do not reach": (
        WARP, "for (int o", "if (t < n) for (int o", r"has left, but __shfl_xor_sync \(kernel:6\) of thread 0"),
}  # fmt: skip


def run(source: str, n: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, n), and what the kernel makes of it."""
    name, threads = ("row_sum", 64) if "row_sum" in source else ("row_max", 32)
    x, y = torch.arange(float(rows * n)).view(rows, n), torch.zeros(rows)
    emulated_kernel(source, name)((rows,), (threads,), (x, y, np.int32(n)))
    return x, y


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name):
    source, right, wrong, sentence = FAULTS[name]
    assert source.count(right) == 1
    with pytest.raises(EmulatorError, match=sentence):
        run(source.replace(right, wrong), n=20 if "lanes" in name else 100)


@settings(max_examples=20)
@given(st.integers(1, 300), st.integers(1, 3))
def test_faultless_kernels_give_no_alarm(n, rows):
    x, y = run(SUM, n, rows)
    assert torch.allclose(y, x.sum(1))
    x, y = run(WARP, n, rows)
    assert torch.equal(y, x.amax(1))


def test_a_wrong_attention_mask_is_no_mistake_of_threads_but_differs_from_the_reference():
    """The emulator runs the kernel; the comparison finds the fault, at the first query."""
    v = torch.arange(1.0, 41)
    truth = v.cumsum(0) / torch.arange(1, 41)
    for mask, right in {"j <= i": True, "j < i": False}.items():
        out = torch.zeros(40)
        emulated_kernel(ATTENTION.replace("j <= i", mask), "causal_mean")((2,), (32,), (v, out, np.int32(40)))
        differs = (out - truth).abs() > 1e-4
        assert not differs.any() if right else differs[0]


# ---------------------------------------------------------------------------------------------------------------------
# What orders memory, and what does not

TWO = 'extern "C" __global__ void two(const float* x, float* y) {{ int i = threadIdx.x; __shared__ float s[64]; {} }}'


def run_two(body: str) -> None:
    emulated_kernel(TWO.format(body), "two")((2,), (64,), (torch.arange(64.0), torch.zeros(64)))


@pytest.mark.parametrize(
    ("between", "ordered"),
    [("__syncthreads();", True), ("__syncwarp();", True), ("float o = __shfl_xor_sync(~0u, x[i], 1);", False)],
)
def test_barriers_order_a_warp_s_memory_and_shuffles_do_not(between, ordered):
    body = f"s[i] = x[i]; {between} float z = s[i ^ 1]; if (blockIdx.x == 0) y[i] = z;"
    if ordered:
        return run_two(body)
    with pytest.raises(EmulatorError, match=r"race: it reads shared memory byte 4 .*and thread 1 writes it"):
        run_two(body)


def test_the_lanes_of_a_mask_are_ordered_and_no_others():
    body = "s[i] = x[i]; if (i % 32 < 16) {{ __syncwarp(0xffff); float z = s[i ^ {}]; if (blockIdx.x == 0) y[i] = z; }}"
    run_two(body.format(1))
    with pytest.raises(EmulatorError, match=r"race"):
        run_two(body.format(16))


def test_a_read_before_another_thread_s_write_is_a_race_too():
    with pytest.raises(EmulatorError, match=r"race: .*and thread \d+ (reads|writes)"):
        run_two("s[i] = x[i]; __syncthreads(); float z = s[63 - i]; s[i] = z; __syncthreads();")


def test_atomics_do_not_race_with_one_another_but_with_plain_writes():
    run_two("atomicAdd(y, x[i]);")
    with pytest.raises(EmulatorError, match=r"race: .*argument 1 .y., element 0"):
        run_two("atomicAdd(y, x[i]); if (i == 3) y[0] = 1;")


def test_a_copy_is_not_there_until_its_thread_has_waited():
    body = "if (i < 16) cp_async(s + 4 * i, x + 4 * i, 16); cp_async_commit(); WAIT; if (i < 16) y[i] = s[4 * i];"
    source = '#include "ptx.cuh"\n' + TWO.format(body)
    for wait, right in {"cp_async_wait<0>()": True, "cp_async_wait<1>()": False}.items():
        kernel = emulated_kernel(source.replace("WAIT", wait), "two")
        arguments = (1,), (64,), (torch.arange(64.0), torch.zeros(64))
        if right:
            kernel(*arguments)
        else:
            with pytest.raises(EmulatorError, match=r"before the asynchronous copy of thread 0"):
                kernel(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The shipped kernels


@pytest.mark.parametrize("generation", [80, 90])
def test_the_shipped_kernels_have_no_race_and_no_wrong_address(generation):
    def some(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=numbers).to(dtype)

    numbers = torch.Generator().manual_seed(0)
    starts, ends = torch.zeros(1, 70, dtype=torch.int32), torch.full((1, 70), 69, dtype=torch.int32)
    starts[:, 40:], ends[:, :40] = 40, 39
    with emulated(generation, shadow=True):
        for dtype in (torch.bfloat16, torch.float32):
            for v in (97, 1_000):
                x, targets = some(3, v, dtype=dtype), torch.tensor([5, v - 1, -1])
                _, log_z = launch.zloss_forward(x, targets)
                launch.zloss_backward_(torch.ones(3), torch.ones(3), x.clone(), targets, log_z)
                launch.zloss_overwrite(x, targets, 1e-3, 0.5, 163)
        q, k, v, d_out = some(1, 70, 2, 64), some(1, 70, 1, 64), some(1, 70, 1, 64), some(1, 70, 2, 64)
        out, lse2 = launch.attention(q, k, v, starts)
        launch.attention_backward(d_out, out, lse2, q, k, v, starts, ends)
        angles, weight, bias = some(1, 70, 64, dtype=torch.float32), *some(2, 2, 64, dtype=torch.float32)
        launch.qknorm_rope(q, angles, weight, bias, 1e-5)
        launch.qknorm_rope_backward(d_out, q, angles, weight, 1e-5)
        keys, values, positions = some(2, 1, 300, 64), some(2, 1, 300, 64), torch.tensor([[270], [3]])
        norm = some(6, 64, dtype=torch.float32), some(6, 64, dtype=torch.float32)
        queries = launch.decode_append(
            some(2, 1, 7, 64), some(2, 1, 64, dtype=torch.float32), norm, 1e-5, keys, values, positions
        )
        assert launch.decode_attention(queries, keys, values, positions, 300).isfinite().all()


def test_a_kernel_of_the_tests_is_watched_only_on_request():
    """The shadow costs twice the time, so that most tests do without."""
    found = emulator.compiled(SUM.replace("    __syncthreads();\n", ""), emulator.HEADERS, 80)
    with pytest.raises(EmulatorError, match=r"depends on the order of its threads: argument 1 .y., element 0 is"):
        emulator.start(found, "row_sum", (1,), 64, torch.ones(100), torch.zeros(1), 100)
