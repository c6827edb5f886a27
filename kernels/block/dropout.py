"""Dropout whose draws are a pure function of (key of the row, place in the row): no generator, no state.

    y = x / (1 - p) where kept, else 0;   an entry is kept where hash(key, place) >= p * 2^31

So a row is dropped alike in whatever batch it comes, on whatever rank, in a step that is run again to save memory
(recomputed activations), and on all ranks that share a layer (tensor parallelism). Torch's generators give none of it.
"""

import torch
from torch import Tensor

from nanochameleon.kernels.ops import expect

# multipliers of "lowbias32", found by search for a hash of 32 bits without bias (Chris Wellons, 2018)
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32


def _mix(x: Tensor) -> Tensor:
    """A hash of int32 in place; products wrap, and the masks make torch's shifts of signed numbers logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= FIRST
    x ^= (x >> 15) & 0x1FFFF
    x *= SECOND
    x ^= (x >> 16) & 0xFFFF
    return x


def keep_mask(shape: torch.Size, keys: Tensor, p: float) -> Tensor:
    """(B, ...) bool, True with probability 1 - p. keys (B,) int64: two of them are as good as independent draws."""
    places = torch.arange(shape[1:].numel(), dtype=torch.int32, device=keys.device)
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)  # the lower and the upper 32 bits
    x = _mix(_mix(places[None] ^ low[:, None]) + high[:, None])
    return ((x & 0x7FFFFFFF) >= int(p * 2**31)).view(shape)


def dropout(x: Tensor, keys: Tensor, p: float) -> Tensor:
    """x (B, ...), keys (B,) int64, one for each row: ValueError for others."""
    expect("dropout", x, x.shape[:1], (torch.int64,), keys=keys)
    return torch.where(keep_mask(x.shape, keys, p), x / (1 - p), 0.0)


def _signed(x: int) -> int:
    """The int64 with the lower 64 bits of x."""
    return (x & (2**64 - 1)) - (x >> 63 & 1) * 2**64


def fold_in(keys: Tensor, number: int) -> Tensor:
    """Other keys (B,) for the same rows: those of the layer, or of the branch, of this number (splitmix64)."""
    x = keys + _signed((number + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))
