"""Cross-entropy with log Z for the CPU: each row is read once in the forward pass and once in the backward pass.

Torch's own steps (maximum, difference, exponential, sum, gather, and their gradients) each read and write all logits; a
row of 65,536 floats fits the second-level cache, so here it comes from memory once. Forward: the row is widened into
scratch, its largest logit found on the way, then 2^x summed. Backward, from log Z: dx_v = (g + h) p_v - g [v = y].

`overwrite` does both at once, for a loss that is known before: 1 read and 1 write of memory, which is a copy's work.

Addresses and sizes are int64; V logits a row, of `size` bytes each. A row with a target below 0 counts for nothing:
zeros everywhere.
"""

import math
from typing import NamedTuple

import numpy as np

from nanochameleon.kernels.launch import kernel
from nanochameleon.kernels.region_numba import reader
from nanochameleon.kernels.simd import (
    ZERO,
    W,
    exp2,
    larger,
    largest,
    load,
    load_bf16,
    njit,
    peek,
    peek_bf16,
    peek_int,
    poke,
    poke_bf16,
    read_row,
    splat,
    store,
    store_bf16,
    total,
    write_row,
)

LOG2E, LN2, LEAST = np.float32(1 / math.log(2)), np.float32(math.log(2)), np.float32(-math.inf)
FOUR = 4 * W  # numbers a turn of the loops: four sums at once, since one would wait for itself


class Job(NamedTuple):
    logits: int  # (N, V)
    targets: int  # (N,) int64
    cross_entropy: int  # (N,) float32
    log_z: int  # (N,) float32
    g: int  # (N,) float32: the gradient of each row's cross-entropy
    h: int  # of its log Z
    gradient: int  # (N, V), may be the logits
    v: int
    size: int
    z_loss: float  # these two where the loss is known before
    share: float


read_job = reader(Job)


@njit
def read_logits(p, size, v, out):
    """A row -> float32 times log2 e, filled with -infinity up to a multiple of FOUR. Returns the largest."""
    scale, least = splat(LOG2E), splat(LEAST)
    a, b, c, d = least, least, least, least
    whole = v // FOUR * FOUR
    for i in range(0, whole, FOUR):
        if size == 4:
            q = p + 4 * i
            x0, x1, x2, x3 = load(q), load(q + 4 * W), load(q + 8 * W), load(q + 12 * W)
        else:
            q = p + 2 * i
            x0, x1, x2, x3 = load_bf16(q), load_bf16(q + 2 * W), load_bf16(q + 4 * W), load_bf16(q + 6 * W)
        x0, x1, x2, x3 = x0 * scale, x1 * scale, x2 * scale, x3 * scale
        a, b, c, d = larger(x0, a), larger(x1, b), larger(x2, c), larger(x3, d)
        q = out + 4 * i
        store(q, x0)
        store(q + 4 * W, x1)
        store(q + 8 * W, x2)
        store(q + 12 * W, x3)
    if whole < v:
        for i in range(whole, whole + FOUR, W):
            store(out + 4 * i, least)
        for i in range(whole, v):
            poke(out + 4 * i, (peek(p + 4 * i) if size == 4 else peek_bf16(p + 2 * i)) * LOG2E)
        for i in range(whole, whole + FOUR, W):
            a = larger(load(out + 4 * i), a)
    return largest(larger(larger(a, b), larger(c, d)))


@njit
def sum_of_powers(row, v, shift, keep):
    """The sum of 2^(x - shift), which stay in the row if keep."""
    s = splat(shift)
    a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for i in range(0, v, FOUR):
        q = row + 4 * i
        x0, x1, x2, x3 = load(q) - s, load(q + 4 * W) - s, load(q + 8 * W) - s, load(q + 12 * W) - s
        x0, x1, x2, x3 = exp2(x0), exp2(x1), exp2(x2), exp2(x3)
        a, b, c, d = a + x0, b + x1, c + x2, d + x3
        if keep:
            store(q, x0)
            store(q + 4 * W, x1)
            store(q + 8 * W, x2)
            store(q + 12 * W, x3)
    return total((a + b) + (c + d))


@njit
def look(p, size, i):
    return peek(p + 4 * i) if size == 4 else peek_bf16(p + 2 * i)


@njit
def put(p, size, i, x):
    if size == 4:
        poke(p + 4 * i, x)
    else:
        poke_bf16(p + 2 * i, x)


@njit
def fill_row(p, size, v, x):
    for i in range(v):
        put(p, size, i, x)


@kernel
def forward(job, part, first, last, row):
    job = read_job(job)
    for n in range(first, last):
        logits, y = job.logits + job.size * n * job.v, peek_int(job.targets + 8 * n)
        cross_entropy, log_z = ZERO, ZERO
        if y >= 0:
            most = read_logits(logits, job.size, job.v, row)
            log_z = (most + np.float32(math.log2(sum_of_powers(row, job.v, most, False)))) * LN2
            cross_entropy = log_z - look(logits, job.size, y)
        poke(job.cross_entropy + 4 * n, cross_entropy)
        poke(job.log_z + 4 * n, log_z)


@kernel
def backward(job, part, first, last, row):
    """gradient = (g + h) 2^(x log2 e - log2 Z), and - g at the target, which is rounded once."""
    job = read_job(job)
    size, v = job.size, job.v
    for n in range(first, last):
        logits, gradient, y = job.logits + size * n * v, job.gradient + size * n * v, peek_int(job.targets + 8 * n)
        if y < 0:
            fill_row(gradient, size, v, ZERO)
            continue
        g, h, shift = peek(job.g + 4 * n), peek(job.h + 4 * n), peek(job.log_z + 4 * n) * LOG2E
        factor, s, scale = splat(g + h), splat(shift), splat(LOG2E)
        at_target = look(logits, size, y)
        whole = v // W * W
        if size == 4:
            for i in range(0, whole, W):
                store(gradient + 4 * i, exp2(load(logits + 4 * i) * scale - s) * factor)
        else:
            for i in range(0, whole, W):
                store_bf16(gradient + 2 * i, exp2(load_bf16(logits + 2 * i) * scale - s) * factor)
        if whole < v:
            read_row(logits + size * whole, size, v - whole, row)
            store(row, exp2(load(row) * scale - s) * factor)
            write_row(gradient + size * whole, size, v - whole, row, np.float32(1))
        store(row, exp2(splat(at_target) * scale - s) * factor)
        put(gradient, size, y, peek(row) - g)


@kernel
def overwrite(job, part, first, last, row):
    """Forward, and the gradient of share * (cross-entropy + z_loss log Z^2) over the logits, in one pass."""
    job = read_job(job)
    size, v = job.size, job.v
    for n in range(first, last):
        logits, y = job.logits + size * n * v, peek_int(job.targets + 8 * n)
        cross_entropy, log_z = ZERO, ZERO
        if y < 0:
            fill_row(logits, size, v, ZERO)
        else:
            most = read_logits(logits, size, v, row)
            powers = sum_of_powers(row, v, most, True)
            log_z = (most + np.float32(math.log2(powers))) * LN2
            cross_entropy = log_z - look(logits, size, y)
            factor = job.share * (np.float32(1) + np.float32(2) * job.z_loss * log_z) / powers
            write_row(logits, size, v, row, factor)
            put(logits, size, y, peek(row + 4 * y) * factor - job.share)
        poke(job.cross_entropy + 4 * n, cross_entropy)
        poke(job.log_z + 4 * n, log_z)
