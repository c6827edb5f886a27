"""The subjects of `prove`: each implementation of an op on a GPU, for one dtype and head size. How each is checked and
timed.

The checks are those of gpu_checks.py, at odd sizes, with grouped KV heads and documents. Times are those of the bench
`kernels`, next to what would run otherwise: torch's own operations, and for attention the same compiled.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from nanochameleon.bench import gpu_cases, gpu_checks
from nanochameleon.bench.gpu_checks import Problem
from nanochameleon.bench.kernels import Case, attention_case, with_kernels, zloss_case
from nanochameleon.bench.measure import Job, median_seconds
from nanochameleon.errors import say, shown
from nanochameleon.kernels.dispatch import CUDA_DTYPES
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.gpu.emulator.emulator import emulated
from nanochameleon.kernels.gpu.proof import HEAD_DIMS, Entry, entry_name

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Effort:
    """How much is checked and timed."""

    runs: int  # with the same bits
    lengths: tuple[int, ...]  # of checked sequences
    widths: tuple[int, ...]  # of checked logits
    many: int  # logits that are checked at once
    rounds: int  # of each timing
    attention: tuple[tuple[int, int, int], ...]  # timed: sequences, length, heads x head size
    decode: tuple[tuple[int, int, int, int], ...]  # timed: slots, heads x head size, KV heads x head size, cache
    zloss: tuple[tuple[int, int], ...]  # timed: tokens, vocabulary
    compiled: tuple[int, ...]  # head sizes at which torch.compile is timed, too, as training compiles its blocks
    limit: float  # seconds for a kernel

    @property
    def shapes(self) -> dict[str, tuple]:
        return {
            "qknorm_rope_attention": self.attention, "decode_attention": self.decode, "zloss_cross_entropy": self.zloss,
        }  # fmt: skip


LENGTHS, WIDTHS = (17, 70, 300), (33, 940, 4_096, 65_536)
ATTENTION = (16, 1_024, 1_024), (8, 2_048, 2_048), (4, 4_096, 4_096)
DECODE = (1, 4_096, 4_096, 2_048), (16, 4_096, 4_096, 2_048), (16, 8_192, 1_024, 4_096)
ZLOSS = (16_384, 4_096), (65_536, 4_096), (16_384, 65_536)
FULL = Effort(30, LENGTHS, WIDTHS, 2**31, 9, ATTENTION, DECODE, ZLOSS, HEAD_DIMS, 240.0)
QUICK = Effort(30, LENGTHS, WIDTHS, 2**31, 5, ATTENTION[2:], DECODE[1:2], ZLOSS[2:], (128,), 90.0)
DRY = Effort(2, (17, 70), (33, 64), 2**9, 2, ((1, 20, 128),), ((2, 128, 128, 30),), ((3, 64),), (), 60.0)


@dataclass(frozen=True)
class Subject:
    """One implementation of an op."""

    op: str
    dtype: torch.dtype
    head_dim: int | None
    kernels: str  # "cuda" or "vendor"

    @property
    def name(self) -> str:
        return entry_name(self.op, self.dtype, self.head_dim, self.kernels)

    def problems(self, effort: Effort, device: torch.device) -> Iterator[Problem]:
        e = self.head_dim
        if self.op == "qknorm_rope_attention":
            for i, t in enumerate(effort.lengths):
                heads, kv_heads = ((2, 2), (4, 2), (4, 1))[i % 3]
                yield gpu_checks.attention_problem(self.kernels, 2, t, heads, kv_heads, e, i > 0, device)
                yield gpu_checks.norm_problem(t, heads, e, device)
                if self.kernels == "cuda":
                    yield gpu_checks.own_attention_problem(t, heads, kv_heads, e, device)
        elif self.op == "decode_attention":
            for i, places in enumerate(effort.lengths):
                yield gpu_checks.decode_problem(3, 1 + i, (2, 4, 6)[i % 3], 2, places, e, device)
        else:
            for v in effort.widths:
                for overwrite in (False, True):
                    yield gpu_checks.loss_problem(40, v, self.dtype, overwrite, device)
            rows = 3 * 2_048 + 5 if device.type == "cuda" else 7  # several chunks
            yield gpu_checks.linear_problem(rows, effort.widths[1], 64, self.dtype, device)

    def case(self, shape: tuple, device: torch.device) -> Case:
        e = self.head_dim
        if self.op == "qknorm_rope_attention":
            return attention_case(*shape[:2], shape[2] // e, e, self.dtype, max(1, shape[1] // 512), device)
        if self.op == "decode_attention":
            return gpu_cases.decode_case(shape[0], shape[1] // e, shape[2] // e, shape[3], e, device)
        return zloss_case(*shape, self.dtype, device)

    def jobs(self, case: Case, compiled: bool) -> dict[str, Job]:
        """What is timed: the kernels ("own") and torch's operations, as a decode step or a training step runs them."""
        reference = case.variants["reference"]
        if not case.inputs:  # a decode step has no gradient
            return {"torch": reference, "own": case.variants["cuda"]}
        if in_place := case.extra.get("in place"):  # the loss is outside of the blocks that training compiles
            return {"torch": with_kernels("reference", in_place), "own": with_kernels(self.kernels, in_place)}
        own = with_kernels(self.kernels, gradients(case.variants[self.kernels], case))
        jobs = {"torch": gradients(reference, case), "own": own}
        return jobs | (compiled_job(reference, case) if compiled else {})


def compiled_job(function: Callable[..., Tensor], case: Case) -> dict[str, Job]:
    """The function compiled, or nothing where torch.compile does not work, for which there are many reasons."""
    torch.compiler.reset()  # else it would take the next shape for a sign that sizes vary
    job = gradients(torch.compile(function, dynamic=False), case)
    try:
        job()
    except Exception as error:
        say(
            f"torch.compile does not work here ({shown(error)}): kernels are compared with torch's own operations alone"
        )
        return {}
    return {"compiled": job}


def gradients(function: Callable[..., Tensor], case: Case) -> Job:
    """Forward and backward."""
    return lambda: torch.autograd.grad(function(*case.inputs), case.inputs)


# The names that options have, and what takes least time first.
OPS = {"zloss": "zloss_cross_entropy", "decode": "decode_attention", "attention": "qknorm_rope_attention"}


def subjects(op: str = "all") -> list[Subject]:
    """All of them, or those of an op of OPS. The largest heads come first: those of the 1.4B and of Chameleon."""
    found = []
    for name in (name for short, name in OPS.items() if op in ("all", short)):
        head_dims = {"zloss_cross_entropy": (None,), "decode_attention": gpu.HEAD_DIMS}.get(name, HEAD_DIMS)
        for dtype, e in product(CUDA_DTYPES[name], reversed(head_dims)):
            if name == "qknorm_rope_attention":
                found.append(Subject(name, dtype, e, "vendor"))
            if e is None or e in gpu.HEAD_DIMS:
                found.append(Subject(name, dtype, e, "cuda"))
    return found


def check_all(device: torch.device, op: str, effort: Effort = FULL) -> None:
    """Check the kernels of an op, or of all, once. Raises CheckFailed."""
    for subject in subjects("zloss" if op == "linear_zloss" else op):
        gpu_checks.check_all(subject.problems(effort, device), subject.dtype, 1, device)


def checked_cases(device: torch.device, op: str) -> Iterator[Case]:
    """Check the kernels that the bench `kernels` times, then yield its cases."""
    check_all(device, op)
    yield from gpu_cases.cases(device, op)


# ---------------------------------------------------------------------------------------------------------------------
# One proof, in a process of its own


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """On a CPU, kernels run in the emulator inside."""
    torch.manual_seed(0)
    with nullcontext() if device.type == "cuda" else emulated():
        yield


def prove(subject: Subject, effort: Effort, device: torch.device) -> Entry:
    """Check the subject, then time it. Raises CheckFailed, or whatever a broken kernel makes torch raise."""
    with on(device):
        errors = gpu_checks.check_all(subject.problems(effort, device), subject.dtype, effort.runs, device)
        if subject.op == "zloss_cross_entropy" and subject.dtype == BF16:
            check_many(effort, device)
        return time_it(subject, effort, device, errors)


def check_many(effort: Effort, device: torch.device) -> None:
    try:
        gpu_checks.check_many_logits(effort.many, effort.widths[-1], device)
    except torch.OutOfMemoryError:
        say(f"{effort.many:,} logits at once are not checked: they do not fit into the memory")


def time_it(subject: Subject, effort: Effort, device: torch.device, errors: dict[str, float]) -> Entry:
    """Time each shape that fits into the memory."""
    times = {}
    for shape in effort.shapes[subject.op]:
        try:
            name, seconds = time_shape(subject, shape, effort, device)
        except torch.OutOfMemoryError:
            say(f"{subject.name} is not timed at {shape}, which does not fit into the memory")
            continue
        times[name] = 1e3 * seconds.pop("own"), 1e3 * min(seconds.values())
    if not times:
        return Entry(False, "no shape to time fits into the memory")
    own, torchs = zip(*times.values(), strict=True)
    return Entry(True, "", errors, tuple(times), {"own": own, "torch": torchs})


def time_shape(subject: Subject, shape: tuple, effort: Effort, device: torch.device) -> tuple[str, dict[str, float]]:
    """The shape's name, and median seconds of each job. Its tensors are gone when it returns."""
    case = subject.case(shape, device)
    jobs = subject.jobs(case, subject.head_dim in effort.compiled)
    return case.name, median_seconds(jobs, effort.rounds, device, 10.0, launches=False)
