"""What every benchmark shares: timing that takes turns, rows of figures, and where they go.

A row: {"bench", "case", "variant", "value", "unit", "ratio", "ratio_to", "device", "torch", "commit"}; ratio is the
peer's time over ours, so that more is better.
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochameleon.errors import say
from nanochameleon.files import write_file


@dataclass(frozen=True)
class Row:
    bench: str
    case: str
    variant: str
    value: float
    unit: str
    ratio: float | None
    ratio_to: str | None
    device: str
    torch: str
    commit: str


def clock() -> float:
    """Seconds: on a CPU with one thread the process's own, which neighbours hardly disturb."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def take_turns(jobs: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of each job, run in turns so that what else the machine does meets all alike. Each runs once
    before the clock; rounds end early, but not before the first, when `seconds` are over."""
    for job in jobs.values():
        job()
    times, end = {name: [] for name in jobs}, time.perf_counter() + seconds
    for number in range(rounds):
        for name, job in jobs.items():
            start = clock()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(clock() - start)
        if number and time.perf_counter() > end:
            break
    return {name: statistics.median(taken) for name, taken in times.items()}


def commit() -> str:
    """Of the source tree, "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def rows_of(bench: str, case: str, ours: str, taken: dict[str, float], per: float, unit: str, device: str) -> list[Row]:
    """Seconds by variant -> a row for each: value = per / seconds, or seconds * 1e3 / per where the unit is ms."""
    same = dict(device=device, torch=torch.__version__, commit=commit())

    def value(name):
        return taken[name] * 1e3 / per if unit.startswith("ms") else per / taken[name]

    peers = [name for name in taken if name != ours]
    rows = [Row(bench, case, ours, value(ours), unit, taken[p] / taken[ours], p, **same) for p in peers]
    rows = rows or [Row(bench, case, ours, value(ours), unit, None, None, **same)]
    return rows + [Row(bench, case, p, value(p), unit, None, None, **same) for p in peers]


def show(row: Row) -> None:
    against = f"  {row.ratio:6.2f} x {row.ratio_to}" if row.ratio_to else ""
    say(f"{row.case:34} {row.variant:28} {row.value:10.4g} {row.unit}{against}")


def save(rows: list[Row], path: Path) -> None:
    write_file(path, (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())
