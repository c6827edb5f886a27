"""Attention of new tokens to a KV cache, as in a decode step: QK-norm and RoPE, write keys and values, attend.

It writes into the cache, hence the trailing underscore of its name, and has no gradient. The formulas are those of
qknorm_rope_attention.py. Not here: which tokens are new, and sampling (generation/).

Shapes: N slots of a batch with T new tokens each (one, or few), H heads, G key heads. The cache has S positions, of
which the first `kv_len` are attended to. qkv (N, T, H + 2 G, E): queries, keys, values, as the projections give them.
freqs_cis (N, T, E/2, 2). norm: weight and bias (H + G, E), or None. keys, values (N, G, S, E). positions (N, T)
int64 below S; attention of a token at kv_len or later is of no use, and harms no other. seen: the result of
`see_cache`, which all layers share.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.attention.reference import apply_rotary_emb, expect_heads
from nanochameleon.kernels.dispatch import choose
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.ops import FLOAT_DTYPES, expect


def see_cache(positions: Tensor, keys: Tensor, kv_len: int) -> Tensor:
    """What new tokens see of a cache: all entries up to their own, of the first kv_len.

    Returns a mask (N, T, kv_len), 0 where a token sees an entry, else -infinity.
    """
    unseen = torch.arange(kv_len, device=positions.device) > positions[..., None]
    return torch.zeros(unseen.shape, dtype=keys.dtype, device=keys.device).masked_fill_(unseen, -torch.inf)


def decode_attention_(
    qkv: Tensor, freqs_cis: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float, keys: Tensor, values: Tensor,
    positions: Tensor, seen: Tensor,
) -> Tensor:  # fmt: skip
    """(N, T, H, E), by the implementation that `dispatch.choose` names; changes keys and values.

    On a GPU nothing checks that positions are below S.
    """
    if choose("decode_attention", qkv) != "cuda" or qkv.shape[-1] not in gpu.HEAD_DIMS:
        return decode_attention_reference_(qkv, freqs_cis, norm, eps, keys, values, positions, seen)
    op = torch.ops.nanochameleon.decode_attention
    return op(qkv, freqs_cis.flatten(-2), *(norm or (None, None)), eps, keys, values, positions, seen.shape[-1])


def qknorm_rope(x: Tensor, freqs_cis: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """QK-norm and RoPE of queries and keys (N, T, H + G, E) at once, in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    if norm is not None:
        weight, bias = norm
        wide = torch.addcmul(bias, F.layer_norm(wide, wide.shape[-1:], eps=eps), weight)
    return apply_rotary_emb(wide, freqs_cis[:, :, None]).to(x.dtype)


def decode_attention_reference_(
    qkv: Tensor, freqs_cis: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float, keys: Tensor, values: Tensor,
    positions: Tensor, seen: Tensor,
) -> Tensor:  # fmt: skip
    """A few of torch's operations; arguments as for `decode_attention_`."""
    n_heads, groups = qkv.shape[2], keys.shape[1]
    # 1. Norm and rotate queries and keys.
    qk, v = qkv.split([n_heads - groups, groups], 2)
    q, k = qknorm_rope(qk, freqs_cis, norm, eps).split([n_heads - 2 * groups, groups], 2)
    # 2. Append keys and values to the cache.
    slots = torch.arange(len(qkv), device=qkv.device)[:, None]
    keys[slots, :, positions], values[slots, :, positions] = k.to(keys.dtype), v.to(values.dtype)
    # 3. Attend.
    return masked_attention(q, keys, values, seen)


def masked_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """q (N, T, H, E) -> the same. Query heads that share a key head become rows of one attention: no key is copied."""
    (n, t, n_heads, e), groups, kv_len = q.shape, keys.shape[1], mask.shape[-1]
    shared = n_heads // groups  # query heads for each key head
    q = q.reshape(n, t, groups, shared, e).transpose(1, 2).reshape(n, groups, t * shared, e)
    mask = mask[:, None] if t == 1 else mask[:, None].repeat_interleave(shared, 2)
    out = F.scaled_dot_product_attention(q, keys[:, :, :kv_len], values[:, :, :kv_len], attn_mask=mask)
    return out.reshape(n, groups, t, shared, e).transpose(1, 2).reshape(n, t, -1, e)


@torch.library.custom_op("nanochameleon::decode_attention", mutates_args=("keys", "values"))
def _decode_attention(
    qkv: Tensor, cos_sin: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keys: Tensor,
    values: Tensor, positions: Tensor, kv_len: int,
) -> Tensor:  # fmt: skip
    """decode.cu; cos_sin (N, T, E). Raises ValueError for inputs that do not fit."""
    expect_heads("decode_attention", qkv, keys.transpose(1, 2), heads=2)
    (n, t, n_heads, e), (groups, places), name = qkv.shape, keys.shape[1:3], "decode_attention"
    expect(name, qkv, qkv.shape, (torch.bfloat16,), qkv=qkv)
    expect(name, qkv, (n, groups, places, e), (torch.bfloat16,), keys=keys, values=values)
    expect(name, qkv, (n, t, e), FLOAT_DTYPES, cos_sin=cos_sin)
    expect(name, qkv, (n_heads - groups, e), FLOAT_DTYPES, weight=weight, bias=bias)
    expect(name, qkv, (n, t), (torch.int64,), positions=positions)
    if kv_len > places or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"{name}: keys and values must be contiguous and hold {kv_len} positions; they hold {places}")
    norm = None if weight is None else (weight.float().contiguous(), bias.float().contiguous())
    cos_sin, positions = cos_sin.float().contiguous(), positions.contiguous()
    queries = gpu.decode_append(qkv.contiguous(), cos_sin, norm, eps, keys, values, positions)
    return gpu.decode_attention(queries, keys, values, positions, kv_len)


@_decode_attention.register_fake
def _(qkv, cos_sin, weight, bias, eps, keys, values, positions, kv_len):
    n, t, n_heads, e = qkv.shape
    return qkv.new_empty(n, t, n_heads - 2 * keys.shape[1], e)
