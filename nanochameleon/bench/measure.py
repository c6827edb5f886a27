"""Measure seconds and peak memory.

Variants are timed alternately within each round, so that a machine that slows down slows all of them.
"""

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nanochameleon.errors import say, shown

Job = Callable[[], object]


def clock() -> float:
    """Return seconds on a CPU: the process's own if torch has one thread, since other processes hardly affect it."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(job: Job, device: torch.device) -> Callable[[], float]:
    """Run the job once. Returns a function that gives its seconds; on a GPU that function waits for the job."""
    if device.type != "cuda":
        start = clock()
        job()
        seconds = clock() - start
        return lambda: seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    start.record(stream)
    job()
    end.record(stream)

    def read() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return read


def seconds_of(job: Job, device: torch.device) -> float:
    """Run the job once and return its seconds."""
    return timed(job, device)()


def that_run(case: str, jobs: dict[str, Job]) -> dict[str, Job]:
    """Run each job once, and return those that do not fail. Prints a line with the reason for each of the others."""
    ran = {}
    for name, job in jobs.items():
        try:
            job()
            ran[name] = job
        except Exception as error:  # torch.compile alone raises a dozen kinds
            say(f"{case:34} {name:28} left out: {type(error).__name__}: {shown(error, 160)}")
    return ran


HEAD_START = 5_000_000  # cycles of a GPU that waits for the host: 3 ms, in which Python launches a hundred operations


def median_seconds(
    jobs: dict[str, Job], rounds: int, device: torch.device, max_seconds: float = math.inf, launches: bool = True
) -> dict[str, float]:
    """Return the median seconds of each job, after one round that does not count.

    Rounds end early after `max_seconds`, but there are at least two, if `rounds` allows. On a GPU the host reads no
    time before the last round: if it waited after each job, the GPU would idle and the launch of the next would count.
    launches: whether a job whose launches take longer than its kernels is as long as its launches. Not in a comparison
    of kernels, which run in a CUDA graph or while the host is ahead: there the GPU waits before each job.
    """
    for job in jobs.values():
        job()
    # A write that is larger than the L2 cache: what the last job left there would help the next one.
    cache = torch.empty(2**28 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    times, deadline = {name: [] for name in jobs}, time.perf_counter() + max_seconds
    for done in range(rounds):
        if done > 1 and time.perf_counter() > deadline:
            break
        for name, job in jobs.items():
            cache.zero_()
            if device.type == "cuda" and not launches:
                torch.cuda._sleep(HEAD_START)
            times[name].append(timed(job, device))
    return {name: statistics.median(read() for read in each) for name, each in times.items()}


def peak_bytes(job: Job, device: torch.device) -> int:
    """Return how much the job allocates at its peak, above what was allocated before.

    On a CPU torch's profiler reports each allocation, on a GPU torch's allocator counts. Memory from elsewhere is not
    seen, such as MKL's own buffers of a few MB.
    """
    job()  # what the first run allocates and keeps does not count
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    with stderr_closed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        job()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    moves = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    return max(accumulate((n for _, n in sorted(moves, key=lambda move: move[0])), initial=0))


@contextmanager
def stderr_closed() -> Iterator[None]:
    """Discard the process's stderr: the profiler writes lines about itself there."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
