"""QK-norm, rotary embedding and attention on a GPU as ops with a gradient for torch.

One pass norms and rotates q, one k (qknorm_rope.cu); then attention runs, ours (attention.cu, attention_backward.cu) or
torch's. Formulas and shapes are those of qknorm_rope_attention.py. All take bfloat16 and compute in float32.
"""

import torch
from torch import Tensor

from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import attention_within_documents, expect_heads
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.ops import FLOAT_DTYPES, expect


def qknorm_rope_attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, documents: Documents | None, q_weight: Tensor | None,
    q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None, eps: float, own: bool,
) -> Tensor:  # fmt: skip
    """Returns (B, T, H, E). own: run our attention where it is written for E, else torch's, a vendor's. Torch's runs,
    too, where nobody knows where documents begin.

    Raises ValueError for heads of more than 128 numbers, the most that qknorm_rope.cu takes.
    """
    if q.shape[-1] > 128:
        raise ValueError(f"the CUDA kernels take heads of at most 128 numbers, not {q.shape[-1]}: use the reference")
    qknorm_rope, v = torch.ops.nanochameleon.qknorm_rope_cuda, v.to(q.dtype)
    q, k = qknorm_rope(q, cos_sin, q_weight, q_bias, eps), qknorm_rope(k.to(q.dtype), cos_sin, k_weight, k_bias, eps)
    known = documents is None or documents.cu_seqlens is not None
    if own and known and q.shape[-1] in gpu.HEAD_DIMS:
        return torch.ops.nanochameleon.attention_cuda(q, k, v, *document_bounds(documents, q))[0]
    return attention_within_documents(q, k, v, documents)


def document_bounds(documents: Documents | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position of each position's document, (B, T) int32 each; None is one document a sequence."""
    if documents is not None:
        return documents.bounds()
    doc_start = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    return doc_start, torch.full_like(doc_start, q.shape[1] - 1)


# ---------------------------------------------------------------------------------------------------------------------
# QK-norm and rotary embedding


def _check_qknorm_rope(
    x: Tensor, cos_sin: Tensor, weight: Tensor | None, bias: Tensor | None, **others: Tensor
) -> None:
    """Raise ValueError unless x and others are (B, T, H, E) bfloat16, cos_sin (B, T, E), weight and bias (H, E)."""
    expect("qknorm_rope_cuda", x, x.shape, (torch.bfloat16,), x=x, **others)
    expect("qknorm_rope_cuda", x, (*x.shape[:2], x.shape[3]), FLOAT_DTYPES, cos_sin=cos_sin)
    expect("qknorm_rope_cuda", x, x.shape[2:], FLOAT_DTYPES, weight=weight, bias=bias)


@torch.library.custom_op("nanochameleon::qknorm_rope_cuda", mutates_args=())
def _qknorm_rope_cuda(x: Tensor, cos_sin: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    cos_sin = cos_sin if len(cos_sin) > 1 else cos_sin.expand(len(x), -1, -1)
    _check_qknorm_rope(x, cos_sin, weight, bias)
    weight, bias = (None if p is None else p.float().contiguous() for p in (weight, bias))
    return gpu.qknorm_rope(x.contiguous(), cos_sin.float().contiguous(), weight, bias, eps)


@_qknorm_rope_cuda.register_fake
def _(x, cos_sin, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("nanochameleon::qknorm_rope_cuda_backward", mutates_args=())
def _qknorm_rope_cuda_backward(
    d_out: Tensor, x: Tensor, cos_sin: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    cos_sin = cos_sin if len(cos_sin) > 1 else cos_sin.expand(len(x), -1, -1)
    _check_qknorm_rope(x, cos_sin, weight, None, d_out=d_out)
    weight = None if weight is None else weight.float().contiguous()
    return gpu.qknorm_rope_backward(d_out.contiguous(), x.contiguous(), cos_sin.float().contiguous(), weight, eps)


@_qknorm_rope_cuda_backward.register_fake
def _(d_out, x, cos_sin, weight, eps):
    row = x.new_empty(x.shape[2:], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), row, torch.empty_like(row)


def _save_qknorm_rope(ctx, inputs, output) -> None:
    x, cos_sin, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, cos_sin, weight)
    ctx.bias = None if bias is None else bias.dtype


def _qknorm_rope_gradients(ctx, d_out):
    x, cos_sin, weight = ctx.saved_tensors
    d_x, d_weight, d_bias = torch.ops.nanochameleon.qknorm_rope_cuda_backward(d_out, x, cos_sin, weight, ctx.eps)
    none = weight is None
    return d_x, None, None if none else d_weight.to(weight.dtype), None if none else d_bias.to(ctx.bias), None


_qknorm_rope_cuda.register_autograd(_qknorm_rope_gradients, setup_context=_save_qknorm_rope)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def _check_attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, doc_end: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless q and others are (B, T, H, E), k and v (B, T, G, E), bfloat16, the rest (B, T) int32."""
    expect_heads("attention_cuda", q, k, heads=2)
    expect("attention_cuda", q, q.shape, (torch.bfloat16,), q=q, **others)
    expect("attention_cuda", q, (*q.shape[:2], k.shape[2], q.shape[3]), (torch.bfloat16,), k=k, v=v)
    expect("attention_cuda", q, q.shape[:2], (torch.int32,), doc_start=doc_start, doc_end=doc_end)


@torch.library.custom_op("nanochameleon::attention_cuda", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, doc_end: Tensor) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, doc_start, doc_end)
    return gpu.attention(q.contiguous(), k.contiguous(), v.contiguous(), doc_start)


@_attention.register_fake
def _(q, k, v, doc_start, doc_end):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("nanochameleon::attention_cuda_backward", mutates_args=())
def _attention_backward(
    d_out: Tensor, out: Tensor, lse2: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, doc_end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_attention(q, k, v, doc_start, doc_end, d_out=d_out, out=out)
    d_out, q, k, v = (x.contiguous() for x in (d_out, q, k, v))
    return gpu.attention_backward(d_out, out, lse2, q, k, v, doc_start, doc_end)


@_attention_backward.register_fake
def _(d_out, out, lse2, q, k, v, doc_start, doc_end):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_attention(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output, *inputs)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx, d_out, _):
    return *torch.ops.nanochameleon.attention_cuda_backward(d_out, *ctx.saved_tensors), None, None


_attention.register_autograd(_attention_gradients, setup_context=_save_attention)
