"""Memory that is kept: a process of its own, since it cannot be undone."""

import platform
import subprocess
import sys

import pytest

from nanochameleon.kernels.cpu import malloc

FAULTS = """
import resource, torch
from nanochameleon.kernels.cpu.malloc import tune_malloc
tune_malloc()
def touch():
    for size in (3, 11, 40, 7):  # MB
        torch.ones(size, 2**18)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep their own counsel")
def test_memory_that_was_freed_is_not_cleared_again():
    """61 MB, ten times: 156,000 pages of 4 KB without it, the largest ones at least."""
    faults = int(subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout)
    assert faults < 1_000


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: pytest.fail("looked for a C library"))
    malloc.tune_malloc()
