"""Known bugs, one file a room. `make mutants` plants each and expects a test to turn red (__main__.py)."""

from mutants import (
    attention_steps,
    bench,
    core,
    data,
    drawing,
    evaluate,
    evaluate_runs,
    generation,
    harness,
    images,
    kernels_amx,
    kernels_cpu,
    kernels_gpu,
    parallel,
    people,
    safety,
    scripts,
    training,
    vision,
    web,
    web_api,
    web_page,
    web_study,
    weights,
)
from nanochameleon.kernels.cpu.amx.tiles import why_unavailable

ROOMS = [
    attention_steps,
    bench,
    core,
    data,
    drawing,
    evaluate,
    evaluate_runs,
    generation,
    harness,
    images,
    kernels_cpu,
    kernels_gpu,
    parallel,
    people,
    safety,
    scripts,
    training,
    vision,
    web,
    web_api,
    web_page,
    web_study,
    weights,
]
if why_unavailable() is None:  # without AMX the tests of what runs on its tiles are skipped
    ROOMS.append(kernels_amx)
MUTANTS = [mutant for room in ROOMS for mutant in room.MUTANTS]
