"""Runs one part of `make gpu` in a process of its own: python -m nanochameleon.bench.gpu.part NAME FOLDER [--dry]

The rows are in FOLDER/NAME.json after each measurement, so a part that is ended keeps what it has.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from nanochameleon.bench import rows
from nanochameleon.bench.gpu import attention, generation, kernels, machine, steps, toy
from nanochameleon.bench.gpu.context import Context
from nanochameleon.bench.gpu.plan import DRY, ON_GPU
from nanochameleon.errors import exit_on_user_error, say
from nanochameleon.kernels.gpu.emulator.emulator import emulated

PARTS: dict[str, Callable[[Context], Iterator[rows.Row]]] = {
    "machine": machine.run, "toy": toy.run, "prove": kernels.prove, "attention": attention.run, "steps": steps.run,
    "generation": generation.run, "kernels": kernels.times, "sanitizer": kernels.sanitizer, "checks": kernels.checks,
}  # fmt: skip


def main(name: str, folder: Path, dry: bool) -> None:
    """Run the part. Exits with 1 if one of its cases failed."""
    context, measured = Context(DRY if dry else ON_GPU, folder), []
    with ExitStack() as stack:
        if dry:
            torch.set_num_threads(1)  # tiny sizes: on a busy machine more threads wait for one another
            stack.enter_context(emulated())
        for row in PARTS[name](context):
            rows.show(row)
            measured.append(row)
            rows.save(measured, folder / f"{name}.json")
    if context.failed:
        say(f"failed: {'; '.join(context.failed)}")
        raise SystemExit(1)


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1], Path(sys.argv[2]), "--dry" in sys.argv[3:]))
