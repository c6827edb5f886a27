"""Cross-entropy with log Z for the CPU: a row is read once in the forward pass and once in the backward pass.

Torch's own steps (maximum, difference, exponential, sum, gather, and their gradients) each read and write all logits.
What each step here buys forward, in ms of one core of a Xeon, float32, from memory that its neighbours read as well:

    2,048 x 4,096   512 x 65,536
         5.0            19.5    the row is widened into scratch, its largest found on the way; then 2^(x - largest)
         5.2            21.3    no scratch, nothing beforehand: blocks less a shift near the largest, which follows
         4.7            14.5    2^x in half as many instructions (exp2_bounded): all are below the shift, or nearly
         3.9            12.6    each line of memory is asked for half a page ahead

From a cache, where arithmetic counts more, the first takes 4.4 and the last 2.6 of 2,048 x 4,096: 1.3 undisturbed.

Backward, from log Z: dx_v = (g + h) p_v - g [v = y]. `overwrite` does both at once for a loss that is known before, and
the gradient takes the logits' place: less than a copy's work, since memory that is read is what is written.

Addresses and sizes are int64; V logits a row, of `size` bytes each. A row with a target below 0 counts for nothing:
zeros everywhere.
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

LOG2E, NEG_INF = np.float32(1 / math.log(2)), np.float32(-math.inf)
FOUR = 4 * W  # numbers a turn of the loops: four sums at once, since one would wait for itself
BLOCK = 2_048  # numbers with one shift: should it be too small, they are still in the first-level cache
LOWEST = np.finfo(np.float32).min  # the least shift
LEAST_FACTOR = np.float32(1e-3)  # of powers, in the gradient over the logits
ROOM = np.float32(20)  # by so much a number may be larger than the shift: e^20


class KernelArgs(NamedTuple):
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


unpack_args = args_unpacker(KernelArgs)


def scratch(v: int) -> int:
    """Floats: the powers of a row, and the shift of each block."""
    return v + FOUR + -(-v // BLOCK)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of a row, of either type


@njit
def numbers(p, size, i):
    """A register of them; those a page ahead are asked for."""
    prefetch(p + size * i + AHEAD)
    return load(p + 4 * i) if size == 4 else load_bf16(p + 2 * i)


@njit
def last_numbers(p, size, i, v):
    """What is left of a row of v at i, at most a register, and -infinity behind it."""
    return (
        load_first(p + 4 * i, v - i, splat(NEG_INF)) if size == 4 else load_first_bf16(p + 2 * i, v - i, splat(NEG_INF))
    )


@njit
def write(p, size, i, v, x):
    """A register, or as much of it as a row of v has room for."""
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
def look(p, size, i):
    return load1(p + 4 * i) if size == 4 else load1_bf16(p + 2 * i)


@njit
def put(p, size, i, x):
    if size == 4:
        store1(p + 4 * i, x)
    else:
        store1_bf16(p + 2 * i, x)


@njit
def fill_row(p, size, v, x):
    for i in range(0, v, W):
        write(p, size, i, v, splat(x))


# ---------------------------------------------------------------------------------------------------------------------
# Sums of powers


@njit
def sum_of_block(p, size, first, last, shift, kept):
    """Numbers [first, last) of a row -> (the largest, the sum of e^(x - shift)). These go to kept, if any.

    The difference first: it is exact where it matters, however far from zero the logits are.
    """
    scale, s, least = splat(LOG2E), splat(shift), splat(NEG_INF)
    a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    m0, m1, m2, m3 = least, least, least, least
    whole = first + (last - first) // FOUR * FOUR
    for i in range(first, whole, FOUR):
        x0, x1 = numbers(p, size, i), numbers(p, size, i + W)
        x2, x3 = numbers(p, size, i + 2 * W), numbers(p, size, i + 3 * W)
        m0, m1, m2, m3 = vmax(x0, m0), vmax(x1, m1), vmax(x2, m2), vmax(x3, m3)
        x0, x1 = exp2_bounded((x0 - s) * scale), exp2_bounded((x1 - s) * scale)
        x2, x3 = exp2_bounded((x2 - s) * scale), exp2_bounded((x3 - s) * scale)
        a, b, c, d = a + x0, b + x1, c + x2, d + x3
        if kept:
            q = kept + 4 * i
            store(q, x0)
            store(q + 4 * W, x1)
            store(q + 8 * W, x2)
            store(q + 12 * W, x3)
    for i in range(whole, last, W):
        x = last_numbers(p, size, i, last)
        m0, x = vmax(x, m0), exp2_bounded((x - s) * scale)
        a += x
        if kept:
            store(kept + 4 * i, x)
    return hmax(vmax(vmax(m0, m1), vmax(m2, m3))), hsum((a + b) + (c + d))


@njit
def sum_of_row(p, size, v, kept, shifts):
    """A row of v logits -> (the largest, shift, sum of e^(x - shift)), where the shift is near the largest.

    It begins with the largest of the first few. A block with a number so much larger that powers could overflow is
    done again with that one as the shift. kept, if any, has all powers then, and shifts that of each block.
    """
    shift, sum_, top = max(hmax(last_numbers(p, size, 0, v)), LOWEST), ZERO, NEG_INF
    for i in range(0, v, BLOCK):
        last = min(i + BLOCK, v)
        most, s = sum_of_block(p, size, i, last, shift, kept)
        top = max(top, most)
        if most > shift + ROOM:
            sum_ *= np.float32(math.exp(shift - most))
            shift = most
            s = sum_of_block(p, size, i, last, shift, kept)[1]
        sum_ += s
        if kept:
            store1(shifts + 4 * (i // BLOCK), shift)
    return top, shift, sum_


@njit
def log_z_of(most, shift, sum_):
    """Of a row of nothing but -infinity it is that, too, whose powers are not 0 on every processor."""
    return (NEG_INF if most == NEG_INF else shift) + np.float32(math.log(sum_))


@njit
def away_from_zero(x):
    """With no factor at all there would be nothing left to correct (zloss.py)."""
    return x if abs(x) > LEAST_FACTOR else LEAST_FACTOR


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@kernel
def forward(job, part, first, last, memory):
    job = unpack_args(job)
    for n in range(first, last):
        logits, y = job.logits + job.size * n * job.v, load1_int(job.targets + 8 * n)
        cross_entropy, log_z = ZERO, ZERO
        if y >= 0:
            most, shift, sum_ = sum_of_row(logits, job.size, job.v, 0, 0)
            log_z = log_z_of(most, shift, sum_)
            cross_entropy = log_z - look(logits, job.size, y)
        store1(job.cross_entropy + 4 * n, cross_entropy)
        store1(job.log_z + 4 * n, log_z)


@kernel
def backward(job, part, first, last, memory):
    """gradient = (g + h) e^(x - log Z), and - g at the target, rounded once. From V on that is elsewhere."""
    job = unpack_args(job)
    size, v = job.size, job.v
    for n in range(first, last):
        logits, gradient, y = job.logits + size * n * v, job.gradient + size * n * v, load1_int(job.targets + 8 * n)
        if y < 0:
            fill_row(gradient, size, v, ZERO)
            continue
        g, h, shift = load1(job.g + 4 * n), load1(job.h + 4 * n), load1(job.log_z + 4 * n)
        factor, s, scale = splat(g + h), splat(shift), splat(LOG2E)
        x_y = splat(look(logits, size, y) if y < v else ZERO)  # now, since the gradient may take the logits' place
        whole = v // W * W
        for i in range(0, whole, W):
            write(gradient, size, i, v, exp2_bounded((numbers(logits, size, i) - s) * scale) * factor)
        if whole < v:
            write(gradient, size, whole, v, exp2_bounded((last_numbers(logits, size, whole, v) - s) * scale) * factor)
        if y < v:
            put(gradient, size, y, hmax(exp2_bounded((x_y - s) * scale) * factor) - g)


@kernel
def overwrite(job, part, first, last, kept):
    """Forward, and the gradient of share * (cross-entropy + z_loss log Z^2) over the logits, in one pass."""
    job = unpack_args(job)
    size, v = job.size, job.v
    shifts = kept + 4 * (v + FOUR)
    for n in range(first, last):
        logits, y = job.logits + size * n * v, load1_int(job.targets + 8 * n)
        cross_entropy, log_z = ZERO, ZERO
        if y < 0:
            fill_row(logits, size, v, ZERO)
        else:
            most, shift, sum_ = sum_of_row(logits, size, v, kept, shifts)
            log_z = log_z_of(most, shift, sum_)
            cross_entropy = log_z - look(logits, size, y)
            factor = job.share * away_from_zero(np.float32(1) + np.float32(2) * job.z_loss * log_z) / sum_
            p_y = put_gradient(logits, size, v, y, shift, factor, kept, shifts)
            put(logits, size, y, p_y - job.share)
        store1(job.cross_entropy + 4 * n, cross_entropy)
        store1(job.log_z + 4 * n, log_z)


@njit
def put_gradient(p, size, v, y, shift, factor, kept, shifts):
    """Powers times factor to p, all with the one shift. -> that of y, not rounded to the type of p."""
    at_target = ZERO
    for first in range(0, v, BLOCK):
        last, own = min(first + BLOCK, v), factor * np.float32(math.exp(load1(shifts + 4 * (first // BLOCK)) - shift))
        for i in range(first, last, W):
            write(p, size, i, v, load(kept + 4 * i) * splat(own))
        if first <= y and y < last:
            at_target = load1(kept + 4 * y) * own
    return at_target
