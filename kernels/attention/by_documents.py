"""Causal attention within documents on a GPU, by torch's kernels that read where documents begin: no (B, T, T) mask.

    flash        bfloat16 and float16, compute capability 8.0 or newer, torch 2.10 or newer (torch.nn.attention.varlen)
    efficient    the rest: float32, older GPUs, older torch. It needs no compiler.

A mask costs more than its memory: flash attention refuses masks, and kernels that take one compute all T x T scores,
also where the mask hides them. Both kernels here take the B sequences as one of B * T tokens, cut at `cu_seqlens`.

Shapes: q (B, T, H, E) and k, v (B, T, G, E), already normed and rotated. Not here: when the mask is used instead
(reference.py).
"""

from functools import cache
from inspect import signature

import torch
from torch import Tensor

from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.ops import matmul_dtype

HALF = torch.bfloat16, torch.float16
CAUSAL = 1  # aten's custom_mask_type: query i of a document sees its keys 0 to i


@torch.compiler.assume_constant_result
def has_flash(device: torch.device, dtype: torch.dtype, e: int) -> bool:
    """Whether flash attention takes such heads of E numbers."""
    return device.type == "cuda" and dtype in HALF and e <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def kernel_for(device: torch.device, dtype: torch.dtype, e: int) -> str | None:
    """The kernel for such heads, "flash" or "efficient"; None where only a mask works."""
    if device.type != "cuda" or dtype not in (*HALF, torch.float32) or e % 8:
        return None
    if has_flash(device, dtype, e) and varlen_options() is not None:
        return "flash"
    too_old = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0)
    return None if too_old else "efficient"


@torch.compiler.assume_constant_result
@cache
def varlen_options() -> dict | None:
    """What makes varlen_attn causal, and lets query heads share a key head. None if torch is too old to have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    names = signature(varlen_attn).parameters  # torch 2.10 has is_causal; 2.12 has window_size and enable_gqa
    causal = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in names else {})


def attention_by_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents, kernel: str) -> Tensor:
    """(B, T, H, E), in autocast's dtype where it is on. Raises ValueError unless documents know their cu_seqlens."""
    dtype = matmul_dtype(q)  # these kernels are below autocast, which casts what scaled_dot_product_attention reads
    run = flash if kernel == "flash" else efficient
    return run(*(x.to(dtype).flatten(0, 1) for x in (q, k, v)), documents).view(q.shape)


def flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """q (N, H, E) and k, v (N, G, E) -> (N, H, E), for the N tokens of all documents."""
    from torch.nn.attention.varlen import varlen_attn  # not at the top: it imports torch's compiler

    options = varlen_options()
    if "enable_gqa" not in options:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    lengths = documents.cu_seqlens, documents.cu_seqlens, documents.max_len, documents.max_len
    return varlen_attn(q, k, v, *lengths, **options)


def efficient(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """As `flash`. The kernel knows no shared key heads."""
    q, k, v = (repeat_heads(x, q.shape[1])[None] for x in (q, k, v))  # (1, N, H, E)
    lengths = documents.cu_seqlens, documents.cu_seqlens, documents.max_len, documents.max_len
    # no bias, no dropout, and the log of each sum of weights, which the gradient reads
    return torch.ops.aten._efficient_attention_forward(q, k, v, None, *lengths, 0.0, CAUSAL, True)[0][0]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(N, G, E) -> (N, heads, E): one key head for each query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
