"""Checks of lesson 9, 09_kernels_on_a_gpu."""

import torch

from checks import Wrong, close, done, same
from nanochameleon.kernels.gpu.emulator.kernel import emulated_kernel
from nanochameleon.kernels.gpu.emulator.source import EmulatorError

TREE_SUM = """
extern "C" __global__ void tree_sum(const float* x, float* sum) {
  __shared__ float part[256];
  int t = threadIdx.x;
  part[t] = x[t];
  for (int half = blockDim.x / 2; half; half /= 2) {
    __syncthreads();
    if (t < half) part[t] += part[t + half];
  }
  if (t == 0) sum[0] = part[0];
}
"""


def _run(source: str, name: str, x: torch.Tensor) -> float:
    """The first number that a block with a thread for each number of x leaves."""
    y = torch.zeros(1)
    emulated_kernel(source, name)((1,), (len(x),), (x, y))
    return y.item()


def largest(answer):
    """The kernel finds the largest of 256 numbers, wherever it is, also of negative ones, and has no race."""
    source = done(answer() if callable(answer) else answer)
    if not isinstance(source, str):
        raise Wrong(f"my_largest returns the text of a kernel, not {source!r}")
    for at, shift in ((0, 0.0), (255, 0.0), (77, -1_000.0), (128, -1_000.0), (33, 5.0)):
        x = torch.randn(256, generator=torch.Generator().manual_seed(at)) + shift
        x[at] = shift + 100
        try:
            given = _run(source, "largest", x)
        except EmulatorError as mistake:
            raise Wrong(f"the emulator finds a mistake: {mistake}") from None
        if given != x.max():
            raise Wrong(f"with the largest, {x.max():g}, at x[{at}], y[0] is {given:g}")


def five_apart(answer):
    """The number of pieces of 32 bytes that hold floats 0, 5, 10 ... 155."""
    close(answer, len({5 * t * 4 // 32 for t in range(32)}), 0)


def lost_numbers(answer):
    """A block of so many threads runs without a mistake, and the tree's sum is wrong."""
    if not same(0.0, answer, float("inf")) or not 2 <= answer <= 256 or answer != int(answer):
        raise Wrong(f"the answer is a whole number from 2 to 256, not {answer!r}")
    answer = int(answer)
    x = torch.arange(1.0, answer + 1)
    given = _run(TREE_SUM, "tree_sum", x)
    if given == x.sum():
        raise Wrong(f"{answer} threads give {given:g}, which is right")
