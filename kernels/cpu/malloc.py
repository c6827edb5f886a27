"""Memory of a training step on a CPU: kept when it is freed, in pages of 2 MB. For Linux with glibc; elsewhere nothing.

A step allocates the same tensors over and over. By default glibc gives large ones back to the system, which clears
their pages anew each time; and with pages of 4 KB a processor, in a virtual machine above all, spends a tenth of a step
on looking up where they lie.
"""

import ctypes
import platform

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2  # mallopt's
HUGE_PAGE, MADV_HUGEPAGE, ROOM = 2**21, 14, 2**30


def tune_malloc() -> None:
    """From here on this process's memory grows by a GB of addresses at a time, which cost nothing until they are used,
    and never shrinks; the first two are in large pages. For a process that trains or measures."""
    libc = ctypes.CDLL(None) if platform.system() == "Linux" else None
    if not hasattr(libc, "mallopt") or not all(
        libc.mallopt(option, value) for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, ROOM))
    ):
        return
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    libc.free(libc.malloc(ROOM))  # the heap grows now
    with open("/proc/self/maps") as maps:
        heap = next((line.split()[0].split("-") for line in maps if line.rstrip().endswith("[heap]")), None)
    if heap:
        start, end = -(-int(heap[0], 16) // HUGE_PAGE) * HUGE_PAGE, int(heap[1], 16)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
