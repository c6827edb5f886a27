"""Time the whole command that a reader runs first: `python sample.py models/toy "a red circle"`, nothing cached."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from nanochameleon.bench.rows import Row, make_row
from nanochameleon.errors import UserError, shown

ROOT = Path(__file__).parents[2]
IMPORTS = "import sample, nanochameleon.generation.engine, nanochameleon.images.output, nanochameleon.training.run"
PARTS = {  # the program's arguments
    "python and imports": ("-c", IMPORTS),
    "the whole command": ("sample.py", "models/toy", "a red circle", "--device", "cpu", "--out"),
}


def run_once(arguments: tuple[str, ...]) -> tuple[float, float]:
    """(seconds, seconds of CPU time) of a new process. Its caches and its images are in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        if arguments[-1] == "--out":
            arguments = (*arguments, f"{folder}/out")
        env = os.environ | {"NUMBA_CACHE_DIR": f"{folder}/numba", "NANOCHAMELEON_CACHE": f"{folder}/cache"}
        before, start = children_cpu(), time.perf_counter()
        process = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
        taken = time.perf_counter() - start, children_cpu() - before
    if process.returncode:
        raise UserError(f"{arguments[0]} failed: {shown(process.stderr.strip(), 300)}")
    return taken


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bench(device: torch.device, quick: bool) -> Iterator[Row]:
    """Rows of the medians, of the clock and of CPU time."""
    if device.type != "cpu":
        raise UserError("the first image is measured on a CPU: leave out --device")
    if not (ROOT / "models" / "toy").is_dir():
        raise UserError(f"{ROOT} holds no models/toy: run the bench `first` in a clone of the project")
    taken = {name: [] for name in PARTS}
    for _ in range(3 if quick else 7):
        for name, arguments in PARTS.items():
            taken[name].append(run_once(arguments))
    for name, each in taken.items():
        for variant, seconds in zip(("clock", "CPU time"), zip(*each, strict=True), strict=True):
            yield make_row("first", f"first image: {name}", variant, median(seconds), "s", device)
