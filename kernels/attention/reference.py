"""Causal attention within documents, with grouped keys and values: the formula as the reference, and torch's fused one.

    out[b, h, i] = sum_j softmax_j(q[b, h, i] . k[b, g, j] / sqrt(D)) v[b, g, j],   g = h // (H / G),

over the keys j that query i may see. It leaves out norms, rotations and projections (transformer.py).

Shapes: q (B, H, T, D); k, v (B, G, S, D) with G key heads dividing H; S >= T, the queries being the last T positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.ops import FLOAT_DTYPES, expect


def visible(query_docs: Tensor, key_docs: Tensor) -> Tensor:
    """Which keys a query may see: those at or before it, of its own document. (B, T), (B, S) -> bool (B, T, S).

    The queries are the last T of the S positions. Every query sees itself, padding (document -1) included, so that no
    row of the softmax is empty; padding sees padding alone.
    """
    t, s = query_docs.shape[1], key_docs.shape[1]
    before = torch.ones(t, s, dtype=torch.bool, device=query_docs.device).tril(s - t)
    return before & (query_docs[:, :, None] == key_docs[:, None, :])


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The formula, step by step, in the type of its inputs; arguments as for `attention`."""
    group = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])  # the key head of each query head
    scores = torch.einsum("bhid,bhjd->bhij", q, k[:, group]) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v[:, group])


def expect_heads(op: str, q: Tensor, k: Tensor, heads: int) -> None:
    """Raises ValueError unless both have 4 dimensions, and k's heads, the dimension of this number, divide q's."""
    if q.dim() != 4 or k.dim() != 4 or not k.shape[heads] or q.shape[heads] % k.shape[heads]:
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"{op}: queries and keys need 4 dimensions, and key heads that divide the others: {shapes}")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, H, T, D). `mask` is bool (B, T, S), True where a key is seen; None is causal, or for T = 1 everything. Raises
    ValueError for shapes that do not fit: torch's own attention reads what lies behind a v that is shorter than k."""
    expect_heads("attention", q, k, heads=1)
    expect("attention", q, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]), FLOAT_DTYPES, k=k, v=v)
    expect("attention", q, (q.shape[0], q.shape[2], k.shape[2]), (torch.bool,), mask=mask)
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    if q.shape[2] not in (1, k.shape[2]):
        raise ValueError(f"{q.shape[2]} queries on {k.shape[2]} keys need a mask")
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
