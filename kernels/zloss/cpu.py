"""Cross-entropy with z-loss for the CPU, compiled by Numba: forward, its gradient, and both in one pass.

Torch's own operations (maximum, difference, exponential, sum, gather, and their gradients) each read and write all
logits. Here a row is read from memory once. `overwrite` also writes the gradient over it, while the powers of the row
are still in cache. That is less work than a copy, because the memory that is read is the memory that is written.
steps.py has the simplest version and what each later step bought; cross_entropy.py has the formulas.

Pointers and sizes are int64. A row has v logits of `size` bytes: 4 for float32, 2 for bfloat16. A row with a negative
target is ignored: zeros everywhere.
"""

import math
from typing import NamedTuple

import numpy as np

from nanochameleon.kernels.cpu.exp2 import exp2, exp2_four
from nanochameleon.kernels.cpu.launch import kernel
from nanochameleon.kernels.cpu.parallel_for import args_unpacker
from nanochameleon.kernels.cpu.simd import (
    ZERO,
    W,
    hmax,
    hsum,
    load,
    load1,
    load1_bf16,
    load1_int,
    load2_bf16,
    load_first,
    load_first_bf16,
    njit,
    prefetch,
    splat,
    store,
    store1,
    store1_bf16,
    store2_bf16,
    store_bf16,
    store_first,
    store_first_bf16,
    vmax,
)

LOG2E, NEG_INF, HALF, ONE, TWO = (np.float32(x) for x in (1 / math.log(2), -math.inf, 0.5, 1, 2))
FOUR = 4 * W  # logits per iteration
FAR = 4_096  # bytes that are prefetched ahead: memory stays busy while a short row is scaled
BLOCK = 2_048  # logits with one shift: if it proves too small, they are still in the first-level cache
LOWEST = np.finfo(np.float32).min  # the least shift
LIMIT = np.float32(2.0**100)  # the largest sum of a block: far from overflow, and 69 nats above the shift


class KernelArgs(NamedTuple):
    logits: int  # (N, V)
    targets: int  # (N,) int64
    cross_entropy: int  # (N,) float32
    log_z: int  # (N,) float32
    v: int
    size: int
    z_loss: float
    scale: float


unpack_args = args_unpacker(KernelArgs)


def scratch(v: int) -> int:
    """Floats of scratch memory: the powers of a row, or the logits of a block."""
    return max(v, BLOCK)


# ---------------------------------------------------------------------------------------------------------------------
# Four registers of numbers of either type. Within four registers, those of bfloat16 have an order of their own.


@njit(forceinline=True)
def load_four(p, size, i, v):
    """Numbers [i, i + 4 W) of a row of v; -infinity after the row's end."""
    if i + FOUR > v:
        tail = load_tail(p, size, i, v), load_tail(p, size, i + W, v)
        return *tail, load_tail(p, size, i + 2 * W, v), load_tail(p, size, i + 3 * W, v)
    q = p + size * i
    if size == 4:
        return load(q), load(q + 4 * W), load(q + 8 * W), load(q + 12 * W)
    return *load2_bf16(q), *load2_bf16(q + 4 * W)


@njit
def load_tail(p, size, i, v):
    """The last v - i logits of a row, at most W, then -infinity."""
    n, rest = v - i, splat(NEG_INF)
    return load_first(p + 4 * i, n, rest) if size == 4 else load_first_bf16(p + 2 * i, n, rest)


@njit(forceinline=True)
def store_four(p, size, i, v, x0, x1, x2, x3):
    """Store four registers at numbers [i, i + 4 W) of a row, as far as it has them."""
    q = p + size * i
    if i + FOUR > v:
        store_any(p, size, i, v, x0)
        store_any(p, size, i + W, v, x1)
        store_any(p, size, i + 2 * W, v, x2)
        store_any(p, size, i + 3 * W, v, x3)
    elif size == 4:
        store(q, x0)
        store(q + 4 * W, x1)
        store(q + 8 * W, x2)
        store(q + 12 * W, x3)
    else:
        store2_bf16(q, x0, x1)
        store2_bf16(q + 4 * W, x2, x3)


@njit
def store_any(p, size, i, v, x):
    """W numbers, or as many as a row of v has room for."""
    if i + W <= v:
        if size == 4:
            store(p + 4 * i, x)
        else:
            store_bf16(p + 2 * i, x)
    elif i < v:
        if size == 4:
            store_first(p + 4 * i, v - i, x)
        else:
            store_first_bf16(p + 2 * i, v - i, x)


@njit(forceinline=True)
def fetch_four(p, size, i):
    """Ask for the memory of numbers [i, i + 4 W) early."""
    q = p + size * i
    prefetch(q)
    prefetch(q + size * W)
    prefetch(q + 2 * size * W)
    prefetch(q + 3 * size * W)


@njit
def load1_any(p, size, i):
    return load1(p + 4 * i) if size == 4 else load1_bf16(p + 2 * i)


@njit
def store1_any(p, size, i, x):
    if size == 4:
        store1(p + 4 * i, x)
    else:
        store1_bf16(p + 2 * i, x)


@njit
def fill_row(p, size, v, x):
    for i in range(0, v, W):
        store_any(p, size, i, v, splat(x))


# ---------------------------------------------------------------------------------------------------------------------
# log Z of a row


@njit(forceinline=True)
def powers_of(x0, x1, x2, x3, shift):
    """e^(x - shift) = 2^((x - shift) log2 e).

    x - shift is rounded before it is scaled, so powers are as exact far from zero as near it. A shift far below the
    largest logit costs a relative error of up to 5e-6.
    """
    s, scale = splat(shift), splat(LOG2E)
    return exp2_four((x0 - s) * scale, (x1 - s) * scale, (x2 - s) * scale, (x3 - s) * scale)


@njit
def sum_of_block(p, size, first, last, shift, powers, logits):
    """Sum of e^(x - shift) over numbers [first, last) of a row.

    Unless they are 0, the powers go to `powers`, and the logits to `logits`, which may be needed again.
    """
    # Four sums, since additions to one sum would wait for one another
    a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for i in range(first, last, FOUR):
        fetch_four(p + FAR, size, i)
        x0, x1, x2, x3 = load_four(p, size, i, last)
        if logits:
            store_four(logits, 4, i - first, BLOCK, x0, x1, x2, x3)
        x0, x1, x2, x3 = powers_of(x0, x1, x2, x3, shift)
        a, b, c, d = a + x0, b + x1, c + x2, d + x3
        if powers:
            store_four(powers, 4, i, last, x0, x1, x2, x3)
    return hsum((a + b) + (c + d))


@njit
def sum_of_row(p, size, v, shift, powers, logits):
    """A row of v logits -> (shift, sum of e^(x - shift)). Unless it is 0, `powers` then holds all powers.

    The shift may be any number near the largest logit, which would take a pass of its own to find. Where a block's sum
    comes near overflow, its largest logit becomes the shift, and what was done is scaled to that.
    """
    sum_ = ZERO
    for first in range(0, v, BLOCK):
        last = min(first + BLOCK, v)
        s = sum_of_block(p, size, first, last, shift, powers, logits)
        if not s < LIMIT:  # or NaN
            source, source_size = (logits - 4 * first, 4) if logits else (p, size)
            larger = max(largest_of(source, source_size, first, last), shift, LOWEST)
            less = np.float32(math.exp(shift - larger))
            sum_, shift = sum_ * less, larger
            if powers:
                scale_powers(powers, powers, 4, first, less)
            s = sum_of_block(source, source_size, first, last, shift, powers, 0)
        sum_ += s
    return shift, sum_


@njit
def largest_of(p, size, first, last):
    m = splat(NEG_INF)
    for i in range(first, last, FOUR):
        x0, x1, x2, x3 = load_four(p, size, i, last)
        m = vmax(x0, vmax(x1, vmax(x2, vmax(x3, m))))
    return hmax(m)


@njit
def scale_powers(powers, p, size, v, factor):
    """Write powers times factor over a row."""
    f = splat(factor)
    for i in range(0, v, FOUR):
        x0, x1, x2, x3 = load_four(powers, 4, i, v)
        store_four(p, size, i, v, x0 * f, x1 * f, x2 * f, x3 * f)


@njit
def log_of_sum(shift, sum_):
    """log Z. Some logit is the shift and has the power 1, or all are -infinity: not every processor has 0 for those."""
    return (shift if sum_ > HALF else NEG_INF) + np.float32(math.log(sum_))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: rows [first, last) of the work, by one thread. The first shift is the target's logit.


@kernel
def forward(args, part, first, last, scratch):
    """Cross-entropy and log Z."""
    args = unpack_args(args)
    for n in range(first, last):
        logits, y = args.logits + args.size * n * args.v, load1_int(args.targets + 8 * n)
        cross_entropy, log_z = ZERO, ZERO
        if y >= 0:
            x_y = load1_any(logits, args.size, y)
            log_z = log_of_sum(*sum_of_row(logits, args.size, args.v, x_y, 0, 0))
            cross_entropy = log_z - x_y
        store1(args.cross_entropy + 4 * n, cross_entropy)
        store1(args.log_z + 4 * n, log_z)


@kernel
def backward(args, part, first, last, scratch):
    """The gradient over the logits, from the log Z of each row. A target from V on is in another part of the
    vocabulary, so here only the softmax's term is left."""
    args = unpack_args(args)
    size, v = args.size, args.v
    for n in range(first, last):
        logits, y = args.logits + size * n * v, load1_int(args.targets + 8 * n)
        if y < 0:
            fill_row(logits, size, v, ZERO)
            continue
        log_z = load1(args.log_z + 4 * n)
        x_y = load1_any(logits, size, y) if y < v else ZERO  # read before it is overwritten
        factor = args.scale * (ONE + TWO * args.z_loss * log_z)
        f = splat(factor)
        for i in range(0, v, FOUR):
            fetch_four(logits + FAR, size, i)
            x0, x1, x2, x3 = load_four(logits, size, i, v)
            x0, x1, x2, x3 = powers_of(x0, x1, x2, x3, log_z)
            store_four(logits, size, i, v, x0 * f, x1 * f, x2 * f, x3 * f)
        if y < v:
            store_at_target(logits, size, y, x_y - log_z, factor, args.scale)


@kernel
def overwrite(args, part, first, last, scratch):
    """Forward, and the gradient over the logits, from the same powers."""
    args = unpack_args(args)
    size, v = args.size, args.v
    for n in range(first, last):
        logits, y = args.logits + size * n * v, load1_int(args.targets + 8 * n)
        cross_entropy, log_z = ZERO, ZERO
        if y < 0:
            fill_row(logits, size, v, ZERO)
        else:
            # 1. log Z, as in forward. float32 logits are overwritten by their powers, so each block of them is kept
            x_y = load1_any(logits, size, y)
            powers, kept = (logits, scratch) if size == 4 else (scratch, 0)
            shift, sum_ = sum_of_row(logits, size, v, x_y, powers, kept)
            log_z = log_of_sum(shift, sum_)
            cross_entropy = log_z - x_y
            # 2. scale (1 + 2 z_loss log Z) p_v - scale [v = y], where p_v = e^(x_v - shift) / sum
            factor = args.scale * (ONE + TWO * args.z_loss * log_z) / sum_
            scale_powers(powers, logits, size, v, factor)
            store_at_target(logits, size, y, x_y - shift, factor, args.scale)
        store1(args.cross_entropy + 4 * n, cross_entropy)
        store1(args.log_z + 4 * n, log_z)


@njit
def store_at_target(p, size, y, x, factor, scale):
    """e^x factor - scale, with one rounding to the logits' type."""
    store1_any(p, size, y, hmax(exp2(splat(x) * splat(LOG2E))) * factor - scale)
