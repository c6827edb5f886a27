"""SwiGLU for the CPU: silu(a) b in one pass. silu(a) = a s with s = 1 / (1 + 2^(-a log2 e)).

Backward, g the gradient of the result: da = g b s (1 + a (1 - s)),   db = g a s.
All of `size` bytes a number (4 float32, 2 bfloat16); tasks are stretches of CHUNK numbers.
"""

import math
from typing import NamedTuple

import numpy as np

from nanochameleon.kernels.launch import kernel
from nanochameleon.kernels.simd import W, divide, exp2, larger, load, njit, read_row, splat, store, write_row

CHUNK = 512  # numbers a turn: three of them in the first-level cache
MINUS_LOG2E, ONE, LEAST = np.float32(-1 / math.log(2)), np.float32(1), np.float32(-126.0)


class Job(NamedTuple):
    a: int
    b: int
    y: int  # the result; in the backward pass its gradient
    da: int
    db: int
    n: int  # numbers in each
    size: int


@njit
def sigmoid(x):
    """1 / (1 + 2^(-x log2 e)); below x = -87 the power is held at 2^126."""
    power = x * splat(MINUS_LOG2E)
    held = splat(np.float32(0)) - larger(splat(np.float32(0)) - power, splat(LEAST))
    return divide(splat(ONE), splat(ONE) + exp2(held))


@kernel
def forward(job, first, last, scratch):
    a, b = scratch, scratch + 4 * CHUNK
    for c in range(first, last):
        at, n = job.size * c * CHUNK, min(CHUNK, job.n - c * CHUNK)
        read_row(job.a + at, job.size, n, a)
        read_row(job.b + at, job.size, n, b)
        for i in range(0, n, W):
            x = load(a + 4 * i)
            store(a + 4 * i, x * sigmoid(x) * load(b + 4 * i))
        write_row(job.y + at, job.size, n, a, ONE)


@kernel
def backward(job, first, last, scratch):
    a, b, g = scratch, scratch + 4 * CHUNK, scratch + 8 * CHUNK
    for c in range(first, last):
        at, n = job.size * c * CHUNK, min(CHUNK, job.n - c * CHUNK)
        read_row(job.a + at, job.size, n, a)
        read_row(job.b + at, job.size, n, b)
        read_row(job.y + at, job.size, n, g)
        for i in range(0, n, W):
            x, y = load(a + 4 * i), load(g + 4 * i)
            s = sigmoid(x)
            store(a + 4 * i, y * load(b + 4 * i) * s * (splat(ONE) + x * (splat(ONE) - s)))
            store(b + 4 * i, y * x * s)
        write_row(job.da + at, job.size, n, a, ONE)
        write_row(job.db + at, job.size, n, b, ONE)
