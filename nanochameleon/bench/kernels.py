"""Time the kernels next to torch's own operations and torch.compile. Each case is checked before it is timed.

Cases: attention (the whole op), zloss (cross-entropy on logits), linear_zloss (with the output layer), step (a whole
training step); on a GPU also decode (gpu_cases.py). Variants: reference, compile (of the reference), numba or cuda; for
zloss also `in place` and a `copy` of the logits, a lower bound for anything that writes a gradient; for attention on a
GPU `vendor`, torch's own attention after our norm and rotation. linear_zloss has rows of its peak memory, too.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.bench.limits import Limits, measure_limits
from nanochameleon.bench.measure import median_seconds, peak_bytes, that_run
from nanochameleon.bench.rows import Row, rows_against_one
from nanochameleon.bench.work import (
    Work,
    attention_work,
    linear_zloss_work,
    training_work,
    visible_pairs,
    zloss_work,
)
from nanochameleon.config import ModelConfig, OptimConfig
from nanochameleon.kernels import dispatch, qknorm_rope_attention, use_kernels
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import qknorm_rope_attention_reference
from nanochameleon.kernels.attention.steps import attention_loops
from nanochameleon.kernels.cpu.malloc import tune_malloc
from nanochameleon.kernels.dispatch import NAMES, why_bf16_unavailable
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy_, zloss_cross_entropy_reference
from nanochameleon.kernels.zloss.steps import zloss_loops
from nanochameleon.losses import fused_next_token_loss, next_token_loss
from nanochameleon.optim import make_optimizer
from nanochameleon.transformer import Chameleon, compute_freqs_cis
from nanochameleon.vocab import Vocab

Z_LOSS, VOCAB = 1e-5, Vocab()  # which tokens are images does not matter for the time


@dataclass(frozen=True)
class Case:
    """inputs: the tensors to differentiate with respect to. Each variant maps them to one number."""

    name: str
    inputs: list[Tensor]
    variants: dict[str, Callable[..., Tensor]]
    extra: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)  # timed with f+b, as they are
    extra_forward: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)  # timed with f
    memory: bool = False  # whether its peak is measured, too
    forward: bool = True  # whether forward alone is timed; not where it makes the gradients as well
    work: dict[str, Work] = dataclasses.field(default_factory=dict)  # of a pass, or of a variant that does less

    def limits(self, name: str, variants: Iterable[str], limits: Limits) -> dict[str, float]:
        """The least milliseconds of each variant of the pass `name`, where its work is known."""
        found = {variant: self.work.get(variant, self.work.get(name)) for variant in variants}
        return {variant: 1e3 * limits.seconds(work) for variant, work in found.items() if work}


def with_kernels(name: str, function: Callable) -> Callable:
    def run(*args):
        with use_kernels(name):
            return function(*args)

    return run


def own(device: torch.device) -> str:
    """The name of our own kernels on this device. The emulator makes a CPU a GPU."""
    emulated = dispatch.why_cuda_unavailable("zloss_cross_entropy", device, torch.bfloat16) is None
    return "cuda" if device.type == "cuda" or emulated else "numba"


# ---------------------------------------------------------------------------------------------------------------------
# Cases


def documents(b: int, t: int, scale: int = 1) -> Tensor:
    """Return document ids of sequences packed with documents of scale times 82 to 170 tokens, the toy's: (B, T)."""
    lengths = scale * torch.tensor([82, 170, 110, 94, 82, 120, 88, 164])
    ends = lengths.repeat(-(-t // 82)).cumsum(0)
    return torch.stack([torch.bucketize(torch.arange(t) + 37 * i, ends, right=True) for i in range(b)])


def as_in_training(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A GPU trains in bfloat16 under autocast; without it torch has no norm there whose weights are float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16 and device.type == "cuda")


def attention_case(b: int, t: int, h: int, e: int, dtype: torch.dtype, packed: int, device: torch.device) -> Case:
    """packed: how many times as long as the toy's documents are; 0 for one document a sequence."""
    generator = torch.Generator(device).manual_seed(0)
    heads = [torch.randn(b, t, h, e, generator=generator, device=device).to(dtype) for _ in range(4)]
    q, k, v = (x.requires_grad_() for x in heads[:3])
    norms = [torch.full((1, e), x, device=device).requires_grad_() for x in (1.0, 0.0, 1.0, 0.0)]
    table = compute_freqs_cis(torch.arange(t, device=device).expand(b, t), e, 10_000.0)
    docs = Documents.of(documents(b, t, packed)).to(device) if packed else None

    def of(function: Callable) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor, *norms: Tensor) -> Tensor:
            with as_in_training(device, q.dtype):
                out = function(q, k, v, table, docs, norms[:2], norms[2:], 1e-5)
            return (out * heads[3]).float().sum()

        return run

    name = f"attention B{b} H{h} T{t} D{e} {short(dtype)}{' packed' if packed else ''}"
    names = ("cuda", "vendor") if own(device) == "cuda" else (own(device),)
    if why_bf16_unavailable(device, dtype) is None:
        names += ("bf16",)
    ours = {name: of(with_kernels(name, qknorm_rope_attention)) for name in names}
    variants, plain = {"reference": of(qknorm_rope_attention_reference), **ours}, {}
    if device.type == "cpu" and dtype == torch.float32 and packed:
        arrays = [x.detach().numpy() for x in (q, k, v, docs.ids, torch.empty_like(q))]
        plain = {"loops": lambda: attention_loops(*arrays)}  # without norm and rotation
    work = attention_work(h, e, b * t, visible_pairs(b, t, docs), dtype)
    return Case(name, [q, k, v, *norms], variants, extra_forward=plain, work=work)


def zloss_case(n: int, v: int, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(n, v, generator=generator, device=device).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator, device=device)

    def ours(logits: Tensor) -> Tensor:
        return next_token_loss(logits, targets, VOCAB, Z_LOSS, 1.0).loss

    def in_place() -> tuple[Tensor, Tensor]:
        """As a training step's output layer does it (kernels/zloss/linear.py), on whatever the last one left."""
        return zloss_cross_entropy_(buffer, targets, Z_LOSS, 1.0)

    buffer, copied = logits.detach().clone(), torch.empty_like(logits)
    extra = {"in place": in_place, "copy": lambda: copied.detach().copy_(buffer)}
    if device.type == "cpu" and dtype == torch.float32:
        rows = [torch.empty(n).numpy() for _ in range(2)]
        arrays = logits.detach().numpy(), targets.numpy(), Z_LOSS, 1 / n, *rows, copied.detach().numpy()
        extra["loops"] = lambda: zloss_loops(*arrays)
    variants = {
        "reference": lambda logits: reference_loss(logits, targets),
        own(device): with_kernels(own(device), ours),
    }
    return Case(f"zloss {n} x {v} {short(dtype)}", [logits], variants, extra, work=zloss_work(n, v, dtype))


def reference_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Differentiated by autograd."""
    cross_entropy, log_z = zloss_cross_entropy_reference(logits, targets)
    return (cross_entropy + Z_LOSS * log_z.square()).sum()


def linear_case(n: int, v: int, d: int, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator, device=device) * d**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator, device=device)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_next_token_loss(hidden, weight, targets, VOCAB, Z_LOSS, 1.0).loss

    variants = {
        "reference": lambda hidden, weight: reference_loss(F.linear(hidden, weight), targets),
        own(device): with_kernels(own(device), ours),
    }
    name = f"linear_zloss {n} x {d} x {v} {short(dtype)}"
    work = linear_zloss_work(n, v, d, dtype)
    return Case(name, [hidden, weight], variants, memory=True, forward=False, work=work)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def cases(device: torch.device, quick: bool, op: str) -> Iterator[Case]:
    wide, narrow = torch.float32, torch.bfloat16
    if op in ("all", "attention"):
        yield attention_case(8, 256, 4, 48, narrow, 1, device)
        if not quick:
            yield attention_case(8, 256, 4, 48, wide, 1, device)
            for b, h, t in ((8, 8, 256), (4, 8, 512), (2, 8, 1_024)):
                yield attention_case(b, t, h, 64, wide, 0, device)
    if op in ("all", "zloss"):
        yield zloss_case(2_048, 940, narrow, device)
        if not quick:
            yield zloss_case(2_048, 940, wide, device)
            for n, v in ((2_048, 4_096), (1_024, 16_384), (512, 65_536)):
                yield zloss_case(n, v, wide, device)
    if op in ("all", "linear_zloss"):
        yield (linear_case(256, 4_096, 256, wide, device) if quick else linear_case(1_024, 16_384, 256, wide, device))
        if not quick:
            yield linear_case(512, 65_536, 256, wide, device)
            yield linear_case(1_024, 16_384, 256, narrow, device)


# ---------------------------------------------------------------------------------------------------------------------
# Checking and timing


def check(case: Case) -> None:
    """Raise AssertionError where our gradients' error exceeds twice the reference's. The truth is float64."""
    exact = [x.detach().double().requires_grad_() for x in case.inputs]
    truth = torch.autograd.grad(case.variants["reference"](*exact), exact)
    errors = {}
    for name, function in case.variants.items():
        result = torch.autograd.grad(function(*case.inputs), case.inputs)
        errors[name] = [((x - y).norm() / y.norm()).item() for x, y in zip(result, truth, strict=True)]
    for name, each in errors.items():
        if not all(error <= 2 * plain + 1e-5 for error, plain in zip(each, errors["reference"], strict=True)):
            raise AssertionError(f"{case.name}: {name} is off by {each}, the reference by {errors['reference']}")


def checked(found: Iterator[Case]) -> Iterator[Case]:
    for case in found:
        check(case)
        yield case


def measure(case: Case, rounds: int, device: torch.device, limits: Limits) -> list[Row]:
    """Measure the forward pass, then forward and backward where a case has inputs to differentiate."""

    def backward(name: str, function: Callable) -> Callable[[], object]:
        """Request the kernels around both passes: the backward pass asks again which kernels to run."""
        return with_kernels(
            name if name in NAMES else "auto", lambda: torch.autograd.grad(function(*case.inputs), case.inputs)
        )

    def forward(function: Callable) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                function(*case.inputs)

        return run

    alone = {name: forward(function) for name, function in case.variants.items()} | case.extra_forward
    both = {name: backward(name, function) for name, function in case.variants.items()}
    both |= {name: with_kernels(own(device), job) for name, job in case.extra.items()}
    passes = ({"f": alone} if case.forward else {}) | ({"f+b": both} if case.inputs else {})
    passes, rows = {name: that_run(f"{case.name} {name}", jobs) for name, jobs in passes.items()}, []
    for name, jobs in passes.items():
        costs = {job: 1e3 * seconds for job, seconds in median_seconds(jobs, rounds, device, launches=False).items()}
        best = case.limits(name, costs, limits)
        rows += rows_against_one("kernels", f"{case.name} {name}", costs, baseline(costs), "ms", device, best)
    for name, jobs in passes.items() if case.memory else ():
        costs = {job: peak_bytes(run, device) / 2**20 for job, run in jobs.items()}
        rows += rows_against_one("kernels", f"{case.name} {name} memory", costs, baseline(costs), "MiB", device)
    return rows


def baseline(costs: dict[str, float]) -> str | None:
    """The variant that the others are compared with: the best one of torch's that runs."""
    return next((name for name in ("compile", "reference", *costs) if name in costs), None)


def step_rows(precision: str, rounds: int, device: torch.device, limits: Limits) -> list[Row]:
    """Measure a training step of 6 layers of 256, 8 sequences of 256 tokens: forward, loss, backward, AdamW."""
    cfg = ModelConfig(vocab_size=940, dim=256, n_layers=6, n_heads=4, multiple_of=64, max_seq_len=256)
    torch.manual_seed(0)
    model = Chameleon(cfg).to(device)
    optimizer = make_optimizer(model, OptimConfig("adamw"))
    tokens, docs = torch.randint(940, (8, 256), device=device), Documents.of(documents(8, 256)).to(device)
    positions = torch.arange(256, device=device).expand(8, 256)

    def step(name: str) -> None:
        optimizer.zero_grad()
        with use_kernels(name), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model.logits(model(tokens, positions, docs)).flatten(0, 1)
            targets = tokens.flatten()
            next_token_loss(logits, targets, VOCAB, Z_LOSS, targets.numel(), overwrite_logits=True).loss.backward()
        optimizer.step()

    case = f"step dim 256 x 6 layers {precision}"
    jobs = that_run(case, {name: lambda name=name: step(name) for name in ("reference", own(device), "auto")})
    costs = {name: 1e3 * seconds for name, seconds in median_seconds(jobs, rounds, device).items()}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    work = training_work(cfg, tokens.numel(), visible_pairs(8, 256, docs), dtype)
    best = dict.fromkeys(costs, 1e3 * limits.seconds(work))
    return rows_against_one("kernels", case, costs, baseline(costs), "ms", device, best)


def bench(found: Iterator[Case], device: torch.device, quick: bool, op: str = "all") -> Iterator[Row]:
    """Time checked cases of an op, or of all. quick leaves out torch.compile, which takes minutes."""
    torch.set_num_threads(1)
    tune_malloc()
    rounds, limits = 5 if quick else 9, measure_limits(device)
    yield from limits.rows("kernels", device)
    for case in found:
        if not quick:
            case.variants["compile"] = torch.compile(case.variants["reference"])
        yield from measure(case, rounds, device, limits)
    kinds = ("bf16",) if device.type == "cuda" else ("fp32", "bf16")  # our CUDA kernels take attention in bf16 alone
    for precision in kinds if op in ("all", "step") else ():
        yield from step_rows(precision, rounds, device, limits)
