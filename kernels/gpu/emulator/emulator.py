"""Runs the launches of gpu/launch.py without a GPU: g++ compiles the .cu files after emulator.h, tensors are the CPU's.

    with emulated(): ...    launches run kernels here

Every launch runs twice, in ascending and in descending order of threads (emulator.h says what that finds), and both
must leave the same bits in every tensor. Tensors have fences around them. With a shadow (shadow.h) each access to
memory is compared with those of the other threads. The emulator shows neither speed nor that the hardware follows the
manual: `python -m nanochameleon.bench kernels --device cuda` checks every case before timing it.
"""

import ctypes
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from nanochameleon.kernels import dispatch
from nanochameleon.kernels.caches import cache_folder
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.gpu.emulator.fence import Fence, Range
from nanochameleon.kernels.gpu.emulator.source import EmulatorError, Library, NotLaunched, run_tool

HERE, HEADERS = Path(__file__).parent, Path(gpu.__file__).parent
CHECKS = ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
COMPILE = [
    "g++",
    "-std=gnu++17",
    "-O1",
    "-fno-strict-aliasing",
    "-w",
    "-U_FORTIFY_SOURCE",
    "-fPIC",
    "-fno-gnu-unique",
    "-fstack-clash-protection",  # a large array touches each page of its stack, the closed one, too
    *CHECKS,
    "-x",
    "c++",
]
LINK = ["g++", "-shared", "-Wl,-Bsymbolic"]  # a kernel named as one of libc's functions is not replaced by it
SHADOW = ["-DSHADOW", "-g1", "-fsanitize=thread"]  # the calls before each access; shadow.h is the library they call
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


@cache
def compiled(source: str, folder: Path, generation: int, shadow: bool = False, file: str = "kernel") -> Library:
    """Compile CUDA C, which may include files of `folder`, to a library with launch_NAME for each kernel."""
    flags = [*COMPILE, *(SHADOW if shadow else ())]
    text = f'#include "{HERE}/emulator.h"\n#include "{HERE}/emulated_ptx.h"\n'
    text += f'#define __CUDA_ARCH__ {generation}0\n#line 1 "{file}"\n'
    text += DYNAMIC_ARRAY.sub(r"\1* const \2 = (\1*)dynamic_shared();", source)
    text = run_tool([*flags, f"-I{folder}", f"-I{HEADERS}", "-E", "-"], text)
    found = re.findall(r'extern "C" __attribute__\(\(used\)\) void\s+(\w+)\s*\(([^)]*)\)', text)
    launches = (
        'extern "C" const char* launch_NAME(const char* kinds, const int* sizes, void** arguments, Range* tensors) {'
        " return launch(NAME, kinds, sizes, arguments, tensors); }"
    )
    text += "".join(launches.replace("NAME", name) + "\n" for name, _ in found)
    path = built(text, flags)
    parameters = {
        name: [p.split()[-1].strip("*&") for p in declared.split(",") if p.strip()] for name, declared in found
    }
    return Library(ctypes.CDLL(str(path)), path, parameters, file, source.splitlines())


def built(text: str, flags: list[str]) -> Path:
    """Return the library of a preprocessed text, from the cache if it is there."""
    folder = cache_folder("NANOCHAMELEON_CACHE", os.environ.get("NANOCHAMELEON_CACHE", "")) or Path(tempfile.mkdtemp())
    path = folder / f"emulated-{hashlib.sha256((text + ' '.join([*flags, *LINK])).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            parts, new = f"{aside}/new.o", Path(aside) / "new.so"
            run_tool([*flags, "-c", "-", "-o", parts], text)
            run_tool([*LINK, parts, "-o", new, "-ldl"])
            new.replace(path)
    return path


@cache
def library(file: str, generation: int, shadow: bool) -> Library:
    path = gpu.KERNELS / f"{file}.cu"
    return compiled(path.read_text(), HEADERS, generation, shadow, path.name)


def run(library: Library, name: str, sizes: tuple, arguments: list, fences: list[Fence]) -> None:
    """Run one launch. arguments: addresses, or numbers as gpu.start takes them. Raises EmulatorError."""
    values = [KINDS[type(x)][1](x) for x in arguments]
    kinds = "".join(KINDS[type(x)][0] for x in arguments)
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    function = getattr(library.code, f"launch_{name}")
    function.restype = ctypes.c_char_p
    ranges = (Range * len(fences))(*(fence.range for fence in fences))
    if problem := function(kinds.encode(), (ctypes.c_int * 9)(*sizes, len(fences)), addresses, ranges):
        kind = NotLaunched if problem.startswith(b"the call gives") else EmulatorError
        raise kind(f"{name}: {library.explain(problem.decode(), name)}")


def start(library: Library, name: str, grid: tuple, block: int | tuple, *arguments, shared: int = 0) -> None:
    """As gpu.start. Tensors get what both orders of threads leave in them."""
    tensors = {x.data_ptr(): (k, x) for k, x in reversed(list(enumerate(arguments))) if isinstance(x, torch.Tensor)}
    assert all(x.is_contiguous() for _, x in tensors.values())
    fences = {address: Fence(x, k) for address, (k, x) in tensors.items()}
    values = [
        Address(0) if x is None else Address(fences[x.data_ptr()].address) if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]
    sizes, outcomes = (*three(grid), *three(block if isinstance(block, tuple) else (block,)), shared), []
    for descending in (False, True):
        for fence in fences.values():
            fence.fill()
        run(library, name, (*sizes, descending), values, list(fences.values()))
        outcomes.append([fence.contents() for fence in fences.values()])
    for fence, one, other in zip(fences.values(), *outcomes, strict=True):
        if one != other:
            differ = library.explain(fence.first_difference(one, other), name)
            raise EmulatorError(f"{name}: its result depends on the order of its threads: {differ}")
        fence.keep(one)


def three(sizes: tuple) -> tuple:
    return (*sizes, *(1,) * (3 - len(sizes)))


@contextmanager
def emulated(generation: int = 80, shadow: bool = False) -> Iterator[None]:
    """Inside, launches run on the CPU as on a GPU of this generation: 80 or 90. Dispatch takes the CPU for that GPU."""
    before = gpu.start, gpu.shared_kilobytes, dispatch.why_cuda_unavailable
    gpu.start = lambda file, *rest, **more: start(library(file, generation, shadow), *rest, **more)
    gpu.shared_kilobytes = lambda device: {80: 163, 90: 227}[generation]
    dispatch.why_cuda_unavailable = lambda op, device, dtype: None
    try:
        yield
    finally:
        gpu.start, gpu.shared_kilobytes, dispatch.why_cuda_unavailable = before
