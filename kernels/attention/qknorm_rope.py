"""The whole of Chameleon's attention between its projections, as one op: QK-norm, rotary positions, causal attention
within documents, grouped keys.

    q', k'  = turn(norm(q)), turn(norm(k))            norm: LayerNorm of each head with weight and bias, or none
    out     = softmax(q' k'^T / sqrt(E), where seen) v

Seen are the keys at or before a query, of its own document. The norm comes before the turn, which must not change what
the norm fixed; a pair (x[2i], x[2i+1]) is turned as a complex number, Meta's order of pairs.

The gradient. With weights P, scores s = q' k'^T / sqrt(E) and dO the gradient of out:
    dv = P^T dO,   dP = dO v^T,   ds = P * (dP - D),   D_i = sum_j P_ij dP_ij = dO_i . out_i
    dq' = ds k' / sqrt(E),   dk' = ds^T q' / sqrt(E)
The turn is orthogonal, so its gradient is the turn back: g. With n the standardised row and u = g * weight:
    d weight = sum g n,   d bias = sum g,   d row = (u - mean(u) - n mean(u n)) / deviation

Shapes: q (B, T, H, E); k, v (B, T, G, E), query head h reading key head h // (H / G); table (B or 1, 1, T, E/2)
complex, the turns; doc_ids (B, T) or None; weights and biases (groups, E), each for H / groups (G / groups) heads in
turn.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.attention.cuda import qknorm_rope_attention_cuda
from nanochameleon.kernels.attention.reference import attention, expect_heads, visible
from nanochameleon.kernels.dispatch import choose
from nanochameleon.kernels.ops import FLOAT_DTYPES, INDEX_DTYPES, KERNEL_DTYPES, expect, register_op

Norm = tuple[Tensor, Tensor]  # weight and bias, (groups, E)


def per_head(norm: Norm | None, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """(groups, E) -> (heads, E). Raises ValueError for groups that do not divide the heads."""
    if norm is None:
        return None, None
    if any(not p.dim() or not len(p) or heads % len(p) for p in norm):
        shapes = " and ".join(str(tuple(p.shape)) for p in norm)
        raise ValueError(f"a norm's weight and bias need groups that divide the {heads} heads; they are {shapes}")
    weight, bias = (p.repeat_interleave(heads // p.shape[0], 0) for p in norm)
    return weight, bias


def apply_rotary_emb(x: Tensor, table: Tensor) -> Tensor:
    """Turns neighbouring pairs (x[2i], x[2i+1]) of (B, H, T, E), Llama's and Meta's order of pairs.

    A pair is a complex number, so turning it is one product.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


def layer_norm(x: Tensor, norm: Norm | None, eps: float) -> Tensor:
    """(B, T, heads, E) -> the same, each head normalised."""
    if norm is None:
        return x
    if len(norm[0]) == len(norm[1]) == 1:
        return F.layer_norm(x, x.shape[-1:], norm[0][0], norm[1][0], eps)
    weight, bias = per_head(norm, x.shape[2])
    return (F.layer_norm(x, x.shape[-1:], eps=eps) * weight + bias).type_as(x)


def qknorm_rope_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, doc_ids: Tensor | None, q_norm: Norm | None, k_norm: Norm | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """One step after the other, in torch's own operations."""
    q, k = (layer_norm(x, norm, eps).transpose(1, 2) for x, norm in ((q, q_norm), (k, k_norm)))
    mask = None if doc_ids is None else visible(doc_ids, doc_ids)
    return attention(apply_rotary_emb(q, table), apply_rotary_emb(k, table), v.transpose(1, 2), mask).transpose(1, 2)


def qknorm_rope_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, doc_ids: Tensor | None, q_norm: Norm | None, k_norm: Norm | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """(B, T, H, E), the type of q; by the implementation that `dispatch.choose` names. Raises ValueError for shapes
    that do not fit."""
    name = choose("qknorm_rope_attention", q)
    if name == "reference" or not q.numel():
        return qknorm_rope_attention_reference(q, k, v, table, doc_ids, q_norm, k_norm, eps)
    expect_heads("qknorm_rope_attention", q, k, heads=2)
    if table.dim() != 4 or table.shape[1] != 1 or not table.is_complex():
        shape = f"{tuple(table.shape)}, {table.dtype}"
        raise ValueError(f"qknorm_rope_attention: the table must be (B, 1, T, E/2), complex; it is {shape}")
    turns = torch.view_as_real(table[:, 0].resolve_conj()).flatten(-2)
    norms = *per_head(q_norm, q.shape[2]), *per_head(k_norm, k.shape[2])
    if name in ("cuda", "vendor"):
        return qknorm_rope_attention_cuda(q, k, v, turns, doc_ids, *norms, eps, own=name == "cuda")
    return qknorm_rope_attention_op(q, k, v, turns, doc_ids, *norms, eps, name == "amx")[0]


# ---------------------------------------------------------------------------------------------------------------------
# The op


def _kernels(tiles: bool) -> ModuleType:
    """The compiled ones, on tiles or in vectors: what the forward pass ran, the backward pass runs."""
    from nanochameleon.kernels.attention import cpu as attention_numba
    from nanochameleon.kernels.cpu.amx import attention as attention_amx

    return attention_amx if tiles else attention_numba


def _row(x: Tensor) -> int:
    """Numbers from one position's row to the next."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def _job(tensors: dict[str, Tensor | None], q: Tensor, k: Tensor, v: Tensor, eps: float, lanes: int):
    """The tensors' addresses and the sizes, as the compiled kernels take them."""
    from nanochameleon.kernels.attention.cpu import KernelArgs

    t, heads, e = q.shape[1:]
    sizes = dict(t=t, heads=heads, key_heads=k.shape[2], e=e, width=-(-e // lanes) * lanes, size=q.element_size())
    rows = dict(q_row=_row(q), k_row=_row(k), v_row=_row(v), d_row=(heads + 2 * k.shape[2]) * e)
    where = {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}
    return KernelArgs(**(dict.fromkeys(KernelArgs._fields, 0) | where | sizes | rows | {"eps": eps}))


def _run(name: str, tensors: dict[str, Tensor | None], eps: float, tiles: bool) -> None:
    from nanochameleon.kernels.cpu import launch

    module = _kernels(tiles)
    job = _job(tensors, *(tensors[name] for name in "qkv"), eps, module.LANES)
    floats = module.scratch_floats(job, name == "backward")
    launch.run(getattr(module, name), job, len(tensors["q"]) * job.key_heads, floats)


def _in_rows(x: Tensor) -> Tensor:
    """As it is where only positions lie apart, as in the output of a product that makes q, k and v (linear.py)."""
    b, t, heads, e = x.shape
    row = _row(x)
    regular = (e == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == e) and (b == 1 or x.stride(0) == t * row)
    return x if regular else x.contiguous()


def _expect(q, k, v, turns, doc_ids, q_weight, q_bias, k_weight, k_bias, tiles: bool) -> None:
    """Raises ValueError where the inputs do not fit one another."""
    expect_heads("qknorm_rope_attention", q, k, heads=2)
    name, (b, t, h, e), g = "qknorm_rope_attention", q.shape, k.shape[2]
    expect(name, q, q.shape, (torch.bfloat16,) if tiles else KERNEL_DTYPES, q=q)
    expect(name, q, (b, t, g, e), FLOAT_DTYPES, k=k, v=v)
    expect(name, q, (b, t, e), FLOAT_DTYPES, table=turns)
    expect(name, q, (b, t), INDEX_DTYPES, doc_ids=doc_ids)
    expect(name, q, (h, e), FLOAT_DTYPES, q_weight=q_weight, q_bias=q_bias)
    expect(name, q, (g, e), FLOAT_DTYPES, k_weight=k_weight, k_bias=k_bias)


def _inputs(q, k, v, turns, doc_ids, q_weight, q_bias, k_weight, k_bias, tiles: bool) -> dict[str, Tensor | None]:
    """Of one type and regular strides, the small ones float32 and padded with zeros to whole registers."""
    turns, lanes = turns if len(turns) > 1 else turns.expand(len(q), -1, -1), _kernels(tiles).LANES
    _expect(q, k, v, turns, doc_ids, q_weight, q_bias, k_weight, k_bias, tiles)

    def row(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x.float()
        return (F.pad(x, (0, -x.shape[-1] % lanes)) if x.shape[-1] % lanes else x).contiguous()

    big = {name: _in_rows(x.to(q.dtype)) for name, x in (("q", q), ("k", k), ("v", v))}
    norms = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    docs = None if doc_ids is None else doc_ids.long().contiguous()
    return big | {name: row(x) for name, x in norms.items()} | {"table": row(turns), "docs": docs}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, turns: Tensor, doc_ids: Tensor | None, q_weight: Tensor | None,
    q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None, eps: float, tiles: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out (B, T, H, E), and (B, H, T) float32, log2 of the sum of 2^score that the gradient needs."""
    inputs = _inputs(q, k, v, turns, doc_ids, q_weight, q_bias, k_weight, k_bias, tiles)
    out = q.new_empty(q.shape)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    _run("forward", inputs | {"out": out, "lse": lse}, eps, tiles)
    return out, lse


def _backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, turns: Tensor, doc_ids: Tensor | None,
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None, eps: float,
    tiles: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v side by side, (B, T, H + 2 G, E), and of the norms, (H, E) and (G, E); without norms
    those are of length 0."""
    inputs = _inputs(q, k, v, turns, doc_ids, q_weight, q_bias, k_weight, k_bias, tiles)
    expect("qknorm_rope_attention", q, q.shape, FLOAT_DTYPES, d_out=d_out, out=out)
    (b, t, h, e), g, width = q.shape, k.shape[2], inputs["table"].shape[-1]
    both = q.new_empty(b, t, h + 2 * g, e)
    big = dict(zip(("dq", "dk", "dv"), both.split([h, g, g], 2), strict=True))
    heads = {"d_q_weight": h, "d_q_bias": h, "d_k_weight": g, "d_k_bias": g}
    parts = {name: torch.zeros(b, n, width, dtype=torch.float32, device=q.device) for name, n in heads.items()}
    saved = {"d_out": d_out.to(q.dtype).contiguous(), "out": out.to(q.dtype).contiguous(), "lse": lse}
    expect("qknorm_rope_attention", q, (b, h, t), (torch.float32,), lse=lse)
    _run("backward", inputs | big | parts | saved, eps, tiles)
    given = zip((q_weight, q_bias, k_weight, k_bias), parts.values(), strict=True)
    norms = [x.new_empty(0) if weight is None else x.sum(0)[:, :e].contiguous() for weight, x in given]
    return both, *norms


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.tiles = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)
    ctx.types = [x.dtype if isinstance(x, Tensor) else None for x in tensors]


def _gradients(backward, ctx, d_out, _):
    out, lse, *tensors = ctx.saved_tensors
    both, *norms = backward(d_out, out, lse, *tensors, ctx.eps, ctx.tiles)
    dq, dk, dv = both.split([x.shape[2] for x in tensors[:3]], 2)
    norms = [x.to(kind) if kind is not None else None for x, kind in zip(norms, ctx.types[5:], strict=True)]
    return dq, dk.to(ctx.types[1]), dv.to(ctx.types[2]), None, None, *norms, None, None


qknorm_rope_attention_op = register_op("qknorm_rope_attention", _forward, _backward, _save, _gradients)


@torch.library.register_fake("nanochameleon::qknorm_rope_attention")
def _(q, k, v, turns, doc_ids, q_weight, q_bias, k_weight, k_bias, eps, tiles):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.register_fake("nanochameleon::qknorm_rope_attention_backward")
def _(d_out, out, lse, q, k, v, turns, doc_ids, q_weight, q_bias, k_weight, k_bias, eps, tiles):
    given = q_weight, q_bias, k_weight, k_bias
    norms = [q.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in given]
    return q.new_empty(*q.shape[:2], q.shape[2] + 2 * k.shape[2], q.shape[3]), *norms
