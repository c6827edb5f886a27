"""The bounds of the documents of packed sequences, in the forms that attention reads.

    ids          0 0 0 1 1 -1 -1 -1     5 5 5 5 5 5 5 5       2 sequences of 8 tokens
    cu_seqlens   0 3 5 8 16                                   padded with 16 to 8 numbers
    max_len      8                                            the longest document, rounded up to a power of two

A mask of (B, T, T) is made from `ids`; kernels that take documents one after the other read `cu_seqlens`, under the
name that flash attention gave it. Not here: attention, and packing (nanochameleon/packing.py).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents(NamedTuple):
    """The documents of a batch of B sequences of T tokens, for all layers of the model."""

    ids: Tensor  # (B, T) int64, equal within a document
    # (n + 1,) int32: each document's first token in the flattened batch, then B * T. Padding counts as a document. None
    # where nobody has counted: then attention needs a mask.
    cu_seqlens: Tensor | None
    max_len: int  # no document has more tokens

    @staticmethod
    def of(doc_ids: Tensor) -> "Documents":
        """Find where the documents of (B, T) begin, if that can be known without waiting for a GPU.

        cu_seqlens stays None for ids on another device than the CPU, and where an id comes back in its sequence after
        another one. It is padded with B * T to a length that is a power of two, and max_len is rounded up to one, so
        that a compiled model sees few shapes. A batch of one document a sequence keeps its B + 1 numbers.
        """
        b, t = doc_ids.shape
        if doc_ids.device.type != "cpu" or not doc_ids.numel():
            return Documents(doc_ids, None, t)
        changes = doc_ids[:, 1:] != doc_ids[:, :-1]
        starts = F.pad(changes, (1, 0), value=True).flatten().nonzero()[:, 0]
        if len(torch.stack([starts // t, doc_ids.flatten()[starts]]).unique(dim=1).T) < len(starts):
            return Documents(doc_ids, None, t)
        cu_seqlens = F.pad(starts, (0, 1), value=b * t)
        padding = power_of_two(len(cu_seqlens)) - len(cu_seqlens) if len(starts) > b else 0
        max_len = min(power_of_two(int(cu_seqlens.diff().max())), t)
        return Documents(doc_ids, F.pad(cu_seqlens, (0, padding), value=b * t).int(), max_len)

    def to(self, device: torch.device | str) -> "Documents":
        ids, cu_seqlens = (None if x is None else move(x, device) for x in self[:2])
        return Documents(ids, cu_seqlens, self.max_len)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First and last position of each token's document, (B, T) int32 each. cu_seqlens must be known."""
        (b, t), cu_seqlens = self.ids.shape, self.cu_seqlens
        tokens = torch.arange(b * t, dtype=torch.int32, device=cu_seqlens.device)
        document = torch.bucketize(tokens, cu_seqlens[1:], right=True)
        sequence = tokens // t * t  # the sequence's first token
        bounds = cu_seqlens[document] - sequence, cu_seqlens[document + 1] - 1 - sequence
        return bounds[0].view(b, t), bounds[1].view(b, t)

    def one_a_sequence(self) -> bool:
        """Whether each sequence is known to be one document, padding included."""
        return self.cu_seqlens is not None and len(self.cu_seqlens) == len(self.ids) + 1


def move(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy to a device without waiting for it. A GPU reads pinned memory by itself; from other memory, a copy may wait
    for all that the GPU still has to do."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda" and torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
