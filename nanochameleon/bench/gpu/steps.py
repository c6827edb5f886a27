"""Part `steps`: a training step of the 1.4B as train.py runs it, by kernels and with and without torch.compile.

Each variant has a process of its own. So one that crashes or hangs loses no other, and says where it was.
"""

import faulthandler
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nanochameleon.bench.engine import random_model
from nanochameleon.bench.gpu.context import Context
from nanochameleon.bench.limits import Limits, measure_limits
from nanochameleon.bench.measure import median_seconds, peak_bytes, stderr_closed
from nanochameleon.bench.rows import Row, save
from nanochameleon.bench.train import Case, Step, Variant, measure_alone, our_step, step_rows
from nanochameleon.errors import say

ROUNDS, MAX_SECONDS, PROFILE_ROWS = 5, 10.0, 18
LIMIT = 90.0  # seconds for the process of a variant
PACKED = Variant("bf16", packed=True)
# in the order of importance; those with kernels that `auto` may not take come last
VARIANTS = (
    replace(PACKED, compiled=True), PACKED, Variant("bf16", compiled=True), Variant("bf16"),
    Variant("bf16", compiled=True, kernels="vendor"), replace(PACKED, compiled=True, kernels="vendor"),
    replace(PACKED, compiled=True, kernels="cuda"), replace(PACKED, kernels="cuda"),
)  # fmt: skip


def measure(context: Context, case: Case, variant: Variant, limits: Limits) -> Iterator[Row]:
    device, model = context.device, random_model(case.cfg, context.device, torch.float32)
    step = our_step(case, model, variant)
    if device.type == "cuda":
        seconds, gib = measure_alone(step, ROUNDS, device, MAX_SECONDS)
    else:
        seconds, gib = median_seconds({"": step}, 1, device)[""], peak_bytes(step, device) / 2**30
    yield from step_rows(case, variant.name, seconds, gib, device, limits)
    if case == context.plan.steps[0] and variant in (VARIANTS[0], PACKED):
        show_profile(step, device)


def measure_apart(context: Context, case: Case, variant: Variant, limits: Limits) -> list[Row]:
    """`measure` in another process. Raises RuntimeError if it crashes, fails or hangs."""
    path = context.folder / "step.json"
    path.unlink(missing_ok=True)
    spawn = multiprocessing.get_context("spawn")  # a fork would share this process's CUDA context
    process = spawn.Process(target=measure_and_save, args=(context, case, variant, limits, path))
    process.start()
    process.join(LIMIT)
    if process.exitcode != 0:
        how = f"took longer than {LIMIT:.0f} s" if process.is_alive() else f"ended with exit code {process.exitcode}"
        process.kill()
        process.join()  # before the next one needs the GPU's memory
        raise RuntimeError(f"its process {how}")
    return [Row(**row) for row in json.loads(path.read_text())]


def measure_and_save(context: Context, case: Case, variant: Variant, limits: Limits, path: Path) -> None:
    """In the other process."""
    faulthandler.enable()
    rows = []
    with context.guard(variant.name):
        rows += measure(context, case, variant, limits)
    save(rows, path)
    if context.failed:
        raise SystemExit(1)


def show_profile(step: Step, device: torch.device) -> None:
    """Print what takes the time of one step."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with stderr_closed(), profile(activities=[activity]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    by = "cuda_time_total" if on_gpu else "cpu_time_total"
    say(profiler.key_averages().table(sort_by=by, row_limit=PROFILE_ROWS, max_name_column_width=60))


def run(context: Context) -> Iterator[Row]:
    first, *others = context.plan.steps
    todo = [(first, each) for each in VARIANTS[:4]]
    todo += [(case, VARIANTS[2]) for case in others]
    todo += [(first, each) for each in VARIANTS[4:]]
    if context.plan.dry:  # torch.compile takes minutes on a CPU
        todo = list(dict.fromkeys((case, replace(each, compiled=False)) for case, each in todo))
    limits = measure_limits(context.device)
    yield from limits.rows("gpu", context.device)
    for case, variant in todo:
        with context.guard(f"{case.name}, {variant.name}"):
            yield from (measure if context.plan.dry else measure_apart)(context, case, variant, limits)
