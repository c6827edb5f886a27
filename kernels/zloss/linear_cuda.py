"""Output layer and z-loss cross-entropy on a GPU: cuBLAS makes the logits of a chunk of rows, zloss.cu works on them
where they lie, cuBLAS uses up what that leaves, and the next chunk takes the same memory. Formulas: linear_zloss.py.

Chunks of rows, not of the vocabulary: a row's log Z is known as soon as its logits are, so that they can become their
gradient in one pass, and 6 N V D operations do where a vocabulary's chunks take 8. The price is that the weight's
gradient is a sum over chunks, rounded to its type after each; hence few of them.

At hidden [32768, 4096] and weight [65536, 4096], bfloat16, a chunk is 4,096 rows: 0.5 GiB of logits in place of 4.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.ops import expect

CHUNKS = 8  # at most
CHUNK_BYTES = 2**28  # of logits at least, as far as there are so many: products of few rows are slow


def rows_a_chunk(n: int, v: int, size: int) -> int:
    return min(n, max(-(-n // CHUNKS), CHUNK_BYTES // (v * size), 1))


def chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their logits (rows, V), which hold until the next are asked for."""
    n, v = len(hidden), len(weight)
    rows = rows_a_chunk(n, v, hidden.element_size())
    buffer = hidden.new_empty(rows, v)
    for start in range(0, n, max(rows, 1)):
        part = slice(start, min(start + rows, n))
        yield part, torch.mm(hidden[part], weight.T, out=buffer[: part.stop - start])


def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-> cross-entropy (N,) and log Z (N,)."""
    loss, log_z = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
    for part, logits in chunks(hidden, weight.to(hidden.dtype)):
        loss[part], log_z[part] = gpu.zloss_forward(logits, targets[part])
    return loss, log_z


def backward(
    g: Tensor, h: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_z: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight for any g and h: 8 N V D operations, since logits are made anew."""
    narrow = weight.to(hidden.dtype)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(narrow)
    for part, logits in chunks(hidden, narrow):
        gpu.zloss_backward_(g[part], h[part], logits, targets[part], log_z[part])
        spread(logits, hidden[part], narrow, d_hidden[part], d_weight)
    return d_hidden, d_weight.to(weight.dtype)


def gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, share: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> cross-entropy, log Z, and the gradients of share * sum (loss + z_loss * z), all from one pass over the logits.

    For a loop that makes its gradients itself, as zloss_cross_entropy_; autograd knows nothing of it.
    """
    expect("linear_zloss_cross_entropy", hidden, hidden.shape[:1], (torch.int64,), targets=targets)
    targets, narrow = targets.contiguous(), weight.to(hidden.dtype)
    loss, log_z = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(narrow)
    kilobytes = gpu.shared_kilobytes(hidden.device.index)
    for part, logits in chunks(hidden, narrow):
        loss[part], log_z[part] = gpu.zloss_overwrite(logits, targets[part], z_loss, share, kilobytes)
        spread(logits, hidden[part], narrow, d_hidden[part], d_weight)
    return loss, log_z, d_hidden, d_weight.to(weight.dtype)


def spread(d_logits: Tensor, hidden: Tensor, weight: Tensor, d_hidden: Tensor, d_weight: Tensor) -> None:
    """Writes d_hidden and adds to d_weight."""
    torch.mm(d_logits, weight, out=d_hidden)
    d_weight.addmm_(d_logits.T, hidden)
