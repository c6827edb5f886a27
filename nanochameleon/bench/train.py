"""Training steps beside transformers' Chameleon of the same shape and weights: forward, loss, backward, clip, AdamW.

Ours is the objective as train.py runs it, in each precision, and on a GPU also with its blocks compiled; the fastest is
the row `nano`. Theirs is their own forward with labels under the same optimizer, eager and compiled, in fp32 and bf16;
for bf16 the faster of autocast and bf16 weights counts. Ids are text alone: their forward masks the logits of image
codes. On a CPU variants take turns, by the wall clock or, where torch has one thread, by the process's own, which
neighbours hardly disturb (OMP_NUM_THREADS=1 on a busy machine). On a GPU, whose memory does not hold all of them, they
follow one another, and their peak memory is a row, too.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from nanochameleon.bench.engine import as_transformers, random_model
from nanochameleon.bench.rows import Row, device_name, rows_of, take_turns
from nanochameleon.config import ModelConfig, OptimConfig
from nanochameleon.errors import say
from nanochameleon.kernels.cpu.malloc import tune_malloc
from nanochameleon.kernels.zloss.cross_entropy import Expected
from nanochameleon.optim import clip_gradients, make_adamw
from nanochameleon.packing import Batch
from nanochameleon.training.flops import PEAK_FLOPS, flops_per_token
from nanochameleon.training.objective import Objective, autocast
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

Z_LOSS, CLIP = 1e-5, 1.0
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """B rows of T ids."""

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


def text_ids(case: Case, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(case.vocab.first_text, case.vocab.size, (case.batch, case.t), generator=generator).to(device)


def our_step(case: Case, model: Chameleon, precision: str, compiled: bool) -> Step:
    device = model.output.weight.device
    ids = text_ids(case, device)
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    positions = torch.arange(case.t, device=device).expand(ids.shape)
    batch, objective = Batch(ids, targets, torch.zeros_like(ids), positions), Objective(model, case.vocab, precision)
    optimizer, count = make_adamw(model.train(), OptimConfig()), float((targets >= 0).sum())
    if compiled:
        for block in model.layers:
            block.compile()

    def step() -> float:
        optimizer.zero_grad()
        parts = objective(batch, None, Expected(Z_LOSS, 1 / count)).parts
        loss = parts.total(Z_LOSS, count)
        loss.backward()
        clip_gradients(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def their_step(case: Case, peer: nn.Module, precision: str, compiled: bool) -> Step:
    """precision: fp32, bf16 by autocast, or "weights", bf16 all through."""
    trained = [p for name, p in peer.named_parameters() if "vqmodel" not in name]
    ids, run = text_ids(case, trained[0].device), torch.compile(peer) if compiled else peer
    peer.to(torch.bfloat16 if precision == "weights" else torch.float32).train()
    optimizer = torch.optim.AdamW(trained, lr=OptimConfig().lr, betas=(0.9, 0.95), eps=1e-5, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        with autocast("bf16" if precision == "bf16" else "fp32", ids.device):
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def steps(case: Case, device: torch.device, quick: bool) -> dict[str, Callable[[], Step]]:
    """How to make the step of each variant: models are built when it is its turn, all with the same weights."""
    theirs = [precision for wish in case.precisions for precision in ([wish, "weights"] if wish == "bf16" else [wish])]
    ways = [("eager", False)] if quick else [("eager", False), ("compile", True)]

    def model() -> Chameleon:
        return random_model(case.cfg, device, torch.float32)

    found = {}
    for way, compiled in ways:
        for precision in case.precisions if not compiled or device.type == "cuda" else ():
            found[f"nano {way} {precision}"] = lambda p=precision, c=compiled: our_step(case, model(), p, c)
        for p in theirs if find_spec("transformers") else ():
            found[f"transformers {way} {p}"] = lambda p=p, c=compiled: their_step(
                case, as_transformers(model(), case.vocab), p, c
            )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def fastest(taken: dict[str, float]) -> dict[str, float]:
    """Ours under the name `nano` at its best; of theirs one bf16 each, the faster one."""
    best = {"nano": min(seconds for name, seconds in taken.items() if name.startswith("nano"))}
    for name, seconds in taken.items():
        if name.startswith("transformers"):
            name = name.replace("weights", "bf16")
            best[name] = min(seconds, best.get(name, seconds))
    return best


def check(case: Case, device: torch.device) -> None:
    """Raises AssertionError unless both models give text the same logits before they are trained."""
    if find_spec("transformers"):
        model = random_model(case.cfg, device, torch.float32)
        ids = text_ids(replace(case, batch=1, t=min(case.t, 64)), device)
        with torch.no_grad():
            ours, theirs = model.logits(model(ids)), as_transformers(model, case.vocab)(input_ids=ids).logits
        text = slice(case.vocab.first_text, None)
        torch.testing.assert_close(theirs[..., text], ours[..., text], rtol=1e-3, atol=1e-3)


def one_by_one(jobs: dict[str, Callable[[], Step]], rounds: int, seconds: float) -> tuple[dict, dict]:
    """(median seconds, peak GiB) of each variant that fits the memory."""
    taken, peak = {}, {}
    for name, make in jobs.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            taken |= take_turns({name: make()}, rounds, seconds)
        except torch.OutOfMemoryError:
            say(f"{name} does not fit the memory")
        peak[name] = torch.cuda.max_memory_allocated() / 2**30
    return taken, peak


def bench(device: torch.device, quick: bool, cases: list[Case] | None = None) -> Iterator[Row]:
    if not find_spec("transformers"):
        say("transformers is not installed: skipped")
    tune_malloc()  # for theirs, too
    rounds, seconds, where = (3, 20.0, device_name(device)) if quick else (9, 120.0, device_name(device))
    for case in cases or CASES[device.type]:
        check(case, device)
        jobs = steps(case, device, quick)
        if device.type == "cpu":
            taken, peak = take_turns({name: make() for name, make in jobs.items()}, rounds, seconds), {}
        else:
            taken, peak = one_by_one(jobs, rounds, seconds)
        best = fastest(taken)
        yield from rows_of("train", case.name, "nano", best, case.n_tokens, "tokens/s", where)
        for name, each in taken.items():
            yield from rows_of("train", f"{case.name}, each", name, {name: each}, case.n_tokens, "tokens/s", where)
        for name, gib in peak.items():
            yield from rows_of("train", f"{case.name}, peak", name, {name: 1 / gib}, 1.0, "GiB", where)
        if device.type == "cuda":
            share = flops_per_token(case.cfg, case.t) * case.n_tokens / PEAK_FLOPS["H100"]  # of a second at the peak
            yield from rows_of("train", f"{case.name}, MFU", "nano", best, share, "of 989 TFLOP/s", where)
