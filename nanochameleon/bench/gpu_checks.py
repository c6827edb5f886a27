"""Checks of the CUDA kernels on the device that they run on: `prove` and `kernels` make them before they time anything.

A Problem is an op with inputs. Its results are compared with float64: the error is at most twice that of torch's own
operations in the same dtype. At the same time its tensors have bands, its outputs start as NaN, and its inputs must
stay as they were. `same_bits` repeats it: no kernel has atomics, so a difference between two runs is a race.

The emulator in kernels/gpu/emulator/ shows on a CPU that the kernels are correct by the manual. Only these checks on
hardware can show that they are correct on the hardware.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.bench.bands import Bands
from nanochameleon.bench.kernels import Z_LOSS, as_in_training
from nanochameleon.kernels import qknorm_rope_attention, use_kernels, zloss_cross_entropy
from nanochameleon.kernels.attention.decode import decode_attention_, decode_attention_reference_, see_cache
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import (
    apply_rotary_emb,
    attention_reference,
    layer_norm,
    qknorm_rope_attention_reference,
    visible,
)
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.zloss.cross_entropy import (
    zloss_cross_entropy_,
    zloss_cross_entropy_reference,
    zloss_gradient_,
)
from nanochameleon.kernels.zloss.linear import linear_zloss_cross_entropy
from nanochameleon.transformer import compute_freqs_cis

BF16, EPS = torch.bfloat16, 1e-5
Tensors = dict[str, Tensor]


class CheckFailed(AssertionError):
    """A kernel did what it must not do; the message says what."""


@dataclass(frozen=True)
class Problem:
    """run gets copies of the inputs, and may overwrite those named in `overwritten`."""

    name: str
    inputs: Tensors
    run: Callable[[Tensors], Tensors]  # by the kernels -> results by name
    reference: Callable[[Tensors, torch.dtype], Tensors]  # by torch's operations in this dtype
    overwritten: tuple[str, ...] = ()
    repeats: bool = True  # whether every run has the same bits; the gradient of torch's attention adds in any order


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check(problem: Problem, dtype: torch.dtype) -> dict[str, float]:
    """Run once. Return the error of each result, as a share of what is allowed. Raises CheckFailed."""
    truth, plain = (problem.reference(problem.inputs, kind) for kind in (torch.float64, dtype))
    bands = Bands()
    inputs = {name: bands.copy(x, name) for name, x in problem.inputs.items()}
    with bands.everywhere():
        result = problem.run(inputs)
    if outside := bands.broken():
        raise CheckFailed(f"{problem.name}: it writes outside {outside}")
    for name in problem.inputs.keys() - set(problem.overwritten):
        if not same(inputs[name], problem.inputs[name]):
            raise CheckFailed(f"{problem.name}: its input {name} has changed")
    return {name: compare(f"{name} of {problem.name}", result[name], plain[name], truth[name]) for name in truth}


def same(x: Tensor, y: Tensor) -> bool:
    """Whether both have the same bits."""
    return torch.equal(*(z.contiguous().view(-1).view(torch.uint8) for z in (x, y)))


def compare(name: str, result: Tensor, plain: Tensor, truth: Tensor) -> float:
    """Return the error as a share of the allowed one. Raises CheckFailed beyond that."""
    if not result.isfinite().all():
        raise CheckFailed(f"{name} has numbers that are not finite, such as those of memory that was not written")
    error, naive = (((x.double() - truth).norm() / truth.norm()).item() for x in (result, plain))
    allowed = 2 * naive + 1e-5
    if not error <= allowed:
        raise CheckFailed(f"{name} is off by {error:.2g}, torch's own by {naive:.2g}")
    return error / allowed


def same_bits(problem: Problem, times: int, device: torch.device) -> None:
    """Run again and again while another stream keeps the GPU busy. Raises CheckFailed if the results differ."""
    first = None
    with busy(device) as occupy:
        for number in range(times):
            occupy()
            result = problem.run({name: x.clone() for name, x in problem.inputs.items()})
            first = first or {name: x.clone() for name, x in result.items()}
            if differing := [name for name, x in result.items() if not same(x, first[name])]:
                raise CheckFailed(f"{differing[0]} of {problem.name}: run {number + 1} differs from the first, a race")


def check_all(problems: Iterable[Problem], dtype: torch.dtype, times: int, device: torch.device) -> dict[str, float]:
    """Check each problem and repeat it. Return the largest error of each result, as a share of what is allowed."""
    errors = {}
    for problem in problems:
        for name, error in check(problem, dtype).items():
            errors[name] = max(error, errors.get(name, 0.0))
        if problem.repeats:
            same_bits(problem, times, device)
    return errors


@contextmanager
def busy(device: torch.device) -> Iterator[Callable[[], None]]:
    """Yield a function that gives another stream of the GPU some milliseconds of work, without cuBLAS.

    That promises the same bits only where a single stream uses it.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    stream, x = torch.cuda.Stream(device), torch.randn(2**26, device=device)
    out = torch.empty_like(x)
    torch.cuda.synchronize(device)

    def occupy() -> None:
        with torch.cuda.stream(stream):
            for _ in range(8):
                torch.sin(x, out=out)

    yield occupy
    torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def random(*shape: int, device: torch.device, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def attention_problem(
    kernels: str, b: int, t: int, heads: int, kv_heads: int, e: int, docs: bool, device: torch.device
) -> Problem:
    """QK-norm, RoPE and attention, forward and backward."""
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads, "d_out": heads}
    inputs = {name: random(b, t, n, e, device=device) for name, n in shapes.items()}
    for name in ("q_weight", "q_bias", "k_weight", "k_bias"):
        inputs[name] = 0.2 * torch.randn(kv_heads, e, device=device) + name.endswith("weight")
    found = Documents.of(torch.randint(0, 4, (b, t)).sort(1).values).to(device)
    inputs |= {"ids": found.ids, "cu_seqlens": found.cu_seqlens} if docs else {}
    table = compute_freqs_cis(torch.arange(t, device=device).expand(b, t), e, 10_000.0)

    def outcome(function: Callable, x: Tensors, dtype: torch.dtype) -> Tensors:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = {
            n: y.detach().to(wide if "_" in n else dtype).requires_grad_() for n, y in x.items() if n not in others
        }
        q, k, v, *norms = leaves.values()
        documents = Documents(x["ids"], x["cu_seqlens"], found.max_len) if docs else None
        with as_in_training(device, dtype):
            out = function(q, k, v, table, documents, norms[:2], norms[2:], EPS)
        gradients = torch.autograd.grad(out, list(leaves.values()), x["d_out"].to(dtype))
        return {"out": out.detach(), **{f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}}

    def run(x: Tensors) -> Tensors:
        with use_kernels(kernels):
            return outcome(qknorm_rope_attention, x, BF16)

    others = "d_out", "ids", "cu_seqlens"

    def reference(x: Tensors, dtype: torch.dtype) -> Tensors:
        return outcome(qknorm_rope_attention_reference, x, dtype)

    name = f"attention at T {t}, {heads} heads, {kv_heads} KV heads, E {e}{', documents' if docs else ''}"
    all_ours = kernels == "cuda" and e in gpu.HEAD_DIMS
    return Problem(name, inputs, run, reference, repeats=all_ours or device.type == "cpu")


def norm_problem(t: int, heads: int, e: int, device: torch.device) -> Problem:
    """QK-norm and RoPE alone, forward and backward."""
    inputs = {name: random(2, t, heads, e, device=device) for name in ("x", "d_out")}
    inputs |= {"weight": 1 + torch.randn(heads, e, device=device) / 5, "bias": torch.randn(heads, e, device=device) / 5}
    inputs["table"] = compute_freqs_cis(torch.arange(t, device=device).expand(2, t), e, 10_000.0)

    def by_kernel(x: Tensor, table: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.nanochameleon.qknorm_rope_cuda(x, table[:, 0].flatten(-2), weight, bias, EPS)

    def by_torch(x: Tensor, table: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return apply_rotary_emb(layer_norm(x, (weight, bias), EPS).transpose(1, 2), table).transpose(1, 2)

    def outcome(function: Callable, x: Tensors, dtype: torch.dtype) -> Tensors:
        wide = torch.promote_types(dtype, torch.float32)
        leaves = {name: x[name].detach().to(dtype if name == "x" else wide).requires_grad_() for name in names}
        with as_in_training(device, dtype):
            out = function(leaves["x"], x["table"], leaves["weight"], leaves["bias"])
        gradients = torch.autograd.grad(out, list(leaves.values()), x["d_out"].to(dtype))
        return {"normed": out.detach(), **{f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}}

    names = "x", "weight", "bias"
    name = f"QK-norm and RoPE at T {t}, {heads} heads, E {e}"
    return Problem(name, inputs, lambda x: outcome(by_kernel, x, BF16), lambda x, kind: outcome(by_torch, x, kind))


def own_attention_problem(t: int, heads: int, kv_heads: int, e: int, device: torch.device, seed: int = 0) -> Problem:
    """Our attention without norm and rotation, forward and backward, within documents."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads, "d_out": heads}
    inputs = {name: torch.randn(2, t, n, e, generator=generator).to(device, BF16) for name, n in shapes.items()}
    found = Documents.of(torch.randint(-1, 2, (2, t), generator=generator).sort(1).values).to(device)
    inputs |= {"ids": found.ids, "cu_seqlens": found.cu_seqlens}

    def run(x: Tensors) -> Tensors:
        first, last = Documents(x["ids"], x["cu_seqlens"], found.max_len).bounds()
        out, lse2 = gpu.attention(x["q"], x["k"], x["v"], first)
        dq, dk, dv = gpu.attention_backward(x["d_out"], out, lse2, x["q"], x["k"], x["v"], first, last)
        return {"out": out, "lse2": lse2, "dq": dq, "dk": dk, "dv": dv}

    def reference(x: Tensors, dtype: torch.dtype) -> Tensors:
        leaves = [x[name].detach().to(dtype).requires_grad_() for name in "qkv"]
        q, k, v = (y.transpose(1, 2) for y in leaves)
        mask = visible(x["ids"], x["ids"])
        out = attention_reference(q, k, v, mask).transpose(1, 2)
        gradients = torch.autograd.grad(out, leaves, x["d_out"].to(dtype))
        q, k = (y.detach().to(torch.promote_types(dtype, torch.float32)) for y in (q, k))
        scores = (q @ k.repeat_interleave(heads // kv_heads, 1).mT) / e**0.5
        sums = scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1) / math.log(2)
        return {"out": out.detach(), "lse2": sums, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

    return Problem(f"attention_{e} at T {t}", inputs, run, reference)


# ---------------------------------------------------------------------------------------------------------------------
# Attention of a decode step


def decode_problem(n: int, t: int, heads: int, kv_heads: int, places: int, e: int, device: torch.device) -> Problem:
    """t new tokens of each sequence, whose caches are filled to different lengths."""
    positions = torch.linspace(0, places - t, n, device=device).long()[:, None] + torch.arange(t, device=device)
    table = compute_freqs_cis(positions, e, 10_000.0)[:, 0]
    inputs = {
        "qkv": random(n, t, heads + 2 * kv_heads, e, device=device),
        "keys": random(n, kv_heads, places, e, device=device),
        "values": random(n, kv_heads, places, e, device=device),
        "weight": 1 + random(heads + kv_heads, e, device=device, dtype=torch.float32) / 5,
        "bias": random(heads + kv_heads, e, device=device, dtype=torch.float32) / 5,
    }

    def outcome(function: Callable, x: Tensors, dtype: torch.dtype) -> Tensors:
        norm, seen = (x["weight"], x["bias"]), see_cache(positions, x["keys"], places)
        out = function(x["qkv"].to(dtype), table, norm, EPS, x["keys"], x["values"], positions, seen)
        return {"out": out, "keys": x["keys"], "values": x["values"]}

    def run(x: Tensors) -> Tensors:
        with use_kernels("cuda"):
            return outcome(decode_attention_, x, BF16)

    def reference(x: Tensors, dtype: torch.dtype) -> Tensors:
        cache = {name: x[name].to(dtype, copy=True) for name in ("keys", "values")}
        return outcome(decode_attention_reference_, x | cache, dtype)

    name = f"decode of {n} x {t} tokens, {heads} heads, {kv_heads} KV heads, {places} places, E {e}"
    return Problem(name, inputs, run, reference, ("keys", "values"))


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def ignoring(n: int, v: int, device: torch.device) -> Tensor:
    """Targets, of which every fifth is ignored."""
    targets = torch.randint(v, (n,), device=device)
    return torch.where(torch.arange(n, device=device) % 5 == 4, -100, targets)


def loss_problem(n: int, v: int, dtype: torch.dtype, overwrite: bool, device: torch.device) -> Problem:
    """Loss and gradient in one pass that overwrites the logits, or in two passes."""
    inputs = {"logits": random(n, v, device=device, dtype=dtype), "targets": ignoring(n, v, device)}

    def run(x: Tensors) -> Tensors:
        logits, targets = x["logits"], x["targets"]
        with use_kernels("cuda"):
            if overwrite:
                loss, log_z = zloss_cross_entropy_(logits, targets, Z_LOSS, 1 / n)
            else:
                loss, log_z = zloss_cross_entropy(logits, targets)
                zloss_gradient_(logits, targets, log_z, Z_LOSS, 1 / n)
        return {"loss": loss, "log Z": log_z, "gradient": logits}

    def reference(x: Tensors, kind: torch.dtype) -> Tensors:
        logits = x["logits"].detach().to(kind).requires_grad_()
        loss, log_z = zloss_cross_entropy_reference(logits, x["targets"])
        (gradient,) = torch.autograd.grad((loss + Z_LOSS * log_z.square()).sum() / n, logits)
        return {"loss": loss.detach(), "log Z": log_z.detach(), "gradient": gradient}

    name = f"the loss of {n} x {v} logits{' in one pass' if overwrite else ''}"
    return Problem(name, inputs, run, reference, ("logits",))


def linear_problem(n: int, v: int, d: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """The loss with the output layer, in chunks. The weight is float32, as in training: its gradient is added up so."""
    inputs = {
        "hidden": random(n, d, device=device, dtype=dtype),
        "weight": random(v, d, device=device, dtype=torch.float32) / d**0.5,
        "targets": ignoring(n, v, device),
    }
    results = "loss", "log Z", "gradient of hidden", "gradient of weight"

    def run(x: Tensors) -> Tensors:
        with use_kernels("cuda"):
            found = linear_zloss_cross_entropy(x["hidden"], x["weight"], x["targets"], Z_LOSS, 1 / n)
        return dict(zip(results, found, strict=True))

    def reference(x: Tensors, kind: torch.dtype) -> Tensors:
        leaves = [x[name].detach().to(kind).requires_grad_() for name in ("hidden", "weight")]
        loss, log_z = zloss_cross_entropy_reference(F.linear(*leaves), x["targets"])
        gradients = torch.autograd.grad((loss + Z_LOSS * log_z.square()).sum() / n, leaves)
        return dict(zip(results, (loss.detach(), log_z.detach(), *gradients), strict=True))

    return Problem(f"the output layer and loss of {n} x {d} x {v}", inputs, run, reference)


def check_many_logits(numbers: int, v: int, device: torch.device) -> None:
    """More logits than 32 bits can count: the last rows must be right. Raises CheckFailed."""
    n = numbers // v + 8
    logits, targets = torch.empty(n, v, device=device, dtype=BF16).normal_(), ignoring(n, v, device)
    inputs = {"logits": logits[-8:].clone(), "targets": targets[-8:]}
    last = loss_problem(8, v, BF16, True, device)
    truth, plain = (last.reference(inputs, kind) for kind in (torch.float64, BF16))
    with use_kernels("cuda"):
        loss, log_z = zloss_cross_entropy_(logits, targets, Z_LOSS, 1 / 8)
    result = {"loss": loss[-8:], "log Z": log_z[-8:], "gradient": logits[-8:]}
    for name in truth:
        compare(f"{name} of the last of {n} x {v} logits", result[name], plain[name], truth[name])
