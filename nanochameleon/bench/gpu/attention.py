"""Part `attention`: what documents cost. Sequences of four documents each, forward alone and with the backward pass."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochameleon.bench.gpu.context import Context
from nanochameleon.bench.measure import Job, median_seconds
from nanochameleon.bench.rows import Row
from nanochameleon.errors import say
from nanochameleon.kernels.attention.reference import visible
from nanochameleon.kernels.gpu import launch as gpu

N_DOCUMENTS = 4  # per sequence


def causal(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> Callable[[], Tensor]:
    """One document per sequence: a lower bound of torch's own kernels."""
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dense_mask(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> Callable[[], Tensor]:
    mask = visible(docs, docs)[:, None]  # (B, 1, T, T), made once
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def efficient(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> Callable[[], Tensor]:
    """The dense mask with the kernel that GPUs without cuDNN's take."""
    masked = dense_mask(q, k, v, docs)

    def run() -> Tensor:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION] if q.is_cuda else [SDPBackend.MATH]):
            return masked()

    return run


def varlen(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> Callable[[], Tensor]:
    """Flash attention by document boundaries. Raises ImportError where torch does not have it."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    flag = {"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters else {"window_size": (-1, 0)}
    (b, h, t, e), length = q.shape, q.shape[2] // N_DOCUMENTS
    flat = [x.transpose(1, 2).reshape(b * t, h, e) for x in (q, k, v)]
    bounds = torch.arange(0, b * t + 1, length, dtype=torch.int32, device=q.device)
    return lambda: varlen_attn(*flat, bounds, bounds, length, length, **flag)


def own(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> tuple[Job, Job]:
    """Our CUDA kernels: the forward pass, and both passes."""
    first, last = gpu.document_bounds(docs)
    q, k, v = (x.detach().transpose(1, 2).contiguous() for x in (q, k, v))  # (B, T, H, E)

    def both() -> tuple[Tensor, ...]:
        out, lse = gpu.attention(q, k, v, first)
        return gpu.attention_backward(out, out, lse, q, k, v, first, last)

    return lambda: gpu.attention(q, k, v, first), both


def passes(way: Callable, inputs: tuple[Tensor, ...], docs: Tensor) -> dict[str, Job]:
    if way is own:
        return dict(zip(("f", "f+b"), own(*inputs, docs), strict=True))
    forward = way(*inputs, docs)
    upstream = torch.ones_like(forward())
    return {"f": forward, "f+b": lambda: torch.autograd.grad(forward(), inputs, upstream)}


WAYS = {
    "causal": causal, "varlen": varlen, "dense mask": dense_mask, "dense mask, memory-efficient": efficient,
    "own CUDA kernels": own,
}  # fmt: skip


def run(context: Context) -> Iterator[Row]:
    b, h, t, e = context.plan.attention
    device, dtype = context.device, torch.bfloat16
    inputs = tuple(torch.randn(b, h, t, e, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    docs = (torch.arange(t, device=device) // (t // N_DOCUMENTS)).expand(b, t)
    for name, way in WAYS.items():
        if way is varlen and context.plan.dry:
            say("varlen: torch has it for GPUs alone")
            continue
        with context.guard(f"attention, {name}"):
            for which, job in passes(way, inputs, docs).items():
                seconds = median_seconds({"": job}, 10, device)[""]
                yield context.row(f"attention with documents {which}", name, 1e3 * seconds, "ms")
