"""Plain references: causal attention within documents with grouped keys, QK-norm, RoPE, and the three as one op.

    attention           out[b, h, i] = sum_j softmax_j(q[b, h, i] . k[b, g, j] / sqrt(E)) v[b, g, j],
                        g = h // (H / G), over the keys j that query i may see
    layer_norm          each head of q or k normalised, times weight plus bias
    apply_rotary_emb    each pair (x[2i], x[2i+1]) rotated by its angle. The pairs are Meta's: Hugging Face pairs x[i]
                        with x[i + E/2] instead

`attention` runs torch's fused version, `attention_reference` the formula. Not here: the projections (transformer.py).

Shapes: `attention` takes q (B, H, T, E) and k, v (B, G, S, E) with G key heads dividing H. The queries are the last T
of the S positions. The whole op takes heads after positions, as projections give them: see qknorm_rope_attention.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.attention.by_documents import attention_by_documents, kernel_for
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.flash import flash_available
from nanochameleon.kernels.ops import FLOAT_DTYPES, INDEX_DTYPES, expect, matmul_dtype

Norm = tuple[Tensor, Tensor]  # weight and bias, (groups, E)


def visible(query_docs: Tensor, key_docs: Tensor) -> Tensor:
    """Which keys a query may see: those at or before it, of its own document. (B, T), (B, S) -> bool (B, T, S).

    The queries are the last T of the S positions. Every query sees itself, padding (document -1) included, so no row of
    the softmax is empty. Padding sees padding alone.
    """
    t, s = query_docs.shape[1], key_docs.shape[1]
    causal = torch.ones(t, s, dtype=torch.bool, device=query_docs.device).tril(s - t)
    return causal & (query_docs[:, :, None] == key_docs[:, None, :])  # (B, T, S)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The formula, step by step, in the dtype of its inputs; arguments as for `attention`."""
    group = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])  # the key head of each query head
    scores = torch.einsum("bhid,bhjd->bhij", q, k[:, group]) / q.shape[-1] ** 0.5  # (B, H, T, S)
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v[:, group])  # (B, H, T, E)


def expect_heads(op: str, q: Tensor, k: Tensor, heads: int) -> None:
    """Raise ValueError unless both have 4 dimensions, and k's heads (dimension `heads`) divide q's."""
    if q.dim() != 4 or k.dim() != 4 or not k.shape[heads] or q.shape[heads] % k.shape[heads]:
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"{op}: queries and keys need 4 dimensions, and key heads that divide the others: {shapes}")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, H, T, E). `mask` is bool (B, T, S), True where a key is seen; None is causal, or everything for T = 1.

    Raises ValueError for shapes that do not fit: torch's own attention reads past the end of a v shorter than k.
    """
    expect_heads("attention", q, k, heads=1)
    expect("attention", q, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]), FLOAT_DTYPES, k=k, v=v)
    expect("attention", q, (q.shape[0], q.shape[2], k.shape[2]), (torch.bool,), mask=mask)
    if mask is None and q.shape[2] not in (1, k.shape[2]):
        raise ValueError(f"{q.shape[2]} queries on {k.shape[2]} keys need a mask")
    # Flash attention reads shared key heads as they are. No other kernel for GPUs does, so with enable_gqa torch would
    # fall back to its slow formula. On a CPU enable_gqa would change the bits of the gradients.
    shares = mask is None and flash_available(q.device, matmul_dtype(q), q.shape[-1])
    if k.shape[1] != q.shape[1] and not shares:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    shared_heads = k.shape[1] != q.shape[1]
    if q.shape[2] == 1:  # a branch, since the comparison is no bool where torch.compile keeps lengths as symbols
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=shared_heads)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared_heads)


def attention_within_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Causal attention of q (B, T, H, E) on k and v (B, T, G, E) within documents -> (B, T, H, E).

    On a GPU no mask is made, unless nobody knows where documents begin or torch has no kernel for this dtype. On a CPU
    one masked call for the whole batch stays: it takes less time than a call for each short document.
    """
    plain = documents is None or (q.is_cuda and documents.one_a_sequence())
    kernel = None if plain else kernel_for(q.device, matmul_dtype(q), q.shape[-1])
    if kernel is not None and documents.cu_seqlens is not None:
        expect_heads("attention", q, k, heads=2)
        expect("attention", q, (*q.shape[:2], k.shape[2], q.shape[3]), FLOAT_DTYPES, k=k, v=v)
        expect("attention", q, q.shape[:2], INDEX_DTYPES, ids=documents.ids)
        return attention_by_documents(q, k, v, documents, kernel)
    mask = None if plain else visible(documents.ids, documents.ids)
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# QK-norm, RoPE, and all three as one op


def per_head(norm: Norm | None, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """Repeat weight and bias: (groups, E) -> (heads, E). Raises ValueError unless the groups divide the heads."""
    if norm is None:
        return None, None
    if any(not p.dim() or not len(p) or heads % len(p) for p in norm):
        shapes = " and ".join(str(tuple(p.shape)) for p in norm)
        raise ValueError(f"a norm's weight and bias need groups that divide the {heads} heads; they are {shapes}")
    weight, bias = (p.repeat_interleave(heads // p.shape[0], 0) for p in norm)
    return weight, bias


def layer_norm(x: Tensor, norm: Norm | None, eps: float) -> Tensor:
    """(B, T, heads, E) -> the same with each head normalised, times weight plus bias. norm None changes nothing."""
    if norm is None:
        return x
    if len(norm[0]) == len(norm[1]) == 1:
        return F.layer_norm(x, x.shape[-1:], norm[0][0], norm[1][0], eps)
    weight, bias = per_head(norm, x.shape[2])
    return (F.layer_norm(x, x.shape[-1:], eps=eps) * weight + bias).type_as(x)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate neighbouring pairs (x[2i], x[2i+1]) of (B, H, T, E) by freqs_cis (B or 1, 1, T, E/2, 2): cos and sin.

    Or those of (B, T, H, E) by (B or 1, T, 1, E/2, 2).

    A pair (a, b) is the number a + ib, and multiplying by cos + i sin rotates it by that angle:
        (a + ib) (cos + i sin) = (a cos - b sin) + i (a sin + b cos)
    torch's own complex product is 2 to 18 times as fast on a CPU, but torch.compile has no code for it.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    product = real_product if torch.compiler.is_compiling() or x.device.type != "cpu" else complex_product
    return product(wide.unflatten(-1, (-1, 2)), freqs_cis.to(wide.dtype)).flatten(-2).type_as(x)


def complex_product(x: Tensor, y: Tensor) -> Tensor:
    """The product of complex numbers whose two parts are the last dimension: (..., 2)."""
    x, y = (torch.view_as_complex(z.resolve_neg().contiguous()) for z in (x, y))
    return torch.view_as_real(x * y)


def real_product(x: Tensor, y: Tensor) -> Tensor:
    """The same in real arithmetic."""
    (a, b), (cos, sin) = x.unbind(-1), y.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1)


def qknorm_rope_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, freqs_cis: Tensor, documents: Documents | None, q_norm: Norm | None,
    k_norm: Norm | None, eps: float,
) -> Tensor:  # fmt: skip
    """One step after the other, in torch's own operations; arguments as for `qknorm_rope_attention`."""
    q, k = layer_norm(q, q_norm, eps), layer_norm(k, k_norm, eps)  # (B, T, H, E), (B, T, G, E)
    # The norm comes before the rotation, which keeps the lengths that the norm fixed.
    freqs_cis = freqs_cis.transpose(1, 2)  # (B or 1, T, 1, E/2, 2)
    q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
    return attention_within_documents(q, k, v, documents)  # (B, T, H, E)
