"""Norm, turn and attention on a GPU as ops that torch knows: norm_rotary.cu, attention.cu and attention_backward.cu.

The order is always: one pass for norm and turn of q, one of k, then attention, which is ours or torch's. Formulas and
shapes are those of qknorm_rope_attention.py. All take bfloat16; what they need of float32 is made here.
"""

import torch
from torch import Tensor

from nanochameleon.kernels.attention.reference import attention, expect_heads, visible
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.ops import FLOAT_DTYPES, expect


def qknorm_rope_attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, turns: Tensor, doc_ids: Tensor | None, q_weight: Tensor | None,
    q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None, eps: float, own: bool,
) -> Tensor:  # fmt: skip
    """(B, T, H, E). own: with our attention where it is written for E, else with torch's, a vendor's. Raises ValueError
    for heads of more than 128 numbers, which norm_rotary.cu does not hold."""
    if q.shape[-1] > 128:
        raise ValueError(f"the CUDA kernels take heads of at most 128 numbers, not {q.shape[-1]}: use the reference")
    rotary, v = torch.ops.nanochameleon.norm_rotary, v.to(q.dtype)
    q, k = rotary(q, turns, q_weight, q_bias, eps), rotary(k.to(q.dtype), turns, k_weight, k_bias, eps)
    if own and q.shape[-1] in gpu.HEAD_DIMS:
        return torch.ops.nanochameleon.attention_cuda(q, k, v, *bounds(doc_ids, q))[0]
    mask = None if doc_ids is None else visible(doc_ids, doc_ids)
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)


def bounds(doc_ids: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last position of each one's document, (B, T) int32 each; None is one document a row."""
    if doc_ids is not None:
        return gpu.document_bounds(doc_ids)
    first = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    return first, torch.full_like(first, q.shape[1] - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Norm and turn


def _expect_rotary(x: Tensor, turns: Tensor, weight: Tensor | None, bias: Tensor | None, **others: Tensor) -> None:
    """Raises ValueError unless x and others are (B, T, H, E) bfloat16, turns (B, T, E), weight and bias (H, E)."""
    expect("norm_rotary", x, x.shape, (torch.bfloat16,), x=x, **others)
    expect("norm_rotary", x, (*x.shape[:2], x.shape[3]), FLOAT_DTYPES, turns=turns)
    expect("norm_rotary", x, x.shape[2:], FLOAT_DTYPES, weight=weight, bias=bias)


@torch.library.custom_op("nanochameleon::norm_rotary", mutates_args=())
def _norm_rotary(x: Tensor, turns: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    turns = turns if len(turns) > 1 else turns.expand(len(x), -1, -1)
    _expect_rotary(x, turns, weight, bias)
    weight, bias = (None if p is None else p.float().contiguous() for p in (weight, bias))
    return gpu.norm_rotary(x.contiguous(), turns.float().contiguous(), weight, bias, eps)


@_norm_rotary.register_fake
def _(x, turns, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("nanochameleon::norm_rotary_backward", mutates_args=())
def _norm_rotary_backward(
    d_out: Tensor, x: Tensor, turns: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    turns = turns if len(turns) > 1 else turns.expand(len(x), -1, -1)
    _expect_rotary(x, turns, weight, None, d_out=d_out)
    weight = None if weight is None else weight.float().contiguous()
    return gpu.norm_rotary_backward(d_out.contiguous(), x.contiguous(), turns.float().contiguous(), weight, eps)


@_norm_rotary_backward.register_fake
def _(d_out, x, turns, weight, eps):
    row = x.new_empty(x.shape[2:], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), row, torch.empty_like(row)


def _save_norm(ctx, inputs, output) -> None:
    x, turns, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, turns, weight)
    ctx.bias = None if bias is None else bias.dtype


def _norm_gradients(ctx, d_out):
    x, turns, weight = ctx.saved_tensors
    d_x, d_weight, d_bias = torch.ops.nanochameleon.norm_rotary_backward(d_out, x, turns, weight, ctx.eps)
    none = weight is None
    return d_x, None, None if none else d_weight.to(weight.dtype), None if none else d_bias.to(ctx.bias), None


_norm_rotary.register_autograd(_norm_gradients, setup_context=_save_norm)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def _expect_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, **others: Tensor) -> None:
    """Raises ValueError unless q and others are (B, T, H, E), k and v (B, T, G, E), bfloat16; bounds (B, T) int32."""
    expect_heads("attention_cuda", q, k, heads=2)
    expect("attention_cuda", q, q.shape, (torch.bfloat16,), q=q, **others)
    expect("attention_cuda", q, (*q.shape[:2], k.shape[2], q.shape[3]), (torch.bfloat16,), k=k, v=v)
    expect("attention_cuda", q, q.shape[:2], (torch.int32,), first=first, last=last)


@torch.library.custom_op("nanochameleon::attention_cuda", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    _expect_attention(q, k, v, first, last)
    return gpu.attention(q.contiguous(), k.contiguous(), v.contiguous(), first)


@_attention.register_fake
def _(q, k, v, first, last):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("nanochameleon::attention_cuda_backward", mutates_args=())
def _attention_backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _expect_attention(q, k, v, first, last, d_out=d_out, out=out)
    d_out, q, k, v = (x.contiguous() for x in (d_out, q, k, v))
    return gpu.attention_backward(d_out, out, lse, q, k, v, first, last)


@_attention_backward.register_fake
def _(d_out, out, lse, q, k, v, first, last):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_attention(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output, *inputs)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx, d_out, _):
    return *torch.ops.nanochameleon.attention_cuda_backward(d_out, *ctx.saved_tensors), None, None


_attention.register_autograd(_attention_gradients, setup_context=_save_attention)
