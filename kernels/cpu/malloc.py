"""Keep the memory of a training step: freed memory stays with the process, in pages of 2 MB. Linux with glibc only.

A step allocates the same tensors over and over. By default glibc returns large ones to the system, which must clear
their pages each time. With pages of 4 KB a processor, above all in a virtual machine, spends a tenth of a step on
address translation.
"""

import ctypes
import platform

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2  # mallopt's parameters
OPTIONS = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**30}  # all on the heap, never shrink, grow by 1 GB
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14


def tune_malloc() -> None:
    """Tune this process's malloc, for programs that train or measure. Elsewhere than on glibc, do nothing.

    The heap grows by 1 GB of addresses at a time, which cost nothing until used. The first GB is in huge pages.
    """
    libc = ctypes.CDLL(None) if platform.system() == "Linux" else None
    if not hasattr(libc, "mallopt") or not all(libc.mallopt(*option) for option in OPTIONS.items()):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(libc.malloc(OPTIONS[TOP_PAD]))  # the heap grows now
    with open("/proc/self/maps") as maps:
        heap = next((line.split()[0].split("-") for line in maps if line.rstrip().endswith("[heap]")), None)
    if heap:
        start, end = -(-int(heap[0], 16) // HUGE_PAGE) * HUGE_PAGE, int(heap[1], 16)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
