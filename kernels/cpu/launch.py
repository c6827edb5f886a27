"""Compiles a kernel with a cache on disk, and runs it on torch's own threads.

Torch's OpenMP threads wait for work in a loop that keeps their cores busy. Threads of our own would have to share those
cores, and on two cores a second one brought nothing; so kernels run on torch's (`GOMP_parallel`, which its library
exports), where a call costs a few microseconds. Python's threads step in where there are none to borrow: on systems
with another OpenMP, and in a forked process, which has inherited only the promise of its parent's threads.
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

from nanochameleon.kernels.caches import cache_folder, say
from nanochameleon.kernels.dispatch import MAIN_PID

KERNELS = Path(__file__).parents[1]
_compiling = threading.RLock()  # the folder is a setting of the whole process


def sources(function: Callable) -> list[Path]:
    """Every file that compiled code of this function may come from."""
    found = {*KERNELS.rglob("*.py"), *Path(function.__code__.co_filename).parent.glob("*.py")}
    return sorted(found)


def compiled(function: Callable, integers: int):
    """A C function of int64s without a result, kept on disk in a folder named by every Python source of kernels/ and of
    the function's own folder.

    Numba's own cache looks at the function's file alone, and would not see that what it calls was edited. Where nothing
    can be kept, or what is kept cannot be read, it is compiled for this process alone.
    """
    from numba import config
    from numba.core.errors import NumbaError

    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources(function))).hexdigest()[:16]
    with _compiling:
        before = config.CACHE_DIR
        kept = cache_folder("NUMBA_CACHE_DIR", before, KERNELS / "__pycache__", digest)
        try:
            config.CACHE_DIR = str(kept or before)  # read by cfunc, now
            return native(function, integers, kept is not None)
        except NumbaError:
            raise
        except Exception as error:  # a full disk, or a pickle that was cut, which raises anything
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
    """kernel(job, part, first, last, scratch), compiled when it first runs; see region_numba.py."""

    def __init__(self, function: Callable):
        self.function = function

    @cached_property
    def compiled(self):
        return compiled(self.function, 5)


@cache
def region() -> Callable[[int], None]:
    """parallel_for.parallel_for, which leaves the interpreter's lock alone while it runs."""
    from nanochameleon.kernels.cpu import parallel_for

    native = compiled(parallel_for.parallel_for, 1)
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64)(native.address)
    function.keep = native
    return function


@cache
def openmp() -> Callable | None:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP that torch has loaded, or None."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # not there; no such thing as "the process's symbols" (Windows)
        return None
    function.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    function.restype = None
    return function


@cache
def pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One pool for each number of threads, of this process: a forked child starts its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernel")


def run_on_threads(threads: int, p: int) -> None:
    """Runs the region at p on this many threads, the caller's among them, and returns when all are done."""
    if threads == 1:
        region()(p)
    elif (parallel := openmp()) and os.getpid() == MAIN_PID:
        parallel(ctypes.cast(region(), ctypes.c_void_p), p, threads, 0)
    else:
        others = [pool(threads - 1, os.getpid()).submit(region(), p) for _ in range(1, threads)]
        region()(p)
        for other in others:
            other.result()


_own = threading.local()


def scratch(floats: int) -> int:
    """The address of this thread's float32 scratch, kept between calls: fresh pages cost more than the work."""
    if getattr(_own, "buffer", None) is None or _own.buffer.numel() < floats:
        _own.buffer = torch.empty(floats, dtype=torch.float32, device="cpu")
    return _own.buffer.data_ptr()


@cache
def _form(job: type) -> struct.Struct:
    return struct.Struct("".join("f4x" if kind is float else "q" for kind in job.__annotations__.values()))


def pack_args(job: tuple) -> ctypes.Array:
    """A NamedTuple of ints and floats in memory, eight bytes each."""
    return ctypes.create_string_buffer(_form(type(job)).pack(*job))


def run(function: kernel, job: tuple, n: int, floats: int = 0, parts: int | None = None) -> None:
    """Runs a kernel on stretches of [0, n), `parts` of them, with `floats` of scratch for each thread.

    None is a few for each thread, so that one that is held up leaves the rest to the others.
    """
    if n == 0:
        return
    threads = torch.get_num_threads() if n > 1 else 1
    parts, floats = min(n, parts or (4 * threads if threads > 1 else 1)), -(-floats // 64) * 64  # whole cache lines
    words, memory = pack_args(job), scratch(floats * threads)
    header = struct.pack("8q", function.compiled.address, ctypes.addressof(words), n, parts, memory, 4 * floats, 0, 0)
    whole = ctypes.create_string_buffer(header)
    run_on_threads(threads, ctypes.addressof(whole))
