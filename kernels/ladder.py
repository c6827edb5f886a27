"""What both ladders of kernels share: check every rung against float64, time it, and print a table.

A ladder climbs from a formula to the shipped kernel. Each rung changes one thing, and the table shows what that bought.

    python kernels/zloss/steps.py             the loss: rungs in torch and Numba, on one thread
    python kernels/attention/steps.py         attention, the same way
    python kernels/zloss/steps.py --cuda      the rungs of steps.cu, on a GPU; without one, in the emulator

Not here: the rungs and their inputs, which are in the two steps.py.
"""

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanochameleon.kernels.cpu.malloc import tune_malloc
from nanochameleon.kernels.gpu import launch
from nanochameleon.kernels.gpu.emulator.emulator import EmulatorError, emulated
from nanochameleon.kernels.gpu.emulator.kernel import emulated_kernel
from nanochameleon.kernels.gpu.packages import why_unavailable

ROUNDS = 7  # each rung runs once a round, so that a machine that slows down slows all of them
GENERATION = 90  # the emulator's GPU: an H100
RULE = "// " + 117 * "-"  # between the rungs of a .cu file


class WrongRung(Exception):
    """A rung whose result is off by more than rounding explains."""


@dataclass(frozen=True)
class Rung:
    name: str
    change: str  # what is different from the rung before
    function: Callable[..., Sequence[Tensor]]  # inputs -> results; it may overwrite its inputs
    source: str  # the code to read


@dataclass(frozen=True)
class Limit:
    """A job to compare with, such as a copy of the inputs. It is timed in the same rounds as the rungs."""

    name: str
    prepare: Callable[..., Callable[[], object]]  # inputs -> the job
    work: float = 1.0  # what a rung must do / what the job does


@dataclass(frozen=True)
class Ladder:
    title: str  # what the rungs compute
    rungs: Sequence[Rung]
    reference: Callable[..., Sequence[Tensor]]  # inputs of any float type -> results of that type
    results: Sequence[str]  # their names
    scales: Callable[..., Sequence[float]]  # inputs -> for each result, the size of the numbers that it is made of
    problems: Callable[[], Iterable[tuple]]  # inputs to check the rungs with
    timed: Callable[[], tuple]  # inputs to time them with
    limit: Limit


# ---------------------------------------------------------------------------------------------------------------------
# Source


def python_source(*functions: Callable) -> str:
    return "\n\n".join(inspect.getsource(function) for function in functions)


def cuda_source(path: Path, kernel: str) -> str:
    """The part of a .cu file, between two rules, that defines the kernel."""
    return next(part for part in path.read_text().split(RULE) if f"void {kernel}(" in part).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def each_tensor(inputs: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    return tuple(change(x) if isinstance(x, Tensor) else x for x in inputs)


def in_float64(inputs: tuple) -> tuple:
    return each_tensor(inputs, lambda x: x.double() if x.is_floating_point() else x)


def check(ladder: Ladder) -> float:
    """Run every rung on every problem. Returns the largest error / allowed error; raises WrongRung above 1."""
    worst = 0.0
    for inputs in ladder.problems():
        truth, naive = ladder.reference(*in_float64(inputs)), ladder.reference(*inputs)
        for rung in ladder.rungs:
            results = rung.function(*each_tensor(inputs, Tensor.clone))
            parts = zip(ladder.results, results, naive, truth, ladder.scales(*inputs), strict=True)
            for name, result, plain, exact, scale in parts:
                worst = max(
                    worst, excess(f"rung '{rung.name}': {name} of {sizes(inputs)}", result, plain, exact, scale)
                )
    return worst


def excess(what: str, result: Tensor, naive: Tensor, truth: Tensor, scale: float) -> float:
    """error / allowed error, where twice the error of torch's operations is allowed, plus a few units of rounding.

    The floor is there for problems on which torch happens to be exact. NaN passes no comparison, so finite first.
    """
    if result.shape != truth.shape or not result.isfinite().all():
        raise WrongRung(f"{what} has the wrong shape or is not finite")
    if not result.numel():
        return 0.0
    error, plain = ((x.double() - truth).abs().max().item() for x in (result, naive))
    allowed = 2 * plain + 2 * torch.finfo(naive.dtype).eps * scale
    if error > allowed:
        raise WrongRung(f"{what} is off by {error:.2g}, where {allowed:.2g} is allowed")
    return error / allowed


def sizes(inputs: tuple) -> str:
    return " x ".join(str(n) for n in next(x for x in inputs if isinstance(x, Tensor)).shape)


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def seconds_of(job: Callable[[], object], device: torch.device) -> float:
    """CPU time of this process, which other processes hardly change; or the time between two events on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        job()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    job()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def measure(ladder: Ladder, inputs: tuple) -> tuple[list[float], float]:
    """Median seconds of each rung, and those that the limit asks for. Each works on inputs of its own."""
    device = next(x.device for x in inputs if isinstance(x, Tensor))
    jobs = [partial(rung.function, *each_tensor(inputs, Tensor.clone)) for rung in ladder.rungs]
    jobs.append(ladder.limit.prepare(*inputs))
    for job in jobs:  # the first call compiles
        job()
    rounds = [[seconds_of(job, device) for job in jobs] for _ in range(ROUNDS)]
    *rungs, limit = (statistics.median(times) for times in zip(*rounds, strict=True))
    return rungs, limit * ladder.limit.work


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def table(ladder: Ladder, times: list[float], limit: float) -> str:
    """A line for each rung: milliseconds, limit / time, and how many times as fast as the rung before."""
    width = max(len(rung.name) for rung in ladder.rungs) + 4
    lines = [f"{'rung':{width}} {'ms':>8} {'of limit':>9} {'step':>7}   what changes"]
    for number, (rung, seconds) in enumerate(zip(ladder.rungs, times, strict=True), start=1):
        step = f"{times[number - 2] / seconds:.2f} x" if number > 1 else "-"
        name = f"{number}. {rung.name}"
        lines.append(f"{name:{width}} {1e3 * seconds:8.3g} {limit / seconds:9.0%} {step:>7}   {rung.change}")
    return "\n".join(lines)


def climb(ladder: Ladder, where: str) -> None:
    """Check a ladder, time it, and print both."""
    worst, inputs = check(ladder), ladder.timed()
    times, limit = measure(ladder, inputs)
    print(f"{ladder.title} of {sizes(inputs)}, {where}; median of {ROUNDS} rounds")
    print(f"limit: {ladder.limit.name}, {1e3 * limit:.3g} ms. Largest error: {worst:.2f} of what is allowed\n")
    print(table(ladder, times, limit), end="\n\n", flush=True)


def emulate(ladder: Ladder) -> None:
    """Check a ladder in the emulator and print what it showed."""
    worst = check(ladder)
    print(f"{ladder.title}: every rung is right. Largest error: {worst:.2f} of what is allowed\n")
    for number, rung in enumerate(ladder.rungs, start=1):
        print(f"{number}. {rung.name:16} {rung.change}")
    print(flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels of a .cu file, with the call of cupy.RawKernel


def emulator_kernel(path: Path, name: str) -> Callable:
    return emulated_kernel(path, name, generation=GENERATION)


def gpu_kernel(path: Path, name: str) -> Callable:
    """kernel(grid, block, arguments, shared_mem=0) on torch's tensors, which become addresses."""
    file = str(path.relative_to(launch.KERNELS).with_suffix(""))
    kernel = launch.load_kernel(file, name, torch.cuda.current_device())

    def call(grid: tuple, block: tuple, arguments: tuple, shared_mem: int = 0) -> None:
        if shared_mem > 40 * 1024:  # 48 KB need no permission, minus the kernel's own arrays
            kernel.max_dynamic_shared_size_bytes = shared_mem
        addresses = (np.uint64(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments)
        kernel(grid, block, tuple(addresses), shared_mem=shared_mem)

    return call


# ---------------------------------------------------------------------------------------------------------------------
# The command


def why_no_gpu() -> str | None:
    return why_unavailable(torch.device("cuda")) if torch.cuda.is_available() else "there is no GPU"


def main(
    purpose: str,
    on_cpu: Callable[[], Iterable[Ladder]],
    on_gpu: Callable[[Callable, torch.device], Iterable[Ladder]],
    options: Sequence[str] | None = None,
) -> int:
    """Climb the ladders and return the exit code: 1 if a rung is wrong. on_gpu takes (load kernel, device)."""
    parser = argparse.ArgumentParser(description=purpose, allow_abbrev=False)
    parser.add_argument(
        "--cuda", action="store_true", help="the rungs of steps.cu, on a GPU; without one, in the emulator, untimed"
    )
    cuda, missing = parser.parse_args(options).cuda, why_no_gpu()
    torch.set_num_threads(1)
    tune_malloc()
    try:
        with emulated(GENERATION) if cuda and missing else nullcontext():
            if not cuda:
                for ladder in on_cpu():
                    climb(ladder, "CPU time of one thread")
            elif not missing:
                for ladder in on_gpu(gpu_kernel, torch.device("cuda")):
                    climb(ladder, f"on one {torch.cuda.get_device_name()}")
            else:
                print(f"In the emulator, since {missing}. It shows what a kernel computes, not its speed.\n")
                for ladder in on_gpu(emulator_kernel, torch.device("cpu")):
                    emulate(ladder)
    except (WrongRung, EmulatorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
