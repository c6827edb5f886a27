"""Modes of the whole process: deterministic algorithms on a GPU, and that sampling does without them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanochameleon.config import ParallelConfig
from nanochameleon.parallel.compile import eager


def make_deterministic(parallel: ParallelConfig, device: torch.device) -> None:
    """Let a GPU repeat a run bit for bit, if parallel.deterministic says so. A CPU does so by itself: nothing changes.

    From here on torch raises RuntimeError at an operation that has no deterministic algorithm.
    """
    if parallel.deterministic and device.type == "cuda":
        # cuBLAS reads it when it starts, at the first matmul
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False  # which would choose algorithms by their speed
        torch.use_deterministic_algorithms(True)
        # torch would write NaN over each new tensor: a pass over memory that nobody reads before it is written
        torch.utils.deterministic.fill_uninitialized_memory = False


@contextmanager
def sampling_mode() -> Iterator[None]:
    """Sample from a model in training: compiled blocks would compile again for each length of the cache, and the
    cumulative sums of top-p have no deterministic algorithm on a GPU."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        torch.use_deterministic_algorithms(False)
    try:
        with eager():
            yield
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(True)
