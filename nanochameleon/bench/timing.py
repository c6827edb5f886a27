"""Timing of kernels: variants in turns, on a CPU by the process's own clock, which neighbours hardly disturb (one
thread), on a GPU by its events; medians. Variants take turns within each round, so that a machine that slows down slows
all of them. And the rows and the drawing of such figures.
"""

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanochameleon.bench.rows import Row, commit, device_name
from nanochameleon.files import write_file


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
    """A row for each variant, each with its ratio: the time of `ratio_to` over its own."""
    where = device_name(device), torch.__version__, commit()
    return [
        Row(bench, case, name, 1e3 * value, "ms", times[ratio_to] / value, ratio_to, *where)
        for name, value in times.items()
    ]


def plot(path: Path, rows: list[Row]) -> None:
    """Bars of the ratios of times, a group for each case."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.unit == "ms"]
    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 0.5 + 0.3 * len(rows)), layout="constrained")
    labels = [f"{row.case}   {row.variant}" for row in rows]
    colours = [f"C{cases.index(row.case) % 10}" for row in rows]
    axes.barh(labels, [row.ratio or 0.0 for row in rows], color=colours)
    axes.margins(y=0.005)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as {rows[0].ratio_to}\n({rows[0].device}, torch {rows[0].torch})")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    write_file(path, buffer.getvalue())
