"""A GPU for the tests that ask for one: the emulator."""

import shutil

import pytest

from nanochameleon.kernels.gpu.emulator import emulator


@pytest.fixture
def emulated_gpu():
    """Kernels run on the CPU, and dispatch takes tensors of the CPU for those of a GPU. Skips where g++ is missing."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing, so no CUDA kernel is run here")
    with emulator.emulated_gpu():
        yield
