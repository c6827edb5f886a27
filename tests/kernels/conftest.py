"""A GPU for the tests that ask for one: the emulator."""

import shutil

import pytest

from nanochameleon.kernels.gpu.emulator.emulator import emulated


@pytest.fixture
def emulated_gpu():
    """Kernels run on the CPU. Skips where g++ is missing."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing, so no CUDA kernel is run here")
    with emulated():
        yield
