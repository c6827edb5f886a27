"""The kernel bench's cases for a GPU: what is timed. gpu_checks.py shows that it is right."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.bench.kernels import Case, attention_case, linear_case, with_kernels, zloss_case
from nanochameleon.bench.work import decode_attention_work
from nanochameleon.kernels.attention.cuda import document_bounds
from nanochameleon.kernels.attention.decode import decode_attention_, decode_attention_reference_, see_cache
from nanochameleon.kernels.attention.reference import attention
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.transformer import compute_freqs_cis

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """What is timed: the rows of docs/results/gpu.md."""

    # (B, T, H, E)
    attention: tuple[tuple[int, ...], ...] = ((16, 1_024, 16, 64), (4, 4_096, 32, 128))
    # (tokens, vocabulary)
    zloss: tuple[tuple[int, ...], ...] = ((65_536, 4_096), (32_768, 65_536))
    # (tokens, vocabulary, dim)
    linear: tuple[tuple[int, ...], ...] = ((32_768, 65_536, 4_096),)
    # (B, heads, KV heads, cache length, E)
    decode: tuple[tuple[int, ...], ...] = (
        (16, 32, 32, 2_048, 128), (1, 32, 32, 2_048, 128), (16, 64, 8, 4_096, 128),
    )  # fmt: skip


PAGE = Sizes()


def cases(device: torch.device, op: str, sizes: Sizes = PAGE) -> Iterator[Case]:
    if op in ("all", "zloss"):
        for n, v in sizes.zloss:
            yield zloss_case(n, v, BF16, device)
    if op in ("all", "decode"):
        for each in sizes.decode:
            yield decode_case(*each, device)
    if op in ("all", "attention"):
        for b, t, h, e in sizes.attention:
            yield with_parts(attention_case(b, t, h, e, BF16, 0, device))
    if op in ("all", "linear_zloss"):
        for n, v, d in sizes.linear:
            yield linear_case(n, v, d, BF16, device)


# ---------------------------------------------------------------------------------------------------------------------
# What is timed in addition to the whole op


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=BF16)


def with_parts(case: Case) -> Case:
    """Add attention without norm and rotation: our version and torch's."""
    q, k, v = (x.detach() for x in case.inputs[:3])
    bounds = document_bounds(None, q)
    out, lse = gpu.attention(q, k, v, bounds[0])
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    case.extra_forward["attention alone"] = lambda: gpu.attention(q, k, v, bounds[0])
    case.extra_forward["attention alone, vendor"] = lambda: attention(*heads)
    case.extra["gradient of attention alone"] = lambda: gpu.attention_backward(out, out, lse, q, k, v, *bounds)
    return case


def decode_inputs(n: int, h: int, g: int, cache_len: int, e: int, device: torch.device) -> tuple:
    """Return inputs of a decode step whose sequences have filled their cache except for the last position."""
    heads, keys, values = random(n, 1, h + 2 * g, e, device=device), *random(2, n, g, cache_len, e, device=device)
    positions = torch.full((n, 1), cache_len - 1, device=device)
    norm = torch.ones(h + g, e, device=device), torch.zeros(h + g, e, device=device)
    return heads, compute_freqs_cis(positions, e, 10_000.0)[:, 0], norm, 1e-5, keys, values, positions


def decode_case(n: int, h: int, g: int, cache_len: int, e: int, device: torch.device) -> Case:
    inputs = decode_inputs(n, h, g, cache_len, e, device)
    inputs += (see_cache(inputs[6], inputs[4], cache_len),)
    queries, keys, values, positions = random(n, 1, h, e, device=device), *inputs[4:7]
    rows = queries.view(n, g, h // g, e)
    variants = {
        "reference": lambda: decode_attention_reference_(*inputs),
        "cuda": with_kernels("cuda", lambda: decode_attention_(*inputs)),
        "attention alone": lambda: gpu.decode_attention(queries, keys, values, positions, cache_len),
        "attention alone, vendor": lambda: F.scaled_dot_product_attention(rows, keys, values),
    }
    work = decode_attention_work(n, h, g, cache_len, e, BF16)
    return Case(f"decode B{n} H{h} G{g} S{cache_len} D{e} bf16", [], variants, work=work)
