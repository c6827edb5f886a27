"""Runs the launches of gpu/launch.py without a GPU: g++ compiles the .cu files after emulator.h, tensors are the CPU's.

    with emulated(): ...    launches run kernels here

Every launch runs twice, in ascending and in descending order of threads (emulator.h says what that finds), and both
must leave the same bits in every tensor. Tensors have fences around them. The emulator shows neither speed nor that the
hardware follows the manual: `python -m nanochameleon.bench kernels --device cuda` checks every case before timing it.
"""

import ctypes
import hashlib
import mmap
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from nanochameleon.kernels import dispatch
from nanochameleon.kernels.caches import cache_folder
from nanochameleon.kernels.gpu import launch as gpu

HERE, HEADERS = Path(__file__).parent, Path(gpu.__file__).parent
ALIGNMENT = ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
COMPILE = ["g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-U_FORTIFY_SOURCE", *ALIGNMENT, "-x", "c++"]
PAGE = mmap.PAGESIZE
# extern __shared__ float memory[]; becomes a pointer to what the launch asked for
DYNAMIC_ARRAY = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w\s]*\w)\s+(\w+)\s*\[\s*\]\s*;")


class Address(int):
    """The address of a tensor."""


# argument kinds: the letter of emulator.h and the C type
KINDS = {
    int: ("i", ctypes.c_int32),
    gpu.Long: ("l", ctypes.c_int64),
    float: ("f", ctypes.c_float),
    Address: ("p", ctypes.c_uint64),
}


class EmulatorError(Exception):
    """A kernel did what a GPU would not survive."""


def run_compiler(command: list, text: str) -> str:
    """Return what g++ prints. Raises EmulatorError with the first error of a text that does not compile."""
    ran = subprocess.run(command, input=text, capture_output=True, text=True)
    if ran.returncode:
        lines = ran.stderr.splitlines()
        raise EmulatorError(f"g++ refuses it: {next((line for line in lines if 'error:' in line), ran.stderr)}")
    return ran.stdout


def compiled(source: str, folder: Path, generation: int) -> ctypes.CDLL:
    """Compile CUDA C, which may include files of `folder`, to a library with launch_NAME for each kernel."""
    headers = f'#include "{HERE}/emulator.h"\n#include "{HERE}/emulated_ptx.h"\n'
    headers += f'#define __CUDA_ARCH__ {generation}0\n#line 1 "kernel"\n'
    expand = [*COMPILE, f"-I{folder}", f"-I{HEADERS}", "-E", "-P", "-"]
    text = run_compiler(expand, headers + DYNAMIC_ARRAY.sub(r"\1* const \2 = (\1*)dynamic_shared();", source))
    names = re.findall(r'extern "C" __attribute__\(\(used\)\) void\s+(\w+)', text)
    launches = (
        'extern "C" const char* launch_NAME(const char* kinds, const int* sizes, void** arguments) {'
        " return launch(NAME, kinds, sizes, arguments); }"
    )
    text += "".join(launches.replace("NAME", name) + "\n" for name in names)
    folder = cache_folder("NANOCHAMELEON_CACHE", os.environ.get("NANOCHAMELEON_CACHE", "")) or Path(tempfile.mkdtemp())
    digest = hashlib.sha256((text + " ".join(COMPILE)).encode()).hexdigest()[:16]
    path = folder / f"emulated-{digest}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            new = Path(aside) / "new.so"
            run_compiler([*COMPILE, "-shared", "-fPIC", "-", "-o", new], text)
            new.replace(path)
    return ctypes.CDLL(str(path))


@cache
def library(file: str, generation: int) -> ctypes.CDLL:
    return compiled((gpu.KERNELS / f"{file}.cu").read_text(), HEADERS, generation)


def contents(x: torch.Tensor) -> bytes:
    return x.detach().view(-1).view(torch.uint8).numpy().tobytes()


class Fence:
    """A copy of a tensor between two closed pages: touching them ends a launch."""

    def __init__(self, x: torch.Tensor):
        self.x, self.size = x, x.numel() * x.element_size()
        inside = -(-(self.size + 15) // PAGE) * PAGE
        self.memory = mmap.mmap(-1, inside + 2 * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for page in (first, first + PAGE + inside):
            if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, 0):
                raise OSError("mprotect")
        slack = -(self.size + x.data_ptr()) % 16  # after the end, for the tensor's own alignment
        self.at, self.end = PAGE + inside - self.size - slack, PAGE + inside
        self.address = first + self.at

    def fill(self) -> None:
        self.memory[PAGE : self.end] = b"\xff" * (self.end - PAGE)
        self.memory[self.at : self.at + self.size] = contents(self.x)

    def contents(self) -> bytes:
        around = self.memory[PAGE : self.at] + self.memory[self.at + self.size : self.end]
        if around.strip(b"\xff"):
            raise EmulatorError("the kernel writes outside a tensor")
        return self.memory[self.at : self.at + self.size]


def run(found: ctypes.CDLL, name: str, sizes: tuple, arguments: list) -> None:
    """Run one launch. arguments: addresses, or numbers as gpu.start takes them. Raises EmulatorError."""
    values = [KINDS[type(x)][1](x) for x in arguments]
    kinds = "".join(KINDS[type(x)][0] for x in arguments)
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    function = getattr(found, f"launch_{name}")
    function.restype = ctypes.c_char_p
    if problem := function(kinds.encode(), (ctypes.c_int * 6)(*sizes), addresses):
        raise EmulatorError(f"{name}: {problem.decode()}")


def start(found: ctypes.CDLL, name: str, grid: tuple, block: int, *arguments, shared: int = 0) -> None:
    """As gpu.start. Tensors get what both orders of threads leave in them."""
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    assert all(x.is_contiguous() for x in tensors)
    fences = {x.data_ptr(): Fence(x) for x in tensors}
    values = [
        Address(0) if x is None else Address(fences[x.data_ptr()].address) if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]
    outcomes = []
    for descending in (False, True):
        for fence in fences.values():
            fence.fill()
        run(found, name, (*grid, *(1,) * (3 - len(grid)), block, shared, descending), values)
        outcomes.append([fence.contents() for fence in fences.values()])
    if outcomes[0] != outcomes[1]:
        raise EmulatorError(f"{name}: its result depends on the order of its threads")
    for fence, content in zip(fences.values(), outcomes[0], strict=True):
        if content != contents(fence.x):  # a tensor that is only read is not touched, for autograd
            fence.x.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))


@contextmanager
def emulated(generation: int = 80) -> Iterator[None]:
    """Inside, launches run on the CPU as on a GPU of this generation: 80 or 90. Dispatch takes the CPU for that GPU."""
    before = gpu.start, gpu.shared_kilobytes, dispatch.why_cuda_unavailable
    gpu.start = lambda file, *rest, **more: start(library(file, generation), *rest, **more)
    gpu.shared_kilobytes = lambda device: {80: 163, 90: 227}[generation]
    dispatch.why_cuda_unavailable = lambda op, device, dtype: None
    try:
        yield
    finally:
        gpu.start, gpu.shared_kilobytes, dispatch.why_cuda_unavailable = before
