"""A CUDA kernel that runs on the CPU and is called as cupy.RawKernel is."""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import torch

from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.gpu.emulator import emulator
from nanochameleon.kernels.gpu.emulator.emulator import EmulatorError

NUMBERS = {np.int32: int, np.uint32: int, np.int64: gpu.Long, np.uint64: gpu.Long, np.float32: float}


def emulated_kernel(path_or_source: Path | str, name: str, generation: int = 80):
    """Compile a kernel `extern "C" __global__ void name(...)` of a .cu file, or of a source text.

    The result has the call of cupy.RawKernel: kernel((blocks,), (threads,), (x, np.int32(n), ...), shared_mem=0). Arrays
    are NumPy's or tensors of the CPU. Raises EmulatorError with a sentence for what a GPU would not survive.
    """
    if shutil.which("g++") is None:
        raise EmulatorError("the emulator compiles kernels with g++, which is not installed: install it, or use a GPU")
    found = library(path_or_source, generation)
    if not hasattr(found, f"launch_{name}"):
        raise EmulatorError(f'there is no kernel {name}: the file must hold extern "C" __global__ void {name}(...)')

    def kernel(grid: tuple, block: tuple, arguments: tuple, *, shared_mem: int = 0) -> None:
        values = [argument(k, x) for k, x in enumerate(arguments)]
        emulator.start(found, name, tuple(grid), threads_of(block), *values, shared=shared_mem)

    return kernel


@cache
def library(path_or_source: Path | str, generation: int):
    is_source = isinstance(path_or_source, str) and "__global__" in path_or_source
    folder = emulator.HEADERS if is_source else Path(path_or_source).parent
    return emulator.compiled(path_or_source if is_source else Path(path_or_source).read_text(), folder, generation)


def threads_of(block: tuple) -> int:
    """Threads of a block; raises EmulatorError for a block that is not a row of whole warps."""
    threads, *others = block
    if any(n != 1 for n in others) or threads % 32 or not 32 <= threads <= 1024:
        raise EmulatorError(
            f"a block of {block} threads is not emulated: take one dimension, 32 to 1,024 in steps of 32"
        )
    return threads


def argument(k: int, x) -> torch.Tensor | int | float:
    """Argument k as emulator.start takes it."""
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    if isinstance(x, torch.Tensor):
        if x.device.type != "cpu" or not x.is_contiguous():
            raise EmulatorError(f"argument {k} must be a contiguous array on the CPU")
        return x
    if type(x) not in NUMBERS:
        hint = "np.int32(n) or np.float32(x), as the kernel declares it"
        raise EmulatorError(f"argument {k} is a {type(x).__name__}, which has no size in C: write {hint}")
    return NUMBERS[type(x)](x)
