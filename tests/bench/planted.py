"""An op that a kernel could be, right and with each fault that `prove` must find. Its processes import this module."""

import os
import signal
import sys
import time

import torch
from torch import Tensor

from nanochameleon.bench.gpu_checks import Problem, Tensors, check_all
from nanochameleon.kernels.gpu.proof import Entry

CPU, BF16 = torch.device("cpu"), torch.bfloat16
RIGHT = {"shapes": ("4 x 8",), "ms": {"own": (1.0,), "torch": (1.9,)}}


def right(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(3 * x)


def wrong(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(3.1 * x)


def racing(x: Tensor) -> Tensor:
    """The last bit of one number depends on the time."""
    out = right(x)
    out.view(torch.int16)[0, 0] += next(RUNS) % 2
    return out


def unwritten(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:3].copy_(3 * x[:3])
    return out


def outside(x: Tensor) -> Tensor:
    out = right(x)
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)
    return out


def before_its_input(x: Tensor) -> Tensor:
    x.as_strided((1,), (1,), x.storage_offset() - 1).fill_(0)
    return right(x)


def changing_its_input(x: Tensor) -> Tensor:
    out = right(x)
    x[0, 0] += 1
    return out


def raising(x: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")


def hanging(x: Tensor) -> Tensor:
    time.sleep(600)
    return x


def crashing(x: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return x


def leaving(x: Tensor) -> Tensor:
    sys.stdout.flush()
    os._exit(7)


RUNS = iter(range(10**9))
REASONS = {  # what is found -> the reason, as a pattern
    wrong: r"y of three times x is off by 0\.033, torch's own by 0\.00\d+",
    racing: r"y of three times x: run 2 differs from the first, a race",
    unwritten: r"y of three times x has numbers that are not finite, such as those of memory that was not written",
    outside: r"three times x: it writes outside new memory",
    before_its_input: r"three times x: it writes outside x",
    changing_its_input: r"three times x: its input x has changed",
    raising: r"RuntimeError: CUDA error: an illegal memory access was encountered",
    hanging: r"it did not end within 5 s",
    crashing: r"its process was ended by SIGSEGV",
    leaving: r"its process ended with exit code 7",
}
FAULTS = {fault.__name__: fault for fault in (right, *REASONS)}


def problem(function) -> Problem:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(BF16)

    def run(inputs: Tensors) -> Tensors:
        return {"y": function(inputs["x"])}

    return Problem("three times x", {"x": x}, run, lambda inputs, dtype: {"y": 3 * inputs["x"].to(dtype)})


def work(planted: dict[str, str], name: str) -> Entry:
    """Prove the op with the fault that is planted in the kernel of this name; others are right."""
    errors = check_all([problem(FAULTS[planted.get(name, "right")])], BF16, 5, CPU)
    return Entry(True, "", errors, **RIGHT)
