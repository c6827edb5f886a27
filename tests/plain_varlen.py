"""What varlen_attention computes for a cache, sequence by sequence: torch has no such kernel for CPUs."""

import torch
from torch import Tensor


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    causal: bool, seqused_k: Tensor,
) -> Tensor:  # fmt: skip
    """query (T_q, H, E), key and value (T_k, G, E) -> (T_q, H, E). Every query sees all keys of its sequence in use."""
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (cu_seq_q, cu_seq_k, seqused_k))
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1 and not causal
    assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)
    assert cu_seq_q.diff().max() <= max_q and (seqused_k <= cu_seq_k.diff()).all() and seqused_k.max() <= max_k
    shared, out = query.shape[1] // key.shape[1], torch.empty_like(query)
    for i, used in enumerate(seqused_k.tolist()):
        rows, first = slice(*cu_seq_q[i : i + 2].tolist()), int(cu_seq_k[i])
        k, v = (x[first : first + used].repeat_interleave(shared, 1) for x in (key, value))
        scores = torch.einsum("ihd,jhd->hij", query[rows], k) / query.shape[-1] ** 0.5
        out[rows] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
    return out
