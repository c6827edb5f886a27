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

from nanochameleon.kernels.cpu.exp2 import exp2_bounded
from nanochameleon.kernels.cpu.launch import kernel
from nanochameleon.kernels.cpu.parallel_for import args_unpacker
from nanochameleon.kernels.cpu.simd import (
    AHEAD,
    ZERO,
    W,
    hmax,
    hsum,
    load,
    load1,
    load1_bf16,
    load1_int,
    load_bf16,
    load_first,
    load_first_bf16,
    njit,
    prefetch,
    splat,
    store,
    store1,
    store1_bf16,
    store_bf16,
    store_first,
    store_first_bf16,
    vmax,
)

LOG2E, NEG_INF, ONE, TWO = (np.float32(x) for x in (1 / math.log(2), -math.inf, 1, 2))
FOUR = 4 * W  # logits per iteration: four sums at once, since additions to one sum would wait for one another
BLOCK = 2_048  # logits with one shift: if it proves too small, they are still in the first-level cache
LOWEST = np.finfo(np.float32).min  # the least shift
HEADROOM = np.float32(20)  # a logit may exceed the shift by this much: e^20 times 2,048 is far from overflow


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
    """Floats of scratch memory: the powers of a row, and the shift of each block."""
    return v + FOUR + -(-v // BLOCK)


# ---------------------------------------------------------------------------------------------------------------------
# Logits of either type, W at a time: a register


@njit
def load_any(p, size, i):
    """W logits from i on. The processor is asked for those half a page ahead."""
    prefetch(p + size * i + AHEAD)
    return load(p + 4 * i) if size == 4 else load_bf16(p + 2 * i)


@njit
def load_tail(p, size, i, v):
    """The last v - i logits of a row, at most W, then -infinity."""
    n, rest = v - i, splat(NEG_INF)
    return load_first(p + 4 * i, n, rest) if size == 4 else load_first_bf16(p + 2 * i, n, rest)


@njit
def store_any(p, size, i, v, x):
    """W numbers, or as many as a row of v has room for."""
    if i + W <= v:
        if size == 4:
            store(p + 4 * i, x)
        else:
            store_bf16(p + 2 * i, x)
    elif size == 4:
        store_first(p + 4 * i, v - i, x)
    else:
        store_first_bf16(p + 2 * i, v - i, x)


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


@njit
def sum_of_block(p, size, first, last, shift, powers):
    """Logits [first, last) of a row -> (the largest, sum of e^(x - shift)). Unless `powers` is 0, they go there, too.

    x - shift is rounded before it is scaled: it is exact where it matters, however far from zero the logits are.
    """
    scale, s, least = splat(LOG2E), splat(shift), splat(NEG_INF)
    a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    m0, m1, m2, m3 = least, least, least, least
    whole = first + (last - first) // FOUR * FOUR
    for i in range(first, whole, FOUR):
        # 1. Four registers of logits, and their maxima
        x0, x1 = load_any(p, size, i), load_any(p, size, i + W)
        x2, x3 = load_any(p, size, i + 2 * W), load_any(p, size, i + 3 * W)
        m0, m1, m2, m3 = vmax(x0, m0), vmax(x1, m1), vmax(x2, m2), vmax(x3, m3)
        # 2. Their powers: e^(x - shift) = 2^((x - shift) log2 e), and the sums
        x0, x1 = exp2_bounded((x0 - s) * scale), exp2_bounded((x1 - s) * scale)
        x2, x3 = exp2_bounded((x2 - s) * scale), exp2_bounded((x3 - s) * scale)
        a, b, c, d = a + x0, b + x1, c + x2, d + x3
        # 3. Powers that the gradient will need
        if powers:
            q = powers + 4 * i
            store(q, x0)
            store(q + 4 * W, x1)
            store(q + 8 * W, x2)
            store(q + 12 * W, x3)
    for i in range(whole, last, W):
        x = load_tail(p, size, i, last)
        m0, x = vmax(x, m0), exp2_bounded((x - s) * scale)
        a += x
        if powers:
            store(powers + 4 * i, x)
    return hmax(vmax(vmax(m0, m1), vmax(m2, m3))), hsum((a + b) + (c + d))


@njit
def sum_of_row(p, size, v, powers, shifts):
    """A row of v logits -> (the largest, shift, sum of e^(x - shift)), where the shift is near the largest.

    The true maximum would take a pass of its own. Instead the shift starts at the largest of the first W logits and
    follows: a block with a logit so much larger that powers could overflow is repeated with that one as the shift.
    Unless `powers` is 0, it then holds all powers, and `shifts` the shift of each block.
    """
    shift, sum_, largest = max(hmax(load_tail(p, size, 0, v)), LOWEST), ZERO, NEG_INF
    for i in range(0, v, BLOCK):
        last = min(i + BLOCK, v)
        block_max, s = sum_of_block(p, size, i, last, shift, powers)
        largest = max(largest, block_max)
        if block_max > shift + HEADROOM:
            sum_ *= np.float32(math.exp(shift - block_max))  # the sum so far, with the new shift
            shift = block_max
            s = sum_of_block(p, size, i, last, shift, powers)[1]
        sum_ += s
        if powers:
            store1(shifts + 4 * (i // BLOCK), shift)
    return largest, shift, sum_


@njit
def log_of_sum(largest, shift, sum_):
    """log Z. For a row of nothing but -infinity it is -infinity: its powers are not exactly 0 on every processor."""
    return (NEG_INF if largest == NEG_INF else shift) + np.float32(math.log(sum_))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: rows [first, last) of the work, by one thread


@kernel
def forward(args, part, first, last, scratch):
    """Cross-entropy and log Z."""
    args = unpack_args(args)
    for n in range(first, last):
        logits, y = args.logits + args.size * n * args.v, load1_int(args.targets + 8 * n)
        cross_entropy, log_z = ZERO, ZERO
        if y >= 0:
            largest, shift, sum_ = sum_of_row(logits, args.size, args.v, 0, 0)
            log_z = log_of_sum(largest, shift, sum_)
            cross_entropy = log_z - load1_any(logits, args.size, y)
        store1(args.cross_entropy + 4 * n, cross_entropy)
        store1(args.log_z + 4 * n, log_z)


@kernel
def backward(args, part, first, last, scratch):
    """The gradient over the logits, from the log Z of each row. A target from V on is in another part of the
    vocabulary, so here only the softmax's term is left."""
    args = unpack_args(args)
    size, v, scale = args.size, args.v, splat(LOG2E)
    for n in range(first, last):
        logits, y = args.logits + size * n * v, load1_int(args.targets + 8 * n)
        if y < 0:
            fill_row(logits, size, v, ZERO)
            continue
        log_z = load1(args.log_z + 4 * n)
        factor, shift = splat(args.scale * (ONE + TWO * args.z_loss * log_z)), splat(log_z)
        x_y = splat(load1_any(logits, size, y) if y < v else ZERO)  # read before it is overwritten
        whole = v // W * W
        for i in range(0, whole, W):
            store_any(logits, size, i, v, exp2_bounded((load_any(logits, size, i) - shift) * scale) * factor)
        if whole < v:
            x = load_tail(logits, size, whole, v)
            store_any(logits, size, whole, v, exp2_bounded((x - shift) * scale) * factor)
        if y < v:  # [v = y], subtracted before the one rounding to the logits' type
            store1_any(logits, size, y, hmax(exp2_bounded((x_y - shift) * scale) * factor) - args.scale)


@kernel
def overwrite(args, part, first, last, powers):
    """Forward, and the gradient over the logits, from the same powers."""
    args = unpack_args(args)
    size, v = args.size, args.v
    shifts = powers + 4 * (v + FOUR)
    for n in range(first, last):
        logits, y = args.logits + size * n * v, load1_int(args.targets + 8 * n)
        cross_entropy, log_z = ZERO, ZERO
        if y < 0:
            fill_row(logits, size, v, ZERO)
        else:
            # 1. log Z, as in forward
            largest, shift, sum_ = sum_of_row(logits, size, v, powers, shifts)
            log_z = log_of_sum(largest, shift, sum_)
            cross_entropy = log_z - load1_any(logits, size, y)
            # 2. scale (1 + 2 z_loss log Z) p_v, where p_v = e^(x_v - shift) / sum
            factor = args.scale * (ONE + TWO * args.z_loss * log_z) / sum_
            p_y = store_gradient(logits, size, v, y, shift, factor, powers, shifts)
            # 3. - scale [v = y], before the one rounding to the logits' type
            store1_any(logits, size, y, p_y - args.scale)
        store1(args.cross_entropy + 4 * n, cross_entropy)
        store1(args.log_z + 4 * n, log_z)


@njit
def store_gradient(p, size, v, y, shift, factor, powers, shifts):
    """Write powers times factor over a row, each block from its own shift to the last one. Returns the value at y, not
    rounded to the type of the row."""
    at_target = ZERO
    for first in range(0, v, BLOCK):
        last = min(first + BLOCK, v)
        block_factor = factor * np.float32(math.exp(load1(shifts + 4 * (first // BLOCK)) - shift))
        for i in range(first, last, W):
            store_any(p, size, i, v, load(powers + 4 * i) * splat(block_factor))
        if first <= y and y < last:
            at_target = load1(powers + 4 * y) * block_factor
    return at_target
