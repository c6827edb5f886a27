"""Attention of new ids to a cache, as in a decode step: norm and turn of queries and keys, keys and values into the
cache, attention to all places up to each id's own.

It writes into the cache, hence its name's last letter; no gradient. The formulas are qknorm_rope_attention.py's.

Shapes: N rows of a batch, T new ids each (one, or few), H heads, G key heads, S places of the cache, `span` of them
in sight. heads (N, T, H + 2 G, E): queries, keys, values, as the projections leave them; turns (N, T, E/2) complex;
norm: weight and bias (H + G, E), or None; keys, values (N, G, S, E); positions (N, T) int64 below span; bias (N, T,
span) is 0 where an id sees a place and -infinity elsewhere, made once for all layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.attention.reference import expect_heads
from nanochameleon.kernels.dispatch import choose
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.ops import FLOAT_DTYPES, expect


def decode_attention_(
    heads: Tensor, turns: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float, keys: Tensor, values: Tensor,
    positions: Tensor, bias: Tensor,
) -> Tensor:  # fmt: skip
    """(N, T, H, E), by the implementation that `dispatch.choose` names; keys and values change. A GPU does not look
    whether positions are below span."""
    if choose("decode_attention", heads) != "cuda" or heads.shape[-1] not in gpu.HEAD_DIMS:
        return decode_attention_reference_(heads, turns, norm, eps, keys, values, positions, bias)
    pairs = torch.view_as_real(turns.resolve_conj()).flatten(-2)
    op, span = torch.ops.nanochameleon.decode_attention, bias.shape[-1]
    return op(heads, pairs, *(norm or (None, None)), eps, keys, values, positions, span)


def qknorm_rope(x: Tensor, turns: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """QK-norm and rotary positions of queries and keys (N, T, H + G, E) at once, in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    if norm is not None:
        weight, bias = norm
        wide = torch.addcmul(bias, F.layer_norm(wide, wide.shape[-1:], eps=eps), weight)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, :, None]).flatten(-2).to(x.dtype)


def decode_attention_reference_(
    heads: Tensor, turns: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float, keys: Tensor, values: Tensor,
    positions: Tensor, bias: Tensor,
) -> Tensor:  # fmt: skip
    """In few of torch's operations. Query heads that share a key head are rows of one attention: no key is copied."""
    (n, t, every, e), groups, span = heads.shape, keys.shape[1], bias.shape[-1]
    each = (every - 2 * groups) // groups
    qk, v = heads.split([every - groups, groups], 2)
    q, k = qknorm_rope(qk, turns, norm, eps).split([every - 2 * groups, groups], 2)
    rows = torch.arange(n, device=heads.device)[:, None]
    keys[rows, :, positions], values[rows, :, positions] = k.to(keys.dtype), v.to(values.dtype)
    q = q.reshape(n, t, groups, each, e).transpose(1, 2).reshape(n, groups, t * each, e)
    mask = bias[:, None] if t == 1 else bias[:, None].repeat_interleave(each, 2)
    out = F.scaled_dot_product_attention(q, keys[:, :, :span], values[:, :, :span], attn_mask=mask)
    return out.reshape(n, groups, t, each, e).transpose(1, 2).reshape(n, t, -1, e)


@torch.library.custom_op("nanochameleon::decode_attention", mutates_args=("keys", "values"))
def _decode_attention(
    heads: Tensor, turns: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keys: Tensor, values: Tensor,
    positions: Tensor, span: int,
) -> Tensor:  # fmt: skip
    """decode.cu. turns (N, T, E): cos and sin of each pair. Raises ValueError for what does not fit."""
    expect_heads("decode_attention", heads, keys.transpose(1, 2), heads=2)
    (n, t, every, e), (groups, places), name = heads.shape, keys.shape[1:3], "decode_attention"
    expect(name, heads, heads.shape, (torch.bfloat16,), heads=heads)
    expect(name, heads, (n, groups, places, e), (torch.bfloat16,), keys=keys, values=values)
    expect(name, heads, (n, t, e), FLOAT_DTYPES, turns=turns)
    expect(name, heads, (every - groups, e), FLOAT_DTYPES, weight=weight, bias=bias)
    expect(name, heads, (n, t), (torch.int64,), positions=positions)
    if span > places or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"a cache that is written into must be contiguous, and hold the {span} places in sight")
    norm = None if weight is None else (weight.float().contiguous(), bias.float().contiguous())
    turns, positions = turns.float().contiguous(), positions.contiguous()
    queries = gpu.decode_append(heads.contiguous(), turns, norm, eps, keys, values, positions)
    return gpu.decode_attention(queries, keys, values, positions, span)


@_decode_attention.register_fake
def _(heads, turns, weight, bias, eps, keys, values, positions, span):
    n, t, every, e = heads.shape
    return heads.new_empty(n, t, every - 2 * keys.shape[1], e)
