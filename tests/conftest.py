"""One hypothesis profile for every test: the same examples on every machine, no timing."""

import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Shrinking explains a failure; tests/mutants/, which expects failures, does without.
explaining = () if os.environ.get("NANOCHAMELEON_NO_SHRINK") else (Phase.shrink, Phase.explain)
settings.register_profile(
    "same",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.target, *explaining),
)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def threads():
    """A test that changes how many threads torch has (a bench takes one) changes the rounding of those after it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def emulated_gpu():
    """Kernels run on the CPU. Skips where g++ is missing."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing, so no CUDA kernel is run here")
    from nanochameleon.kernels.gpu.emulator import emulator

    with emulator.emulated():
        yield
