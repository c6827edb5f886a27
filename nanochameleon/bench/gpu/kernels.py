"""Parts `prove`, `kernels` and `sanitizer`: the kernels' values, times next to torch's, and accesses to memory."""

import shutil
import subprocess
import sys
from collections.abc import Iterator

from nanochameleon.bench import kernels as bench
from nanochameleon.bench.gpu.context import ROOT, Context
from nanochameleon.bench.gpu_cases import cases
from nanochameleon.bench.limits import measure_limits
from nanochameleon.bench.rows import Row
from nanochameleon.bench.subjects import DRY, check_all
from nanochameleon.errors import say
from nanochameleon.kernels.gpu import proof

TOOLS = ("memcheck", "racecheck")
SECONDS = 90.0  # of each tool, at most
PROVE_SECONDS = 300.0


def prove(context: Context) -> Iterator[Row]:
    """Let `auto` take the kernels that pass (bench prove): later parts measure what a user would get."""
    words = ["-m", "nanochameleon.bench", "prove", "--quick"]
    with context.guard("bench prove"):
        context.run("bench prove", [*words, *["--dry"] * context.plan.dry], PROVE_SECONDS)
        if not context.plan.dry:  # which keeps no proof
            proven = proof.proof_folder() / proof.file_name(proof.identity(context.device))
            shutil.copy(proven, context.folder / "proof.json")  # to send in
    yield from ()


def times(context: Context) -> Iterator[Row]:
    """Time the cases of `bench kernels --quick` one by one: an op that fails leaves the others."""
    limits = measure_limits(context.device)
    yield from limits.rows("gpu", context.device)
    for op in ("zloss", "decode", "attention", "linear_zloss"):
        found = cases(context.device, op, context.plan.kernels)
        while True:
            case = None
            with context.guard(f"kernels, {op}"):
                case = next(found, None)
            if case is None:
                break
            with context.guard(case.name):
                yield from bench.measure(case, 1 if context.plan.dry else 5, context.device, limits)


def checks(context: Context) -> Iterator[Row]:
    """Run every kernel at small sizes. compute-sanitizer watches this."""
    check_all(context.device, "all", DRY)
    yield from ()


def sanitizer(context: Context) -> Iterator[Row]:
    if shutil.which("compute-sanitizer") is None:
        say("compute-sanitizer is not on the PATH (it comes with the CUDA toolkit): memory accesses are not checked")
    for tool in TOOLS if shutil.which("compute-sanitizer") else ():
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
        command += ["-m", "nanochameleon.bench.gpu.part", "checks", str(context.folder)]
        with context.guard(f"compute-sanitizer {tool}"):
            say(f"$ {' '.join(command)}")
            subprocess.run(command, cwd=ROOT, timeout=SECONDS, check=True)
    yield from ()
