"""A GPU for the tests that ask for one: the emulator."""

import pytest
from emulator import emulated


@pytest.fixture
def emulated_gpu(monkeypatch):
    """gpu.py launches here, and dispatch takes tensors of the CPU for those of a GPU."""
    emulated(monkeypatch)
    monkeypatch.setattr("nanochameleon.kernels.dispatch.why_not_cuda", lambda op, device, dtype: None)
