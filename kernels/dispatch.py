"""Which implementation of an op runs, and why: a value that a caller can set, never a constant of the import.

    with use_kernels("reference"): ...          for a block of code
    NANOCHAMELEON_KERNELS=reference python ...  for a process
    otherwise "auto": the fastest one measured for this device and type (AUTO)

An explicit wish that cannot be met raises with the reason. Not here: the implementations.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

NAMES = ("auto", "reference", "numba")
VARIABLE = "NANOCHAMELEON_KERNELS"

# op -> what was measured to be fastest on a CPU in float32 and bfloat16
AUTO = {
    "normed_attention": ("numba", "3 to 4 times torch's attention, norm and rotation"),
    "zloss_cross_entropy": ("numba", "no logits written in the forward pass"),
}

_wishes: list[str] = []


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Inside, every op runs this implementation: "reference", "numba" or "auto"."""
    _check(name)
    _wishes.append(name)
    try:
        yield
    finally:
        _wishes.pop()


def _check(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"there are no kernels called {name!r}: choose one of {', '.join(NAMES)}")


def wish() -> str:
    name = _wishes[-1] if _wishes else os.environ.get(VARIABLE, "auto")
    _check(name)
    return name


def why_not_numba(x: Tensor) -> str | None:
    """The reason why Numba's kernels cannot run on this tensor, or None."""
    if x.device.type != "cpu":
        return f"they are for the CPU, and this tensor is on {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"they take float32 and bfloat16, not {x.dtype}"
    return None if find_spec("numba") else "numba is not installed"


def choose(op: str, x: Tensor) -> str:
    """The implementation of `op` for tensors like x. Raises ValueError for a wish that cannot be met."""
    name = wish()
    if name == "reference":
        return name
    reason = why_not_numba(x)
    if name == "numba" and reason:
        raise ValueError(f"numba's kernels were asked for {op}, but {reason}")
    return "reference" if reason else AUTO[op][0] if name == "auto" else name
