"""A CUDA kernel that runs on the CPU and is called as cupy.RawKernel is."""

import math
from pathlib import Path

import numpy as np
import torch

from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.gpu.emulator import emulator
from nanochameleon.kernels.gpu.emulator.source import Library, NotLaunched

NUMBERS = {np.int32: int, np.uint32: int, np.int64: gpu.Long, np.uint64: gpu.Long, np.float32: float}


def emulated_kernel(path_or_source: Path | str, name: str, generation: int = 80):
    """Compile a kernel `extern "C" __global__ void name(...)` of a .cu file, or of a source text.

    The result has the call of cupy.RawKernel: kernel((blocks,), (threads,), (x, np.int32(n), ...), shared_mem=0).
    Arrays are NumPy's or tensors of the CPU. Raises EmulatorError with a sentence for what a GPU would not survive.
    """
    found = library(path_or_source, generation)
    if name not in found.parameters:
        raise NotLaunched(f'there is no kernel {name}: the file must hold extern "C" __global__ void {name}(...)')

    def kernel(grid: tuple, block: tuple, arguments: tuple, *, shared_mem: int = 0) -> None:
        values = [argument(k, x) for k, x in enumerate(arguments)]
        check_sizes(grid, block, shared_mem)
        emulator.start(found, name, tuple(grid), tuple(block), *values, shared=shared_mem)

    return kernel


def library(path_or_source: Path | str, generation: int) -> Library:
    """A file is read at each call: it may have been edited."""
    if isinstance(path_or_source, str) and "__global__" in path_or_source:
        return emulator.compiled(path_or_source, emulator.HEADERS, generation, shadow=True)
    path = Path(path_or_source)
    return emulator.compiled(path.read_text(), path.parent, generation, shadow=True, file=path.name)


def check_sizes(grid: tuple, block: tuple, shared_mem: int) -> None:
    """Raise EmulatorError for a launch that no GPU takes."""
    for what, sizes, most in ("grid", grid, 2**31 - 1), ("block", block, 1_024):
        if not 1 <= len(sizes) <= 3 or min(sizes) < 1 or math.prod(sizes) > most:
            raise NotLaunched(f"a {what} has one to three sizes of at least 1 and at most {most:,} in all, not {sizes}")
    if not 0 <= shared_mem <= 227 * 1024:
        raise NotLaunched(f"a block has at most 227 KB of shared memory, not {shared_mem:,} bytes")


def argument(k: int, x) -> torch.Tensor | int | float | None:
    """Argument k as emulator.start takes it."""
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    if x is None:
        return None
    if isinstance(x, torch.Tensor):
        if x.device.type != "cpu" or not x.is_contiguous():
            raise NotLaunched(f"argument {k} must be a contiguous array on the CPU")
        return x
    if type(x) not in NUMBERS:
        hint = "np.int32(n) or np.float32(x), as the kernel declares it"
        raise NotLaunched(f"argument {k} has Python's type {type(x).__name__}, which has no size in C: write {hint}")
    return NUMBERS[type(x)](x)
