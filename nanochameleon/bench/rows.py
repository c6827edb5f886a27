"""What every bench shares: variants timed in turns, and rows that say where and by which code they were measured.

On a CPU one thread is timed by the process's own clock, which neighbours hardly disturb; on a GPU by its events.
Medians. Variants take turns within each round, so that a machine that slows down slows all of them.
"""

import ctypes
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochameleon.files import write_file


@dataclass(frozen=True)
class Row:
    """One variant of one case. `ratio` is the time of variant `ratio_to` over this one's: bigger is faster."""

    bench: str
    case: str  # the op, then its sizes
    variant: str
    value: float
    unit: str
    ratio: float | None
    ratio_to: str
    device: str
    torch: str
    commit: str


def commit() -> str:
    """Of the code that runs, with + where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, 1 thread"


def keep_pages() -> None:
    """Makes glibc keep freed memory. Else a large tensor is fresh pages each time, and the system's clearing of them
    is timed in place of the arithmetic. Elsewhere it does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            mallopt(option, value)


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.process_time()
    run()
    return time.process_time() - before


def seconds(variants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """The median of each variant over the rounds, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 2):
        for name, run in variants.items():
            times[name].append(_once(run, device))
    return {name: statistics.median(each[2:]) for name, each in times.items()}


def to_rows(bench: str, case: str, times: dict[str, float], ratio_to: str, device: torch.device) -> list[Row]:
    where = device_name(device), torch.__version__, commit()
    return [
        Row(bench, case, name, 1e3 * value, "ms", times[ratio_to] / value, ratio_to, *where)
        for name, value in times.items()
    ]


def show(rows: list[Row]) -> None:
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:6.2f} x {row.ratio_to}"
        print(f"{row.case:48} {row.variant:14} {row.value:10.3f} {row.unit:9} {ratio}", flush=True)


def write_json(path: Path, rows: list[Row]) -> None:
    write_file(path, (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())


def plot(path: Path, rows: list[Row]) -> None:
    """Bars of the ratios, a group for each case."""
    import io

    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 0.5 + 0.3 * len(rows)), layout="constrained")
    labels = [f"{row.case}   {row.variant}" for row in rows]
    colours = [f"C{cases.index(row.case) % 10}" for row in rows]
    axes.barh(labels, [row.ratio or 0.0 for row in rows], color=colours)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as {rows[0].ratio_to} ({rows[0].device}, torch {rows[0].torch})")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_file(path, buffer.getvalue())
