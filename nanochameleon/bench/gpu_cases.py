"""The kernel bench's cases for a GPU, with checks before anything is timed.

The emulator in kernels/gpu/emulator/ shows on a CPU that the kernels are correct by the manual. Only the hardware can
show that they are correct on the hardware. So every CUDA kernel is checked here against float64, at odd sizes, too: its
error is at most twice that of torch's own bfloat16, as in the tests.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.bench.kernels import Z_LOSS, Case, attention_case, check, linear_case, with_kernels, zloss_case
from nanochameleon.kernels.attention.cuda import document_bounds
from nanochameleon.kernels.attention.decode import decode_attention_, decode_attention_reference_
from nanochameleon.kernels.attention.reference import attention, attention_reference, visible
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy_, zloss_cross_entropy_reference
from nanochameleon.transformer import compute_freqs_cis

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """What is timed: the rows of docs/results/gpu.md. And at which sizes kernels are checked before."""

    attention: tuple[tuple[int, ...], ...] = ((16, 1_024, 16, 64), (4, 4_096, 32, 128))  # (B, T, H, E)
    # (tokens, vocabulary)
    zloss: tuple[tuple[int, ...], ...] = ((65_536, 4_096), (32_768, 65_536))
    # (tokens, vocabulary, dim)
    linear: tuple[tuple[int, ...], ...] = ((32_768, 65_536, 4_096),)
    # (B, heads, KV heads, cache length, E)
    decode: tuple[tuple[int, ...], ...] = (
        (16, 32, 32, 2_048, 128), (1, 32, 32, 2_048, 128), (16, 64, 8, 4_096, 128),
    )  # fmt: skip
    checked_lengths: tuple[int, ...] = (70, 300)  # with documents
    checked_widths: tuple[int, ...] = (33, 940, 4_096, 65_536)


def cases(device: torch.device, quick: bool, op: str, sizes: Sizes | None = None) -> Iterator[Case]:
    """Check each kernel at small sizes, then yield the cases to time. quick leaves out the simple kernels."""
    sizes = sizes or Sizes()
    check_all(device, op, sizes)
    if op in ("all", "zloss"):
        for n, v in sizes.zloss:
            yield zloss_case(n, v, BF16, device)
    if op in ("all", "decode"):
        for each in sizes.decode:
            yield decode_case(*each, device)
    if op in ("all", "attention"):
        for b, t, h, e in sizes.attention:
            yield with_parts(attention_case(b, t, h, e, BF16, False, device), not quick)
    if op in ("all", "linear_zloss"):
        for n, v, d in sizes.linear:
            yield linear_case(n, v, d, BF16, device)


def check_all(device: torch.device, op: str, sizes: Sizes) -> None:
    """Raise AssertionError for an op, or one of all, whose error exceeds twice that of torch's own bfloat16."""
    if op in ("all", "attention"):
        for t in sizes.checked_lengths:
            for b, h, e in [(2, 4, 64), (1, 2, 128), (2, 3, 48)]:
                check(attention_case(b, t, h, e, BF16, True, device))
        check_own_attention(device, sizes.checked_lengths)
    if op in ("all", "zloss"):
        for v in sizes.checked_widths:
            for dtype in (BF16, torch.float32):
                check(zloss_case(40, v, dtype, device))
                check_in_place(40, v, dtype, device)
    if op in ("all", "linear_zloss"):
        check(linear_case(100, 1_000, 64, BF16, device))
    if op in ("all", "decode"):
        for each in ((2, 6, 2, 70, 64), (1, 4, 4, 600, 128)):
            check_decoding(each, device)


# ---------------------------------------------------------------------------------------------------------------------
# What is timed in addition to the whole op


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=BF16)


def with_parts(case: Case, simple: bool) -> Case:
    """Add attention without norm and rotation: our versions, torch's, and the simple kernel where that is wanted."""
    q, k, v = (x.detach() for x in case.inputs[:3])
    bounds = document_bounds(None, q)
    out, lse = gpu.attention(q, k, v, bounds[0])
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    case.extra_forward["attention alone"] = lambda: gpu.attention(q, k, v, bounds[0])
    if simple:  # up to a second a launch
        case.extra_forward["attention alone, simple"] = lambda: gpu.attention(q, k, v, bounds[0], simple=True)
    case.extra_forward["attention alone, vendor"] = lambda: attention(*heads)
    case.extra["gradient of attention alone"] = lambda: gpu.attention_backward(out, out, lse, q, k, v, *bounds)
    return case


def decode_inputs(n: int, h: int, g: int, cache_len: int, e: int, device: torch.device) -> tuple:
    """Return inputs of a decode step whose sequences have filled their cache except for the last position."""
    heads, keys, values = random(n, 1, h + 2 * g, e, device=device), *random(2, n, g, cache_len, e, device=device)
    positions = torch.full((n, 1), cache_len - 1, device=device)
    norm = torch.ones(h + g, e, device=device), torch.zeros(h + g, e, device=device)
    bias = torch.zeros(n, 1, cache_len, device=device, dtype=BF16)
    return heads, compute_freqs_cis(positions, e, 10_000.0)[:, 0], norm, 1e-5, keys, values, positions, bias


def decode_case(n: int, h: int, g: int, cache_len: int, e: int, device: torch.device) -> Case:
    inputs = decode_inputs(n, h, g, cache_len, e, device)
    queries, keys, values, positions = random(n, 1, h, e, device=device), *inputs[4:7]
    rows = queries.view(n, g, h // g, e)
    variants = {
        "reference": lambda: decode_attention_reference_(*inputs),
        "cuda": with_kernels("cuda", lambda: decode_attention_(*inputs)),
        "attention alone": lambda: gpu.decode_attention(queries, keys, values, positions, cache_len),
        "attention alone, vendor": lambda: F.scaled_dot_product_attention(rows, keys, values),
    }
    return Case(f"decode B{n} H{h} G{g} S{cache_len} D{e} bf16", [], variants)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def compare(name: str, result: Tensor, plain: Tensor, truth: Tensor) -> None:
    error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (result, plain))
    if not error <= 2 * allowed + 1e-5:
        raise AssertionError(f"{name} is off by {error:.2g}, torch's own by {allowed:.2g}")


def check_own_attention(device: torch.device, lengths: tuple[int, ...]) -> None:
    """Check both kernels and their gradients, with grouped KV heads and documents in any order."""
    for t, heads, key_heads, e in ((17, 2, 2, 64), (lengths[0], 4, 2, 64), (lengths[1], 4, 1, 128)):
        q, k, v, d_out = (random(2, t, h, e, device=device) for h in (heads, key_heads, key_heads, heads))
        docs = torch.randint(0, 3, (2, t), device=device)
        truth, plain = (reference_results(q, k, v, d_out, docs, kind) for kind in (torch.float64, BF16))
        first, last = gpu.document_bounds(docs)
        for simple in (False, True):
            out, lse = gpu.attention(q, k, v, first, simple)
            result = out, *gpu.attention_backward(d_out, out, lse, q, k, v, first, last, simple)
            for name, *each in zip(("out", "dq", "dk", "dv"), result, plain, truth, strict=True):
                compare(f"{name} of attention{'_simple' if simple else ''}_{e} at T {t}", *each)


def reference_results(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, docs: Tensor, kind: torch.dtype
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of the reference attention."""
    x = [y.to(kind).requires_grad_() for y in (q, k, v)]
    out = attention_reference(*(y.transpose(1, 2) for y in x), visible(docs, docs)).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, x, d_out.to(kind))


def check_in_place(n: int, v: int, dtype: torch.dtype, device: torch.device) -> None:
    """Check the kernel that overwrites logits with their gradient, with ignored targets, too."""
    logits = torch.randn(n, v, device=device).to(dtype)
    targets = torch.randint(v, (n,), device=device)
    targets[::5] = -100

    def gradient(kind: torch.dtype) -> Tensor:
        x = logits.to(kind).requires_grad_()
        loss, log_z = zloss_cross_entropy_reference(x, targets)
        return torch.autograd.grad((loss + Z_LOSS * log_z.square()).sum() / n, x)[0]

    truth, plain = gradient(torch.float64), gradient(dtype)
    result = logits.clone()
    zloss_cross_entropy_(result, targets, Z_LOSS, 1 / n)
    compare(f"overwrite {n} x {v} {dtype}", result, plain, truth)


def check_decoding(sizes: tuple, device: torch.device) -> None:
    heads, freqs_cis, norm, eps, keys, values, positions, bias = decode_inputs(*sizes, device)

    def run(function, kind: torch.dtype) -> tuple[Tensor, ...]:
        cache = [x.to(kind, copy=True) for x in (keys, values)]
        return function(heads.to(kind), freqs_cis, norm, eps, *cache, positions, bias.to(kind)), *cache

    truth, plain = (run(decode_attention_reference_, kind) for kind in (torch.float64, BF16))
    result = run(with_kernels("cuda", decode_attention_), BF16)
    for name, *each in zip(("out", "keys", "values"), result, plain, truth, strict=True):
        compare(f"{name} of decode {sizes}", *each)
