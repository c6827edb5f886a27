"""Time training steps next to transformers' Chameleon with the same shape and weights.

A step is forward, loss, backward, clipping and AdamW. Ours is the objective as train.py runs it, in each precision, and
on a GPU also with compiled blocks and with our CUDA kernels; the fastest is the row `nano`. Theirs is their forward
with labels and the same optimizer, eager and compiled, in fp32 and bf16; for bf16 the faster of autocast and bf16
weights counts. All tokens are text, since their forward masks the logits of image codes. Each sequence is one document,
except in our rows `packed`: they have several, as in train.py, and are not compared with transformers.

On a CPU variants alternate, and OMP_NUM_THREADS=1 measures CPU time, for a busy machine. The memory of a GPU does not
hold all variants at once, so there they run one after the other, and their peak memory is a row, too.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from nanochameleon.bench.engine import as_transformers, random_model
from nanochameleon.bench.limits import Limits, measure_limits
from nanochameleon.bench.measure import median_seconds, that_run
from nanochameleon.bench.rows import Row, device_name, make_row, rows_against_peers
from nanochameleon.bench.work import training_work, visible_pairs
from nanochameleon.config import ModelConfig, OptimConfig
from nanochameleon.errors import say, shown
from nanochameleon.kernels import use_kernels
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.cpu.malloc import tune_malloc
from nanochameleon.optim import clip_gradients, make_adamw
from nanochameleon.packing import Batch, pack
from nanochameleon.parallel.compile import compile_blocks
from nanochameleon.training.flops import flops_per_token, peak_flops
from nanochameleon.training.objective import Objective
from nanochameleon.training.precision import autocast
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

Z_LOSS, CLIP = 1e-5, 1.0
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A model and a batch of `batch` sequences of `t` tokens."""

    name: str
    cfg: ModelConfig
    vocab: Vocab
    batch: int
    t: int
    precisions: tuple[str, ...] = ("bf16",)

    @property
    def n_tokens(self) -> int:
        return self.batch * self.t


SMALL = ModelConfig(2_048, 256, 6, 8, max_seq_len=256)
CASES = {
    "cpu": [Case("256 x 6 layers, 8 x 256", SMALL, Vocab(2_048, 512, 8, 2), 8, 256, ("fp32", "bf16"))],
    "cuda": [
        Case("1.4B, 4 x 4096", ModelConfig(dim=2_048, n_layers=22, n_heads=16), Vocab(), 4, 4_096),
        Case("288M, 16 x 2048", ModelConfig(dim=1_024, n_layers=12, n_heads=8, max_seq_len=2_048), Vocab(), 16, 2_048),
    ],
}


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@dataclass(frozen=True)
class Variant:
    """One way to run our step."""

    precision: str
    compiled: bool = False
    packed: bool = False  # several documents per sequence
    kernels: str = "auto"

    @property
    def name(self) -> str:
        words = "nano", "compile" if self.compiled else "eager", self.precision
        more = ["packed"] * self.packed + [self.kernels] * (self.kernels != "auto")
        return " ".join([*words, *more])


def variants(case: Case, device: torch.device, quick: bool) -> list[Variant]:
    """The ways to run our step. On a GPU the ones with kernels that `auto` may not take come last."""
    eager = [Variant(p, packed=packed) for p in case.precisions for packed in (False, True)]
    if device.type != "cuda":
        return eager
    compiled = [] if quick else [replace(each, compiled=True) for each in eager]
    own = [replace(each, kernels=kernels) for kernels in ("vendor", "cuda") for each in compiled or eager]
    return eager + compiled + own


def text_tokens(case: Case, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(case.vocab.first_text, case.vocab.size, (case.batch, case.t), generator=generator).to(device)


def text_batch(case: Case, packed: bool) -> Batch:
    """Return a batch of text on the CPU. packed: documents of T / 64 to T tokens, else each sequence is one."""
    if not packed:
        return pack(text_tokens(case, torch.device("cpu")).tolist(), case.t, case.vocab.pad)
    generator = torch.Generator().manual_seed(0)
    lengths = (case.t / 64 ** torch.rand(16 * case.batch, generator=generator)).clamp(min=2)
    tokens = text_tokens(replace(case, batch=len(lengths)), torch.device("cpu")).tolist()
    docs = [row[: int(n)] for row, n in zip(tokens, lengths, strict=True)]
    return pack(docs, case.t, case.vocab.pad)[: case.batch]


def our_step(case: Case, model: Chameleon, variant: Variant) -> Step:
    batch = text_batch(case, variant.packed)
    count = float((batch.targets >= 0).sum())
    batch, objective = batch.to(model.output.weight.device), Objective(model, case.vocab, variant.precision)
    optimizer = make_adamw(model.train(), OptimConfig())
    if variant.compiled:
        compile_blocks(model.layers, "on", model.output.weight.device)

    def step() -> float:
        optimizer.zero_grad()
        with use_kernels(variant.kernels):
            loss = objective(batch, None, Z_LOSS, count).next_token.loss
            loss.backward()
        clip_gradients(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def their_step(case: Case, peer: nn.Module, precision: str, compiled: bool) -> Step:
    """precision: fp32, bf16 (autocast) or "weights" (bf16 weights)."""
    trained = [p for name, p in peer.named_parameters() if "vqmodel" not in name]
    tokens, run = text_tokens(case, trained[0].device), torch.compile(peer) if compiled else peer
    peer.to(torch.bfloat16 if precision == "weights" else torch.float32).train()
    optimizer = torch.optim.AdamW(trained, lr=OptimConfig().lr, betas=(0.9, 0.95), eps=1e-5, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        with autocast("bf16" if precision == "bf16" else "fp32", tokens.device):
            loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def steps(case: Case, device: torch.device, quick: bool) -> dict[str, Callable[[], Step]]:
    """Return functions that build each variant's step. All models have the same weights."""
    theirs = [*case.precisions, "weights"] if "bf16" in case.precisions else case.precisions
    ways = [("eager", False)] if quick else [("eager", False), ("compile", True)]

    def model() -> Chameleon:
        return random_model(case.cfg, device, torch.float32)

    found = {each.name: lambda each=each: our_step(case, model(), each) for each in variants(case, device, quick)}
    for way, compiled in ways:
        for p in theirs if find_spec("transformers") else ():
            found[f"transformers {way} {p}"] = lambda p=p, c=compiled: their_step(
                case, as_transformers(model(), case.vocab), p, c
            )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def our_fastest(taken: dict[str, float]) -> str | None:
    """Return the name of our fastest variant that does what transformers does; None without one."""
    ours = [name for name in taken if name.startswith("nano") and "packed" not in name]
    return min(ours, key=taken.__getitem__, default=None)


def fastest(taken: dict[str, float]) -> dict[str, float]:
    """Return our fastest variant as `nano`, and of theirs in bf16 the faster one of the two; {} without one of ours."""
    ours = our_fastest(taken)
    if ours is None:
        return {}
    best = {"nano": taken[ours]}
    for name, seconds in taken.items():
        if name.startswith("transformers"):
            name = name.replace("weights", "bf16")
            best[name] = min(seconds, best.get(name, seconds))
    return best


def least_seconds(case: Case, name: str, limits: Limits) -> float:
    """Return the limit of a variant's step."""
    words = name.split()
    documents = Documents.of(text_batch(case, "packed" in words).doc_ids)
    dtype = torch.float32 if "fp32" in words else torch.bfloat16
    pairs = visible_pairs(case.batch, case.t, documents)
    return limits.seconds(training_work(case.cfg, case.n_tokens, pairs, dtype))


def check(case: Case, device: torch.device) -> None:
    """Raise AssertionError unless both models have the same logits of text before training."""
    if find_spec("transformers"):
        model = random_model(case.cfg, device, torch.float32)
        tokens = text_tokens(replace(case, batch=1, t=min(case.t, 64)), device)
        with torch.no_grad():
            ours, theirs = model.logits(model(tokens)), as_transformers(model, case.vocab)(input_ids=tokens).logits
        text = slice(case.vocab.first_text, None)
        torch.testing.assert_close(theirs[..., text], ours[..., text], rtol=1e-3, atol=1e-3)


def measure_alone(step: Step, rounds: int, device: torch.device, max_seconds: float) -> tuple[float, float]:
    """Return (median seconds, peak GiB) of a step on a GPU: all that is allocated, its model included."""
    step()  # makes the optimizer's state, and may compile
    torch.cuda.reset_peak_memory_stats(device)
    step()
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    return median_seconds({"": step}, rounds, device, max_seconds)[""], peak


def one_by_one(
    jobs: dict[str, Callable[[], Step]], rounds: int, device: torch.device, max_seconds: float
) -> tuple[dict, dict]:
    """Return (median seconds, peak GiB) of each variant that runs; prints why another does not."""
    taken, peak = {}, {}
    for name, make in jobs.items():
        gc.collect()  # the variant before
        torch.cuda.empty_cache()
        torch.compiler.reset()  # torch stops compiling a function after 8 variants of it
        try:
            taken[name], peak[name] = measure_alone(make(), rounds, device, max_seconds)
        except Exception as error:  # too little memory, or any of a dozen kinds that torch.compile raises
            say(f"{name} is left out: {type(error).__name__}: {shown(error, 160)}")
    return taken, peak


def step_rows(case: Case, name: str, seconds: float, gib: float, device: torch.device, limits: Limits) -> list[Row]:
    """Rows of one of our steps on a GPU: tokens/s, MFU where the GPU's peak is known, and peak memory.

    Packed sequences have no MFU: attention within documents takes fewer FLOPs than flops_per_token counts.
    """
    rate, of_limit = case.n_tokens / seconds, least_seconds(case, name, limits) / seconds
    rows = [make_row("train", case.name, name, rate, "tokens/s", device, of_limit=of_limit)]
    if (peak := peak_flops(device_name(device))) and "packed" not in name:
        mfu = flops_per_token(case.cfg, case.t) * case.n_tokens / seconds / peak
        rows.append(make_row("train", f"{case.name}, MFU", name, mfu, f"of {peak / 1e12:.0f} TFLOP/s", device))
    return [*rows, make_row("train", f"{case.name}, peak", name, gib, "GiB", device)]


def bench(device: torch.device, quick: bool, cases: list[Case] | None = None) -> Iterator[Row]:
    if not find_spec("transformers"):
        say("transformers is not installed: skipped")
    tune_malloc()  # it speeds theirs up, too
    rounds, max_seconds = (3, 20.0) if quick else (9, 120.0)
    limits = measure_limits(device)
    yield from limits.rows("train", device)
    for case in cases or CASES[device.type]:
        check(case, device)
        jobs, peaks = steps(case, device, quick), {}
        if device.type == "cpu":
            built = that_run(case.name, {name: make() for name, make in jobs.items()})
            seconds = median_seconds(built, rounds, device, max_seconds)
        else:
            seconds, peaks = one_by_one(jobs, rounds, device, max_seconds)
        if not (best := fastest(seconds)):
            continue
        measured_as = {name: name for name in best} | {"nano": our_fastest(seconds)}
        least = {name: least_seconds(case, variant, limits) for name, variant in measured_as.items()}
        yield from rows_against_peers("train", case.name, "nano", best, case.n_tokens, "tokens/s", device, least)
        for name, each in seconds.items():
            rate, of_limit = case.n_tokens / each, least_seconds(case, name, limits) / each
            yield make_row("train", f"{case.name}, each", name, rate, "tokens/s", device, of_limit=of_limit)
        for name, gib in peaks.items():
            yield make_row("train", f"{case.name}, peak", name, gib, "GiB", device)
        if device.type == "cuda" and (peak := peak_flops(device_name(device))):
            mfu = flops_per_token(case.cfg, case.t) * case.n_tokens / peak  # of a step of one second
            unit = f"of {peak / 1e12:.0f} TFLOP/s"
            yield from rows_against_peers("train", f"{case.name}, MFU", "nano", best, mfu, unit, device)
