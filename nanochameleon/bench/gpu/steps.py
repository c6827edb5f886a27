"""Part `steps`: a training step of the 1.4B as train.py runs it, by kernels and with and without torch.compile."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from nanochameleon.bench.engine import random_model
from nanochameleon.bench.gpu.context import Context
from nanochameleon.bench.limits import Limits, measure_limits
from nanochameleon.bench.measure import median_seconds, peak_bytes, stderr_closed
from nanochameleon.bench.rows import Row
from nanochameleon.bench.train import Case, Step, Variant, measure_alone, our_step, step_rows
from nanochameleon.errors import say

ROUNDS, MAX_SECONDS, PROFILE_ROWS = 5, 10.0, 18
PACKED = Variant("bf16", packed=True)
# in the order of importance; those with kernels that `auto` may not take come last
VARIANTS = (
    replace(PACKED, compiled=True), PACKED, Variant("bf16", compiled=True), Variant("bf16"),
    Variant("bf16", compiled=True, kernels="vendor"), replace(PACKED, compiled=True, kernels="vendor"),
    replace(PACKED, compiled=True, kernels="cuda"), replace(PACKED, kernels="cuda"),
)  # fmt: skip


def measure(context: Context, case: Case, variant: Variant, limits: Limits) -> Iterator[Row]:
    torch.compiler.reset()  # torch stops compiling a function after 8 variants of it
    device, model = context.device, random_model(case.cfg, context.device, torch.float32)
    step = our_step(case, model, variant)
    if device.type == "cuda":
        seconds, gib = measure_alone(step, ROUNDS, device, MAX_SECONDS)
    else:
        seconds, gib = median_seconds({"": step}, 1, device)[""], peak_bytes(step, device) / 2**30
    yield from step_rows(case, variant.name, seconds, gib, device, limits)
    if case == context.plan.steps[0] and variant in (VARIANTS[0], PACKED):
        show_profile(step, device)


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
            yield from measure(context, case, variant, limits)
