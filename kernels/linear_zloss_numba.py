"""The output layer and its cross-entropy in one, for the CPU: the logits live one tile at a time.

A tile is QUERIES rows of hidden states on KEYS rows of the weight, like attention's (and by the same products): logits
are scores that are never multiplied with values. Forward: tasks are stretches of rows; over the tiles of the vocabulary
a row keeps its largest logit so far and the sum of 2^(x - largest), rescaled when the largest grows. Backward: tasks
are stretches of the vocabulary; each tile is made again from log Z, turned into the logits' gradient in place, and both
    dW (tile of the vocabulary) += dlogits^T hidden,   d hidden += dlogits W
are products on it. Tasks share no tile of dW; d hidden has one buffer a task, summed at the end. That is 8 products
where plain training needs 6, and [rows, vocabulary] numbers less memory.

Addresses and sizes are int64. hidden (N, width) times log2 e and weight (V, width) are float32, width a multiple of W.
"""

import math
from typing import NamedTuple

import numpy as np

from nanochameleon.kernels.attention_numba import (
    KEYS,
    LEAST,
    LN2,
    LOG2E,
    ONE,
    QUERIES,
    pack_keys,
    tile_weights,
    times_keys,
    times_queries,
)
from nanochameleon.kernels.launch import kernel
from nanochameleon.kernels.region_numba import reader
from nanochameleon.kernels.simd import (
    ZERO,
    W,
    add_product,
    clear,
    exp2,
    head,
    larger,
    largest,
    load,
    njit,
    peek,
    peek_int,
    poke,
    splat,
    store,
    total,
)

ROWS_A_TASK = 256
SCRATCH = QUERIES * KEYS + 2 * ROWS_A_TASK + W  # floats besides those that depend on the width


class Job(NamedTuple):
    hidden: int  # (N, width) times log2 e
    weight: int  # (V, width)
    targets: int  # (N,) int64, negative where a row is ignored
    cross_entropy: int  # (N,) float32
    log_z: int  # (N,)
    shift: int  # (N,) log2 Z, for the backward pass
    g: int  # (N,) the gradient of each row's cross-entropy
    h: int  # of its log Z
    d_hidden: int  # (parts, N, width), zeros
    d_weight: int  # (V, width)
    n: int
    v: int
    width: int


read_job = reader(Job)


@njit
def take_in(x, nk, largest_sum, i):
    """One row of nk logits into the row's (largest, sum of 2^(x - largest)) at largest_sum."""
    p = largest_sum + 8 * i
    most = splat(peek(p))
    for j in range(0, nk, W):
        most = larger(head(load(x + 4 * j), nk - j, most), most)
    new, s = splat(largest(most)), splat(ZERO)
    for j in range(0, nk, W):
        s += head(exp2(load(x + 4 * j) - new), nk - j, splat(ZERO))
    grown = math.exp(np.float32((peek(p) - largest(most)) * LN2))
    poke(p + 4, peek(p + 4) * np.float32(grown) + total(s))
    poke(p, largest(most))


@kernel
def forward(job, part, first, last, scratch):
    """Tasks [first, last), each ROWS_A_TASK rows: cross-entropy and log Z."""
    job = read_job(job)
    for i in range(first * ROWS_A_TASK, min(last * ROWS_A_TASK, job.n), ROWS_A_TASK):
        forward_rows(job, i, min(i + ROWS_A_TASK, job.n), scratch)


@njit
def forward_rows(job, first, last, scratch):
    width = job.width
    tile, largest_sum = scratch, scratch + 4 * QUERIES * KEYS
    wt = largest_sum + 8 * (last - first)
    for i in range(last - first):
        poke(largest_sum + 8 * i, LEAST)
        poke(largest_sum + 8 * i + 4, ZERO)
        poke(job.cross_entropy + 4 * (first + i), ZERO)
    for j in range(0, job.v, KEYS):
        nk = min(KEYS, job.v - j)
        pack_keys(job.weight + 4 * j * width, nk, width, wt)
        for i in range(first, last, QUERIES):
            nq = min(QUERIES, last - i)
            clear(tile, QUERIES * KEYS)
            rows = job.hidden + 4 * i * width
            add_product(nq, (nk + W - 1) // W * W, rows, width, 1, wt, KEYS, tile, KEYS, width)
            for r in range(nq):
                take_in(tile + 4 * r * KEYS, nk, largest_sum, i - first + r)
                y = peek_int(job.targets + 8 * (i + r)) - j
                if y >= 0 and y < nk:
                    poke(job.cross_entropy + 4 * (i + r), -peek(tile + 4 * (r * KEYS + y)) * LN2)
    for i in range(first, last):
        at, log_z = largest_sum + 8 * (i - first), ZERO
        if peek_int(job.targets + 8 * i) >= 0:
            log_z = (peek(at) + np.float32(math.log2(peek(at + 4)))) * LN2
            poke(job.cross_entropy + 4 * i, peek(job.cross_entropy + 4 * i) + log_z)
        poke(job.log_z + 4 * i, log_z)


@kernel
def backward(job, part, first, last, scratch):
    """Tiles [first, last) of the vocabulary: d_weight, and their share of d_hidden in this part's buffer."""
    job = read_job(job)
    width = job.width
    tile, wt = scratch, scratch + 4 * QUERIES * KEYS
    d_weight = wt + 4 * width * KEYS
    for j in range(first * KEYS, min(last * KEYS, job.v), KEYS):
        nk = min(KEYS, job.v - j)
        pack_keys(job.weight + 4 * j * width, nk, width, wt)
        clear(d_weight, KEYS * width)
        for i in range(0, job.n, QUERIES):
            nq = min(QUERIES, job.n - i)
            rows = job.hidden + 4 * i * width
            tile_weights(rows, nq, wt, nk, width, KEYS, job.shift + 4 * i, 0, tile)
            for r in range(nq):
                y, at = peek_int(job.targets + 8 * (i + r)), tile + 4 * r * KEYS
                g = peek(job.g + 4 * (i + r))
                if y < 0:
                    clear(at, KEYS)
                factor = splat(g + peek(job.h + 4 * (i + r)))
                for c in range(0, nk, W):
                    store(at + 4 * c, load(at + 4 * c) * factor)
                if y >= j and y < j + nk:
                    poke(at + 4 * (y - j), peek(at + 4 * (y - j)) - g)
            times_queries(tile, nq, nk, KEYS, rows, width, d_weight)
            d_hidden = job.d_hidden + 4 * (part * job.n + i) * width
            times_keys(tile, nq, nk, KEYS, job.weight + 4 * j * width, width, d_hidden)
        for c in range(0, nk * width, W):
            store(job.d_weight + 4 * (j * width + c), load(d_weight + 4 * c) * splat(LN2))


__all__ = ["KEYS", "LOG2E", "ONE", "ROWS_A_TASK", "SCRATCH", "Job", "backward", "forward"]
