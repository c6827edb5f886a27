"""The memory that a piece of work takes at its height: on a CPU as torch's profiler sees each allocation and release,
on a GPU as torch's allocator counts it.

What does not come from that allocator is not seen: MKL's own buffers, a few MB.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nanochameleon.bench.rows import Row, commit, device_name


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Above what was held before; the second run counts, which finds what the first one keeps."""
    run()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with without_notes(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    moves = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    return max(accumulate((n for _, n in sorted(moves, key=lambda move: move[0])), initial=0))


@contextmanager
def without_notes() -> Iterator[None]:
    """The profiler writes lines about itself to the process's stderr."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def memory_rows(case: str, variants: dict[str, Callable[[], object]], ratio_to: str, device: torch.device) -> list[Row]:
    """A row for each variant in MiB, with the ratio of `ratio_to` over its own."""
    peaks = {name: peak_bytes(run, device) for name, run in variants.items()}
    where = device_name(device), torch.__version__, commit()
    return [
        Row("kernels", f"{case} memory", name, n / 2**20, "MiB", peaks[ratio_to] / n, ratio_to, *where)
        for name, n in peaks.items()
    ]
