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

Job = Callable[[], object]


def clock() -> float:
    """Return seconds on a CPU: the process's own if torch has one thread, since other processes hardly affect it."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds_of(job: Job, device: torch.device) -> float:
    """Run the job once and return its seconds, on a GPU by events."""
    if device.type != "cuda":
        start = clock()
        job()
        return clock() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    start.record(stream)
    job()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median_seconds(
    jobs: dict[str, Job], rounds: int, device: torch.device, max_seconds: float = math.inf
) -> dict[str, float]:
    """Return the median seconds of each job, after one round that does not count.

    Rounds end early after `max_seconds`, but there are at least two.
    """
    for job in jobs.values():
        job()
    times, deadline = {name: [] for name in jobs}, time.perf_counter() + max_seconds
    for done in range(rounds):
        if done > 1 and time.perf_counter() > deadline:
            break
        for name, job in jobs.items():
            times[name].append(seconds_of(job, device))
    return {name: statistics.median(each) for name, each in times.items()}


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
