"""Compiles a kernel with a cache on disk, and runs its tasks on as many threads as torch has.

Kernels release the interpreter's lock, so Python's own threads do: no second OpenMP beside torch's, nothing that a
forked process could inherit half, and one compiled version for any number of threads.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch


@contextmanager
def cache_folder(function: Callable) -> Iterator[None]:
    """Inside, Numba keeps what it compiles in a folder named by all sources beside this one and beside the function's.

    Its own cache looks at the function's file alone, and would not see that what it calls was edited.
    """
    from numba import config

    here, before = Path(__file__).parent, config.CACHE_DIR
    folders = sorted({here, Path(function.__code__.co_filename).parent})
    sources = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py"))]
    digest = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    config.CACHE_DIR = str((Path(before) if before else here / "__pycache__") / digest)  # read by njit, now
    try:
        yield
    finally:
        config.CACHE_DIR = before


def kernel(function: Callable) -> Callable:
    """Numba's njit, without the interpreter's lock, kept on disk."""
    from numba import njit

    with cache_folder(function):
        return njit(cache=True, nogil=True)(function)


def callback(function: Callable, signature) -> Callable:
    """Numba's cfunc, kept on disk: compiled now, and then called by other compiled code at its `address`."""
    from numba import cfunc

    with cache_folder(function):
        return cfunc(signature, cache=True)(function)


@cache
def pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One pool for each number of threads, of this process: a forked child starts its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernel")


def split(n: int, parts: int) -> list[tuple[int, int]]:
    """[0, n) in at most `parts` stretches, as equal as can be, none empty."""
    ends = [n * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(ends) if a < b]


_own = threading.local()


def scratch(floats: int) -> int:
    """The address of this thread's float32 scratch, kept between calls: fresh pages cost more than the work."""
    if getattr(_own, "buffer", None) is None or _own.buffer.numel() < floats:
        _own.buffer = torch.empty(floats)
    return _own.buffer.data_ptr()


def run(task: Callable[[int, int, int], None], n: int, parts: int | None = None) -> None:
    """Calls task(part, first, last) on stretches of [0, n), `parts` of them; the caller's thread works too.

    None is a few for each thread, so that one that is held up leaves the rest to the others.
    """
    threads = min(torch.get_num_threads(), n)
    stretches = iter(list(enumerate(split(n, parts or (4 * threads if threads > 1 else 1)))))

    def work() -> None:
        for part, (first, last) in stretches:
            task(part, first, last)

    others = [pool(threads - 1, os.getpid()).submit(work) for _ in range(1, threads)]
    try:
        work()
    finally:  # whatever has happened here, the others still write into the caller's tensors
        failures = [other.exception() for other in others]
    for failure in failures:
        if failure is not None:
            raise failure
