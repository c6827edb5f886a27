"""Compile a kernel, keep it on disk, and run it on torch's own threads.

Torch's OpenMP threads spin while they wait for work. Threads of our own would have to share cores with them, and on two
cores a second thread brought nothing. So kernels run on torch's threads through `GOMP_parallel`, which torch's library
exports; a call costs a few microseconds. Python threads take over where torch has none to lend: with another OpenMP
library, and in a forked process, which does not inherit its parent's threads.
"""

import ctypes
import hashlib
import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.kernels.caches import cache_folder, say
from nanochameleon.kernels.dispatch import MAIN_PID

KERNELS = Path(__file__).parents[1]
_compiling = threading.RLock()  # config.CACHE_DIR belongs to the whole process


def sources(function: Callable) -> list[Path]:
    """Every file whose edit makes the compiled code of this function stale: kernels/, and the function's own folder."""
    found = {*KERNELS.rglob("*.py"), *Path(function.__code__.co_filename).parent.glob("*.py")}
    return sorted(found)


def compiled(function: Callable, integers: int):
    """A C function of int64s that returns nothing, kept in a folder named by the hash of all `sources`.

    Numba's own cache compares only the function's file, and would miss an edit of what it calls. Where no folder can be
    written, or a cached file cannot be read, the function is compiled for this process alone.
    """
    from numba import config
    from numba.core.errors import NumbaError

    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources(function))).hexdigest()[:16]
    with _compiling:
        before = config.CACHE_DIR
        kept = cache_folder("NUMBA_CACHE_DIR", before, KERNELS / "__pycache__", digest)
        try:
            config.CACHE_DIR = str(kept or before)  # cfunc reads it when it is called
            return native(function, integers, kept is not None)
        except NumbaError:
            raise
        except Exception as error:  # a full disk, or a truncated pickle, which can raise anything
            if kept is None:
                raise
            say(f"the compiled kernels in {kept} cannot be used ({type(error).__name__}: {error}): delete that folder")
            return native(function, integers, False)
        finally:
            config.CACHE_DIR = before


def native(function: Callable, integers: int, keep: bool):
    from numba import cfunc, types

    return cfunc(types.void(*[types.int64] * integers), cache=keep, error_model="numpy")(function)


class kernel:
    """Decorates kernel(args, chunk, first, last, scratch), see parallel_for.py; compiled when it first runs."""

    def __init__(self, function: Callable):
        self.function = function

    @cached_property
    def compiled(self):
        return compiled(self.function, 5)


@cache
def native_parallel_for() -> Callable[[int], None]:
    """`parallel_for` as a C function. A call through ctypes releases the interpreter's lock."""
    from nanochameleon.kernels.cpu.parallel_for import parallel_for

    native = compiled(parallel_for, 1)
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64)(native.address)
    function.keep = native
    return function


@cache
def openmp() -> Callable | None:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP library that torch has loaded, or None."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # no such symbol; no CDLL(None) on Windows
        return None
    function.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    function.restype = None
    return function


@cache
def pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One pool for each number of threads and each process: a forked child starts its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernel")


def run_on_threads(threads: int, header: int) -> None:
    """Run `parallel_for` on this many threads, the caller's included. Returns when all are done."""
    run_loop = native_parallel_for()
    if threads == 1:
        run_loop(header)
    elif (parallel := openmp()) and os.getpid() == MAIN_PID:
        parallel(ctypes.cast(run_loop, ctypes.c_void_p), header, threads, 0)
    else:
        others = [pool(threads - 1, os.getpid()).submit(run_loop, header) for _ in range(1, threads)]
        run_loop(header)
        for other in others:
            other.result()


_own = threading.local()


def scratch(floats: int) -> int:
    """Address of this thread's float32 scratch. It is kept between calls: fresh pages cost more than the work."""
    if getattr(_own, "buffer", None) is None or _own.buffer.numel() < floats:
        _own.buffer = torch.empty(floats, dtype=torch.float32, device="cpu")
    return _own.buffer.data_ptr()


def make_args(kind: type, tensors: dict[str, Tensor | None], **numbers: float) -> tuple:
    """A KernelArgs of this kind: tensors as addresses, and numbers. None and fields that are not given become 0."""
    addresses = {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}
    return kind(**(dict.fromkeys(kind._fields, 0) | addresses | numbers))


@cache
def _layout(kind: type) -> struct.Struct:
    return struct.Struct("".join("f4x" if field is float else "q" for field in kind.__annotations__.values()))


def pack_args(args: tuple) -> ctypes.Array:
    """A NamedTuple of ints and floats in memory, eight bytes each."""
    return ctypes.create_string_buffer(_layout(type(args)).pack(*args))


def run(function: kernel, args: tuple, n: int, floats: int = 0, chunks: int | None = None) -> None:
    """Run a kernel on [0, n), cut into chunks, with `floats` of scratch for each thread.

    By default each thread gets about four chunks, so that a slow thread leaves the rest to the others.
    """
    if n == 0:
        return
    threads = torch.get_num_threads() if n > 1 else 1
    chunks, floats = min(n, chunks or (4 * threads if threads > 1 else 1)), -(-floats // 64) * 64  # whole cache lines
    packed, memory = pack_args(args), scratch(floats * threads)
    words = function.compiled.address, ctypes.addressof(packed), n, chunks, memory, 4 * floats, 0, 0
    header = ctypes.create_string_buffer(struct.pack("8q", *words))  # parallel_for.HEADER
    run_on_threads(threads, ctypes.addressof(header))
