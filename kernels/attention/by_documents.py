"""Causal attention within documents on a GPU, by torch's kernels that read where documents begin: no (B, T, T) mask.

    flash        bfloat16 and float16 on GPUs of compute capability 8.0 and newer
    efficient    the rest: float32, older GPUs. Unlike FlexAttention it needs no compiler.

Both are for NVIDIA GPUs. An AMD GPU keeps the mask: nobody has tried these kernels there.

A mask costs more than its memory: flash attention refuses masks, and kernels that take one compute all T x T scores,
also where the mask hides them. Both kernels here take the B sequences as one of B * T tokens, cut at `cu_seqlens`.

Shapes: q (B, T, H, E) and k, v (B, T, G, E), already normed and rotated. Not here: when the mask is used instead
(reference.py).
"""

import torch
from torch import Tensor

from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.flash import flash_available
from nanochameleon.kernels.constant import assume_constant_result
from nanochameleon.kernels.ops import matmul_dtype

CAUSAL = 1  # aten's custom_mask_type: query i of a document sees its keys 0 to i


@assume_constant_result
def kernel_for(device: torch.device, dtype: torch.dtype, e: int) -> str | None:
    """The kernel for heads of E numbers, "flash" or "efficient"; None where only a mask works."""
    if flash_available(device, dtype, e):
        return "flash"
    nvidia = device.type == "cuda" and torch.version.hip is None
    if not nvidia or dtype not in (torch.float32, torch.float16, torch.bfloat16) or e % 8:
        return None
    too_old = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0)
    return None if too_old else "efficient"


def attention_by_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents, kernel: str) -> Tensor:
    """(B, T, H, E), in autocast's dtype where it is on. Nothing is checked: the kernels read as documents say."""
    dtype = matmul_dtype(q)  # these kernels are below autocast, which casts what scaled_dot_product_attention reads
    run = flash if kernel == "flash" else efficient
    return run(*(x.to(dtype).flatten(0, 1) for x in (q, k, v)), documents).view(q.shape)


def flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """q (N, H, E) and k, v (N, G, E) -> (N, H, E), for the N tokens of all documents.

    torch.nn.attention.varlen wraps the same operation, but takes shared key heads only since torch 2.12. The operation
    itself takes them since torch 2.5.
    """
    lengths = documents.cu_seqlens, documents.cu_seqlens, documents.max_len, documents.max_len
    dropout, causal, debug = 0.0, True, False
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, dropout, causal, debug)[0]


def efficient(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """As `flash`. The kernel knows no shared key heads.

    For the gradient it keeps the log-sum-exp of each query as (n, H, max_len) fp32, n and max_len as padded in
    `documents`: 268 MB a layer for 1,024 documents, 16 heads and max_len 4,096. With many short documents next to a
    long one that is more than a mask takes.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (x[None] for x in (q, k, v))  # (1, N, H, E)
    lengths = documents.cu_seqlens, documents.cu_seqlens, documents.max_len, documents.max_len
    # no bias, no dropout, and the log of each sum of weights, which the gradient reads
    return torch.ops.aten._efficient_attention_forward(q, k, v, None, *lengths, 0.0, CAUSAL, True)[0][0]
