"""Output layer and z-loss cross-entropy in one op that never holds all logits (N, V).

    x_i = W hidden_i,   loss = scale * sum_i (cross-entropy_i + z_loss * (log Z_i)^2)      (cross_entropy.py)
    d hidden = dx W,    dW = dx^T hidden

A chunk of rows has its logits made by a matmul, overwritten with their gradient dx, and used up by two more matmuls;
the next chunk takes the same memory. That is the arithmetic of the plain way, 6 N V D operations. A chunk is an eighth
of the rows, and at least 256 of them on a CPU: each chunk reads the whole weight and adds to the whole of its gradient.

ms of CPU time, one thread of a Zen 4, hidden (N, D), weight (V, D), all logits at once / chunks of 256 rows:

    N     D    V          float32       bfloat16
    1024  256  32,768      676 / 653     334 / 363
    2048  256  32,768     1335 / 1287    647 / 724
    512   256  65,536      719 / 699     385 / 427

Shapes: hidden (N, D), weight (V, D), targets (N,) integers below V, negative where a row is ignored.
"""

import torch
from torch import Tensor

from nanochameleon.kernels.ops import FLOAT_DTYPES, INDEX_DTYPES, expect
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy_

CHUNKS = 8  # at most
# An NVIDIA GPU's addmm adds bf16 matmuls to an fp32 tensor (pytorch pull 167931)
FP32_SUMS = torch.__version__ >= (2, 10) and torch.version.hip is None
# Rows of a chunk. Each chunk reads the weight and its gradient, so with fewer rows it would wait for memory.
MIN_ROWS = {"cpu": 256, "cuda": 2_048}


def rows_per_chunk(n: int, device: str) -> int:
    return min(n, max(-(-n // CHUNKS), MIN_ROWS["cpu" if device == "cpu" else "cuda"]))


def linear_zloss_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy (N,), log Z (N,), d hidden and dW, the latter two in the types of hidden and weight.

    Matmuls run in the type of hidden. Raises as zloss_cross_entropy_ does.
    """
    expect_layer(hidden, weight, targets)
    narrow = weight.to(hidden.dtype)
    rows = rows_per_chunk(len(hidden), hidden.device.type)
    buffer = hidden.new_empty(rows, len(weight))
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    d_weight = torch.zeros_like(weight, dtype=sum_dtype(weight))
    losses = []
    for start in range(0, len(hidden), max(rows, 1)):
        part = slice(start, min(start + rows, len(hidden)))
        # 1. Logits of the chunk (rows, V), then their gradient in the same memory
        logits = torch.mm(hidden[part], narrow.T, out=buffer[: part.stop - start])
        losses.append(zloss_cross_entropy_(logits, targets[part], z_loss, scale))
        # 2. Two matmuls use the gradient up; the sum over chunks is rounded once, after the last
        torch.mm(logits, narrow, out=d_hidden[part])
        add_matmul_(d_weight, logits.T, hidden[part])
    logits = buffer = None  # the rounded gradient takes their memory
    d_weight = d_weight.to(weight.dtype)
    if not losses:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32), d_hidden, d_weight
    cross_entropy, log_z = (torch.cat(x) for x in zip(*losses, strict=True))
    return cross_entropy, log_z, d_hidden, d_weight


def sum_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of dW while chunks are added to it: on a GPU at least fp32, on a CPU the weight's."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cuda" else weight.dtype


def add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif FP32_SUMS and a.device.type == "cuda" and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)  # nothing is rounded to the type of a and b
    else:
        total += torch.mm(a, b)


def expect_layer(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless these are (N, D), (V, D) with V > 0, and N integers."""
    name = "linear_zloss_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or not len(weight):
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{name}: hidden must be (N, D) and weight (V, D) with V > 0; they are {shapes}")
    expect(name, hidden, hidden.shape, FLOAT_DTYPES, hidden=hidden)
    expect(name, hidden, (len(weight), hidden.shape[1]), FLOAT_DTYPES, weight=weight)
    expect(name, hidden, hidden.shape[:1], INDEX_DTYPES, targets=targets)
