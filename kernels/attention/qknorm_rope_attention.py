"""All of Chameleon's attention between its projections, as one op: QK-norm, RoPE, causal attention within documents.

    q', k'  = rope(norm(q)), rope(norm(k))            norm: LayerNorm of each head with weight and bias, or none
    out     = softmax(q' k'^T / sqrt(E), where seen) v

A query sees the keys at or before it, of its own document. The norm comes before the rotation, which keeps the lengths
that the norm fixed.

Gradient. With weights P, scores s = q' k'^T / sqrt(E) and dO the gradient of out:
    dv = P^T dO,   dP = dO v^T,   ds = P * (dP - D),   D_i = sum_j P_ij dP_ij = dO_i . out_i
    dq' = ds k' / sqrt(E),   dk' = ds^T q' / sqrt(E)
A rotation is orthogonal, so its gradient g is the rotation by the opposite angle. With n the standardised row and
u = g * weight:
    d weight = sum g n,   d bias = sum g,   d row = (u - mean(u) - n mean(u n)) / deviation

Shapes: q (B, T, H, E); k, v (B, T, G, E), query head h reading key head h // (H / G); freqs_cis (B or 1, 1, T,
E/2, 2); weights and biases (groups, E), each for H / groups (G / groups) consecutive heads. Documents None means one
document for each sequence. Not here: the reference (reference.py), compiled kernels (cpu.py, cuda.py, ../cpu/bf16/).
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.attention.cuda import qknorm_rope_attention_cuda
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import Norm, expect_heads, per_head, qknorm_rope_attention_reference
from nanochameleon.kernels.dispatch import choose
from nanochameleon.kernels.ops import FLOAT_DTYPES, INDEX_DTYPES, KERNEL_DTYPES, expect, register_op

NAME = "qknorm_rope_attention"


def qknorm_rope_attention(
    q: Tensor, k: Tensor, v: Tensor, freqs_cis: Tensor, documents: Documents | None, q_norm: Norm | None,
    k_norm: Norm | None, eps: float,
) -> Tensor:  # fmt: skip
    """(B, T, H, E) in the dtype of q, by the implementation that `dispatch.choose` names.

    Raises ValueError for shapes that do not fit.
    """
    name = choose(NAME, q)
    if name == "reference" or not q.numel():
        return qknorm_rope_attention_reference(q, k, v, freqs_cis, documents, q_norm, k_norm, eps)
    expect_heads(NAME, q, k, heads=2)
    if freqs_cis.dim() != 5 or freqs_cis.shape[1] != 1 or freqs_cis.shape[-1] != 2:
        raise ValueError(f"{NAME}: freqs_cis must be (B, 1, T, E/2, 2); it is {tuple(freqs_cis.shape)}")
    cos_sin = freqs_cis[:, 0].flatten(-2)  # (B or 1, T, E): a pair's cos, its sin
    norms = *per_head(q_norm, q.shape[2]), *per_head(k_norm, k.shape[2])
    if name in ("cuda", "vendor"):
        return qknorm_rope_attention_cuda(q, k, v, cos_sin, documents, *norms, eps, own=name == "cuda")
    doc_ids = None if documents is None else documents.ids
    return qknorm_rope_attention_op(q, k, v, cos_sin, doc_ids, *norms, eps, name == "bf16")[0]


# ---------------------------------------------------------------------------------------------------------------------
# The op for CPUs


def _kernels(pairs: bool) -> ModuleType:
    """The compiled kernels, on pairs of bfloat16 or in float32 vectors. Both passes take the same."""
    from nanochameleon.kernels.attention import cpu
    from nanochameleon.kernels.cpu.bf16 import attention

    return attention if pairs else cpu


def _position_stride(x: Tensor) -> int:
    """Numbers from one position's heads to the next."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def _run(kernel: str, tensors: dict[str, Tensor | None], eps: float, pairs: bool) -> None:
    """Run "forward" or "backward" of the compiled kernels: a task is a sequence and a key head."""
    from nanochameleon.kernels.attention.cpu import KernelArgs
    from nanochameleon.kernels.cpu import launch

    module, (q, k, v) = _kernels(pairs), (tensors[name] for name in "qkv")
    (b, t, heads, e), key_heads = q.shape, k.shape[2]
    sizes = dict(t=t, heads=heads, key_heads=key_heads, e=e, width=-(-e // module.LANES) * module.LANES)
    strides = dict(q_row=_position_stride(q), k_row=_position_stride(k), v_row=_position_stride(v))
    strides |= dict(d_row=(heads + 2 * key_heads) * e, size=q.element_size())
    args = launch.make_args(KernelArgs, tensors, **sizes, **strides, eps=eps)
    launch.run(getattr(module, kernel), args, b * key_heads, module.scratch_floats(args, kernel == "backward"))


def _in_rows(x: Tensor) -> Tensor:
    """x itself where only its positions lie apart, as in a fused projection (block/linear.py), else a copy."""
    b, t, heads, e = x.shape
    dense_heads = (e == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == e)
    return x if dense_heads and (b == 1 or x.stride(0) == t * _position_stride(x)) else x.contiguous()


def _inputs(q, k, v, cos_sin, doc_ids, q_weight, q_bias, k_weight, k_bias, pairs: bool) -> dict[str, Tensor | None]:
    """Check the inputs, and bring them into the kernels' form, by the names of their arguments.

    q, k, v get one dtype and regular strides; the small ones become float32, padded with zeros to whole registers.
    """
    expect_heads(NAME, q, k, heads=2)
    (b, t, h, e), g, lanes = q.shape, k.shape[2], _kernels(pairs).LANES
    cos_sin = cos_sin if len(cos_sin) > 1 else cos_sin.expand(b, -1, -1)
    expect(NAME, q, q.shape, (torch.bfloat16,) if pairs else KERNEL_DTYPES, q=q)
    expect(NAME, q, (b, t, g, e), FLOAT_DTYPES, k=k, v=v)
    expect(NAME, q, (b, t, e), FLOAT_DTYPES, cos_sin=cos_sin)
    expect(NAME, q, (b, t), INDEX_DTYPES, doc_ids=doc_ids)
    expect(NAME, q, (h, e), FLOAT_DTYPES, q_weight=q_weight, q_bias=q_bias)
    expect(NAME, q, (g, e), FLOAT_DTYPES, k_weight=k_weight, k_bias=k_bias)

    def padded(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x.float()
        return (F.pad(x, (0, -e % lanes)) if e % lanes else x).contiguous()

    small = dict(cos_sin=cos_sin, q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias)
    large = {name: _in_rows(x.to(q.dtype)) for name, x in (("q", q), ("k", k), ("v", v))}
    doc_ids = None if doc_ids is None else doc_ids.long().contiguous()
    return large | {name: padded(x) for name, x in small.items()} | {"doc_ids": doc_ids}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, doc_ids: Tensor | None, q_weight: Tensor | None,
    q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None, eps: float, pairs: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out (B, T, H, E), and lse2 (B, H, T) float32: log2 of the sum of 2^score, which the gradient needs."""
    inputs = _inputs(q, k, v, cos_sin, doc_ids, q_weight, q_bias, k_weight, k_bias, pairs)
    out = q.new_empty(q.shape)
    lse2 = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    _run("forward", inputs | {"out": out, "lse2": lse2}, eps, pairs)
    return out, lse2


def _backward(
    d_out: Tensor, out: Tensor, lse2: Tensor, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor,
    doc_ids: Tensor | None, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None,
    k_bias: Tensor | None, eps: float, pairs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v next to one another, (B, T, H + 2 G, E), and of the norms, (H, E) and (G, E).

    Without norms theirs have length 0.
    """
    inputs = _inputs(q, k, v, cos_sin, doc_ids, q_weight, q_bias, k_weight, k_bias, pairs)
    (b, t, h, e), g, width = q.shape, k.shape[2], inputs["cos_sin"].shape[-1]
    expect(NAME, q, q.shape, FLOAT_DTYPES, d_out=d_out, out=out)
    expect(NAME, q, (b, h, t), (torch.float32,), lse2=lse2)
    d_qkv = q.new_empty(b, t, h + 2 * g, e)
    parts = dict(zip(("dq", "dk", "dv"), d_qkv.split([h, g, g], 2), strict=True))
    heads = {"d_q_weight": h, "d_q_bias": h, "d_k_weight": g, "d_k_bias": g}
    norms = {name: torch.zeros(b, n, width, dtype=torch.float32, device=q.device) for name, n in heads.items()}
    saved = {"d_out": d_out.to(q.dtype).contiguous(), "out": out.to(q.dtype).contiguous(), "lse2": lse2}
    _run("backward", inputs | parts | norms | saved, eps, pairs)
    given = zip((q_weight, q_bias, k_weight, k_bias), norms.values(), strict=True)
    return d_qkv, *(x.new_empty(0) if p is None else x.sum(0)[:, :e].contiguous() for p, x in given)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.pairs = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)
    ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in tensors]


def _gradients(backward, ctx, d_out, _):
    out, lse2, *tensors = ctx.saved_tensors
    d_qkv, *norms = backward(d_out, out, lse2, *tensors, ctx.eps, ctx.pairs)
    dq, dk, dv = d_qkv.split([x.shape[2] for x in tensors[:3]], 2)
    norms = [x.to(dtype) if dtype is not None else None for x, dtype in zip(norms, ctx.dtypes[5:], strict=True)]
    return dq, dk.to(ctx.dtypes[1]), dv.to(ctx.dtypes[2]), None, None, *norms, None, None


qknorm_rope_attention_op = register_op(NAME, _forward, _backward, _save, _gradients)


@torch.library.register_fake(f"nanochameleon::{NAME}")
def _(q, k, v, cos_sin, doc_ids, q_weight, q_bias, k_weight, k_bias, eps, pairs):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.register_fake(f"nanochameleon::{NAME}_backward")
def _(d_out, out, lse2, q, k, v, cos_sin, doc_ids, q_weight, q_bias, k_weight, k_bias, eps, pairs):
    given = q_weight, q_bias, k_weight, k_bias
    norms = [q.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in given]
    return q.new_empty(*q.shape[:2], q.shape[2] + 2 * k.shape[2], q.shape[3]), *norms
