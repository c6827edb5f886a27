"""Compiles CUDA C to cubins with NVRTC alone: no GPU, driver or toolkit is needed, so tests can compile too.

The library comes from PyPI (nvidia-cuda-nvrtc) and is called through ctypes. Cubins are cached on disk, named by
source, headers, architecture and compiler. launch.py runs them.
"""

import ctypes
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from nanochameleon.kernels.caches import cache_folder, say

# On Linux and on Windows.
LIBRARIES = "*/lib/libnvrtc.so.*", "*/bin/**/nvrtc64_*.dll"
BUILTINS = "libnvrtc-builtins.so.*", "nvrtc-builtins64_*.dll"


@dataclass(frozen=True)
class Cubin:
    code: bytes
    log: str  # of the assembler, with registers and spills of each kernel

    def spills(self) -> dict[str, int]:
        """Bytes of registers that each kernel spills to memory."""
        kernels = re.split(r"Compiling entry function '", self.log)[1:]
        stores = (re.search(r"(\d+) bytes spill stores", part) for part in kernels)
        return {part.split("'")[0]: int(found[1]) for part, found in zip(kernels, stores, strict=True)}


def library_file(cuda: str | None) -> Path:
    """Find NVRTC in the packages of `nvidia` for torch.version.cuda, such as "12.6"; None takes the newest.

    Raises ModuleNotFoundError, naming the missing package.
    """
    nvidia = find_spec("nvidia")
    folders = [Path(place) for place in nvidia.submodule_search_locations] if nvidia else []
    found = {}
    for path in (path for folder in folders for pattern in LIBRARIES for path in sorted(folder.glob(pattern))):
        if version := re.fullmatch(r"libnvrtc\.so\.(\d+)|nvrtc64_(\d+)\d_0\.dll", path.name):
            found.setdefault(int(version[1] or version[2]), path)  # the first folder wins, as in an import
    wanted = int(cuda.split(".")[0]) if cuda else max(found, default=13)
    if wanted not in found:
        package = f"nvidia-cuda-nvrtc{'' if wanted >= 13 else f'-cu{wanted}'}"
        raise ModuleNotFoundError(f"NVIDIA's runtime compiler for CUDA {wanted} is missing: pip install {package}")
    return found[wanted]


@cache
def library() -> ctypes.CDLL:
    """Load NVRTC. Raises ModuleNotFoundError if there is none for torch's CUDA."""
    path = library_file(torch.version.cuda)
    for pattern in BUILTINS:  # some releases search only the system's folders for it
        for builtins in path.parent.glob(pattern):
            ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(path))


def version() -> str:
    """Such as "13.0". Raises ModuleNotFoundError as library() does."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _text(size_of: str, get: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(library(), size_of)(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library(), get)(program, buffer)
    return buffer.raw


def headers() -> dict[str, str]:
    """The headers that a .cu file may include, by name."""
    return {path.name: path.read_text() for path in sorted(Path(__file__).parent.glob("*.cuh"))}


def compile_source(source: str, name: str, architecture: str) -> Cubin:
    """Compile one .cu file. Raises RuntimeError with the compiler's messages."""
    program, included = ctypes.c_void_p(), headers()
    strings = ctypes.c_char_p * len(included)
    names, texts = (strings(*(x.encode() for x in part)) for part in (included, included.values()))
    library().nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), len(included), texts, names)
    options = [f"-arch={architecture}", "-std=c++17", "--ptxas-options=-v"]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = library().nvrtcCompileProgram(program, len(options), array)
    log = _text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program).decode().rstrip("\0")
    if status:
        raise RuntimeError(f"{name} does not compile for {architecture}:\n{log}")
    code = _text("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program)
    library().nvrtcDestroyProgram(ctypes.byref(program))
    return Cubin(code, log)


def cubin_file(source: Path, architecture: str) -> Path:
    """The cubin of a .cu file, compiled unless it is in the cache (NANOCHAMELEON_CACHE, or see caches.py)."""
    text = source.read_text()
    key = f"{text}{headers()}{architecture}{version()}"
    requested = os.environ.get("NANOCHAMELEON_CACHE", "")
    folder = cache_folder("NANOCHAMELEON_CACHE", requested) or Path(tempfile.mkdtemp())  # CuPy loads only files
    path = folder / f"{source.stem}-{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.cubin"
    return path if path.exists() else store(compile_source(text, source.name, architecture).code, path)


def store(code: bytes, path: Path) -> Path:
    """Write the cubin and return its path: another one, in a temporary folder, if this disk is full."""
    aside = path.with_suffix(f".{os.getpid()}")
    try:
        aside.write_bytes(code)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        say(f"compiled kernels are not kept: {path.parent} cannot be written ({error.strerror})")
        path = Path(tempfile.mkdtemp()) / path.name
        path.write_bytes(code)
    return path
