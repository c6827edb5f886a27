"""Dropout whose draws are a pure function of (seed of the sample, position in it): no generator, no state.

    y = x / (1 - p) where kept, else 0;   an entry is kept where hash(seed, position) >= p * 2^31

So a sample drops the same entries in any batch, on any rank, in recomputed activations, and on all ranks that share a
layer (tensor parallelism). Torch's generators guarantee none of this. Not here: where seeds come from (train.py).
"""

import torch
from torch import Tensor

from nanochameleon.kernels.ops import expect

# multipliers of "lowbias32", found by search for a 32-bit hash without bias (Chris Wellons, 2018)
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32


def _mix(x: Tensor) -> Tensor:
    """Hash int32 in place. Multiplications wrap; the masks turn torch's signed shifts into logical ones."""
    x ^= (x >> 16) & 0xFFFF
    x *= FIRST
    x ^= (x >> 15) & 0x1FFFF
    x *= SECOND
    x ^= (x >> 16) & 0xFFFF
    return x


def keep_mask(shape: torch.Size, seeds: Tensor, p: float) -> Tensor:
    """(B, ...) bool, True with probability 1 - p. seeds (B,) int64: two of them give independent draws."""
    positions = torch.arange(shape[1:].numel(), dtype=torch.int32, device=seeds.device)
    low, high = seeds.to(torch.int32), (seeds >> 32).to(torch.int32)  # the lower and the upper 32 bits
    x = _mix(_mix(positions[None] ^ low[:, None]) + high[:, None])  # (B, numbers of a sample)
    return ((x & 0x7FFFFFFF) >= int(p * 2**31)).view(shape)


def dropout(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """x (B, ...), seeds (B,) int64, one for each sample. Raises ValueError for other shapes."""
    expect("dropout", x, x.shape[:1], (torch.int64,), seeds=seeds)
    return torch.where(keep_mask(x.shape, seeds, p), x / (1 - p), 0.0)


def _signed(x: int) -> int:
    """The int64 with the lower 64 bits of x."""
    return (x & (2**64 - 1)) - (x >> 63 & 1) * 2**64


def fold_in(seeds: Tensor, number: int) -> Tensor:
    """New seeds (B,) from seeds and a number, such as that of a layer or a branch (splitmix64), as JAX's `fold_in`."""
    x = seeds + _signed((number + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))
