"""Output layer and z-loss cross-entropy on a CPU: torch's products make the logits of a chunk of the vocabulary,
zloss_numba.py works on them where they lie, and the next chunk takes the same memory. Formulas: linear_zloss.py.

Chunks of the vocabulary, not of rows as on a GPU: a CPU has few rows at once, and products of a sixteenth of them wait
for the weight, which each would read again. So each chunk's product is as fast as the whole, its piece of the weight's
gradient is complete and rounded once, and only the sum of the gradient of hidden, small, goes on. The price is that a
row's log Z is known after all chunks: logits are made anew for the gradient, 8 N V D operations in place of 6.

A chunk is at most a sixteenth of the logits, from vocabularies of 4,096 on. Ms on one core of a Xeon with AMX, hidden
(1024, 256), weight (16384, 256), forward and with backward:

    float32   54 / 159   all logits, zloss_numba.py on them        bfloat16   11 / 43
              68 / 217   tiles of our own, the first version here              -
              53 / 210   chunks                                              15 / 56
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochameleon.kernels.zloss.cross_entropy import backward_, forward_rows

CHUNKS = 16
LEAST, ALIGNED = 256, 16  # columns: products of fewer are slow; rows of logits start at whole cache lines


def columns_a_chunk(v: int) -> int:
    return min(v, max(v // CHUNKS // ALIGNED * ALIGNED, LEAST))


def chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First id, its part of the weight (C, D) in the type of hidden, and logits (N, C) that hold until the next."""
    columns = columns_a_chunk(len(weight))
    buffer = torch.empty(len(hidden) * columns, dtype=hidden.dtype, device="cpu")
    for first in range(0, len(weight), columns):
        part = weight[first : first + columns].to(hidden.dtype)
        logits = buffer[: len(hidden) * len(part)].view(len(hidden), len(part))
        yield first, part, torch.mm(hidden, part.T, out=logits)


def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-> cross-entropy (N,) and log Z (N,)."""
    log_z = torch.full(targets.shape, -torch.inf, dtype=torch.float32, device="cpu")
    own = torch.zeros_like(log_z)
    anyone = targets.clamp(max=0)
    for first, part, logits in chunks(hidden, weight):
        here = targets - first
        at = here.clamp(0, len(part) - 1)
        own = torch.where(here == at, logits.gather(1, at[:, None])[:, 0].float(), own)
        log_z = torch.logaddexp(log_z, forward_rows(logits, anyone)[1])
    counted = targets >= 0
    return torch.where(counted, log_z - own, 0.0), torch.where(counted, log_z, 0.0)


def backward(
    g: Tensor, h: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_z: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight for any g and h."""
    d_hidden, d_weight = torch.zeros_like(hidden, dtype=torch.float32), torch.empty_like(weight)
    for first, part, logits in chunks(hidden, weight):
        here = targets - first
        elsewhere = (targets >= 0) & (here < 0)
        backward_(g, h, logits, here.masked_fill(elsewhere, len(part)), log_z)
        d_weight[first : first + len(part)] = torch.mm(logits.T, hidden)
        d_hidden += torch.mm(logits, part)
    return d_hidden.to(hidden.dtype), d_weight
