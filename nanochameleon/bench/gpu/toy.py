"""Part `toy`: what `make demo` does, in few steps: train, stop, resume, report, sample; in fp32 and in bf16."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nanochameleon.bench.gpu.context import ROOT, Context
from nanochameleon.bench.rows import Row
from nanochameleon.errors import say
from nanochameleon.training import checkpoint

SECONDS = 150.0  # of one command, at most
STOPPED = 128 + signal.SIGINT


def options(context: Context, precision: str) -> list[object]:
    out = context.folder / f"toy-{precision}"
    compiled = "off" if precision == "fp32" else "auto"  # compiling takes longer than these steps: once is enough
    return ["train.py", "toy", "--device", context.plan.device, "--out", out, "--train.precision", precision,
            "--parallel.compile", compiled, *context.plan.toy]  # fmt: skip


def stop_after_a_checkpoint(command: list[object], folder: Path, limit: float) -> int:
    """Start a training, interrupt it as Ctrl-C does once it has saved a checkpoint, and return its exit code."""
    words = [str(word) for word in command]
    say(f"$ python {' '.join(words)}     # and Ctrl-C after the first checkpoint")
    deadline = time.monotonic() + limit
    with subprocess.Popen([sys.executable, *words], cwd=ROOT) as process:
        while process.poll() is None and not checkpoint.checkpoints(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            raise RuntimeError(f"the training did not stop within {limit:.0f} s") from None


def train(context: Context, precision: str, stop: bool) -> Iterator[Row]:
    """Train with a stop and a resume, or without. Raises RuntimeError where a file of the run is missing."""
    command, start = options(context, precision), time.perf_counter()
    folder = context.folder / f"toy-{precision}"
    shutil.rmtree(folder, ignore_errors=True)
    if stop:
        code = stop_after_a_checkpoint(command, folder, SECONDS * context.plan.patience)
        if code not in (0, STOPPED):
            raise RuntimeError(f"the training ended with exit code {code}, not {STOPPED}, after Ctrl-C")
        say(f"stopped with exit code {code}; now the same command resumes")
    context.run("train.py", command, SECONDS)
    for name in ("report.json", "report.html", "samples.png", "curves.png", "samples"):
        if not (folder / name).exists():
            raise RuntimeError(f"the run has no {name}")
    yield context.row(f"toy, few steps, {precision}", "train.py", time.perf_counter() - start, "s")


def sample(context: Context) -> None:
    """Draw an image, then ask about it."""
    folder = context.folder / "toy-fp32"
    device = "--device", context.plan.device
    before = set(folder.glob("out/*.png"))
    context.run("sample.py", ["sample.py", folder, "a big red circle", "--n", "4", *device], SECONDS)
    drawn = sorted(set(folder.glob("out/*.png")) - before)
    if not drawn:
        raise RuntimeError("sample.py wrote no image")
    context.run("sample.py", ["sample.py", folder, drawn[0], "how many things are there?", *device], SECONDS)


def run(context: Context) -> Iterator[Row]:
    for precision, stop in (("fp32", True), ("bf16", False)):
        with context.guard(f"training the toy in {precision}"):
            yield from train(context, precision, stop)
    with context.guard("sampling from the toy"):
        sample(context)
