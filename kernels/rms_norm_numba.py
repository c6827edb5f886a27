"""RMSNorm for the CPU: one pass over each row, where torch's operations make six; it writes the type that is wanted.

Forward: y = x r w with r = 1 / sqrt(mean x^2 + eps). Backward, with u = g w: dx = r (u - x r^2 mean(u x)), and
dw = sum g x r. Each part keeps its own sum of dw. Addresses and sizes are int64; D numbers a row, a multiple of W.
"""

import math
from typing import NamedTuple

import numpy as np

from nanochameleon.kernels.launch import kernel
from nanochameleon.kernels.simd import ZERO, W, clear, load, njit, read_row, splat, store, total, write_row


class Job(NamedTuple):
    x: int  # (N, D), of `size` bytes a number
    weight: int  # (D,) float32
    y: int  # (N, D), of `y_size` bytes; in the backward pass its gradient
    dx: int  # like x
    d_weight: int  # (parts, D) float32
    d: int
    size: int
    y_size: int


@njit
def inverse_rms(row, d, eps):
    a, b = splat(ZERO), splat(ZERO)
    pair = d // (2 * W) * 2 * W
    for i in range(0, pair, 2 * W):
        x, y = load(row + 4 * i), load(row + 4 * (i + W))
        a += x * x
        b += y * y
    if pair < d:
        x = load(row + 4 * pair)
        a += x * x
    return np.float32(1) / math.sqrt(total(a + b) / np.float32(d) + eps)


@kernel
def forward(job, first, last, row, eps):
    d = job.d
    for n in range(first, last):
        read_row(job.x + job.size * n * d, job.size, d, row)
        r = splat(inverse_rms(row, d, eps))
        for i in range(0, d, W):
            store(row + 4 * i, load(row + 4 * i) * r * load(job.weight + 4 * i))
        write_row(job.y + job.y_size * n * d, job.y_size, d, row, np.float32(1))


@kernel
def backward(job, part, first, last, row, eps):
    d = job.d
    g, d_weight = row + 4 * d, job.d_weight + 4 * part * d
    clear(d_weight, d)
    for n in range(first, last):
        read_row(job.x + job.size * n * d, job.size, d, row)
        read_row(job.y + job.y_size * n * d, job.y_size, d, g)
        inverse, s = inverse_rms(row, d, eps), splat(ZERO)
        r = splat(inverse)
        for i in range(0, d, W):
            x, y = load(row + 4 * i), load(g + 4 * i)
            store(d_weight + 4 * i, load(d_weight + 4 * i) + y * x * r)
            u = y * load(job.weight + 4 * i)
            store(g + 4 * i, u)
            s += u * x
        mean = splat(total(s) / np.float32(d) * inverse * inverse)
        for i in range(0, d, W):
            store(g + 4 * i, (load(g + 4 * i) - load(row + 4 * i) * mean) * r)
        write_row(job.dx + job.size * n * d, job.size, d, g, np.float32(1))
