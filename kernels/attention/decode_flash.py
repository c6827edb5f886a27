"""Flash attention of a decode step: a number of visible cache entries for each slot, where others need a mask.

A slot's new token sees all entries up to its own. scaled_dot_product_attention takes no such lengths, and with a mask
it does not run flash attention. varlen_attention takes them. Each (slot, key head) is one sequence with one new token,
whose heads are the query heads that share the key head. So the cache is read where it is, and no key is copied.

Shapes: N slots with one new token each, H query heads, G key heads, a cache of S entries. Nothing here waits for the
GPU or depends on a value, so a step can be captured as a CUDA graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanochameleon.kernels.attention.flash import varlen_attention


class CacheLengths(NamedTuple):
    """The sequences of varlen_attention, one for each (slot, key head). Made once a step, for all layers."""

    kv_len: int  # at least the longest of seqused_k
    cu_seq_q: Tensor  # (N G + 1,) int32: 0, 1, 2, ..., since each has one token
    cu_seq_k: Tensor  # (N G + 1,) int32: 0, S, 2 S, ..., where its entries begin
    seqused_k: Tensor  # (N G,) int32: how many of its entries are seen

    @staticmethod
    def of(positions: Tensor, keys: Tensor, kv_len: int) -> "CacheLengths":
        """positions (N, 1) of the new tokens; keys (N, G, S, E) of any layer.

        A token at kv_len or later sees the first kv_len entries. It is in a slot whose result nobody reads.
        """
        n, groups, size = keys.shape[:3]
        starts = torch.arange(n * groups + 1, dtype=torch.int32, device=positions.device)
        used = (positions[:, 0] + 1).clamp(max=kv_len).int().repeat_interleave(groups)
        return CacheLengths(kv_len, starts, starts * size, used)


def flash_decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: CacheLengths) -> Tensor:
    """q (N, 1, H, E), keys and values (N, G, S, E), contiguous -> (N, 1, H, E)."""
    n, groups, size, e = keys.shape
    rows = q.reshape(n * groups, -1, e)  # (N G, H / G, E)
    shared = rows.shape[1]
    if shared == 1:
        # Flash splits the keys of a slot over idle processors only where several heads read them: two ask the same.
        rows = rows.repeat(1, 2, 1)
    k, v = (x.view(n * groups * size, 1, e) for x in (keys, values))
    sequences = lengths.cu_seq_q, lengths.cu_seq_k, 1, lengths.kv_len
    out = varlen_attention(rows, k, v, *sequences, causal=False, seqused_k=lengths.seqused_k)
    return out[:, :shared].reshape(n, 1, -1, e)
