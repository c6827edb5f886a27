"""QK-norm and RoPE of rows for attention on a CPU, W rows at a time, forward and backward. A row is a head's position.

A row of 32 or 64 numbers is 2 to 4 registers, so sums across its lanes, each a chain of dependent shuffles, would cost
more than all else. Here each row leaves a register of partial sums in a square of W x W numbers, and `row_sums` adds up
all rows of the square at once: 2 shuffles a row instead of 4, and no row waits for another.

Shapes: blocks of n <= W rows of `width` float32, a multiple of W, contiguous, zeros after the E numbers of a row. All
addresses int64. Formulas: qknorm_rope_attention.py.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from nanochameleon.kernels.cpu.simd import (
    ZERO,
    W,
    blend_first,
    hmax,
    load,
    load1,
    njit,
    read_row,
    rope,
    rope_backward,
    row_sums,
    splat,
    store,
    vdiv,
    vsqrt,
    write_row,
)

ONE = np.float32(1)


class Rows(NamedTuple):
    """Rows in memory: the row of position i is at p + i * step."""

    p: int
    step: int  # bytes
    size: int  # of a number: 4 float32, 2 bfloat16
    e: int


class Norm(NamedTuple):
    """Weight and bias of a head's norm, all (width,) float32; gradients are 0 in the forward pass."""

    weight: int  # 0: no norm
    bias: int
    d_weight: int
    d_bias: int
    eps: float


SQUARES = 2 * W * W + 3 * W  # floats of scratch: two squares, and three numbers for each row


@register_jitable
def block_floats(width: int) -> int:
    """Floats of scratch for a block: SQUARES and its rows."""
    return SQUARES + W * width


@njit
def read(rows, i, width, out):
    """The row of position i, padded with zeros."""
    read_row(rows.p + i * rows.step, rows.size, rows.e, out)
    for j in range(-(-rows.e // W) * W, width, W):
        store(out + 4 * j, splat(ZERO))


@njit
def row_means(square, e):
    """The mean of each row, in its lane."""
    return row_sums(square) * splat(ONE / np.float32(e))


@njit
def subtract_mean(x, n, e, width, square):
    """Subtract each row's mean, in place; returns the rows' variances, in their lanes."""
    whole, numbers = e // W * W, square + 4 * W * W
    for r in range(n):
        s = splat(ZERO)
        for i in range(0, width, W):
            s += load(x + 4 * (r * width + i))
        store(square + 4 * W * r, s)
    store(numbers, row_means(square, e))
    for r in range(n):
        mean, s = splat(load1(numbers + 4 * r)), splat(ZERO)
        for i in range(0, whole, W):
            y = load(x + 4 * (r * width + i)) - mean
            store(x + 4 * (r * width + i), y)
            s += y * y
        if whole < e:
            y = blend_first(load(x + 4 * (r * width + whole)) - mean, e - whole, splat(ZERO))
            store(x + 4 * (r * width + whole), y)
            s += y * y
        store(square + 4 * W * r, s)
    return row_means(square, e)


@njit
def rstd_of(variance, eps):
    return vdiv(splat(ONE), vsqrt(variance + splat(eps)))


@njit
def qknorm_rope(rows, first, n, width, cos_sin, norm, factor, x, scratch):
    """Norm, rotate and scale n rows from position `first` on -> x (n, width). Returns the largest squared length."""
    square, factors = scratch, scratch + 4 * (W * W + W)
    for r in range(n):
        read(rows, first + r, width, x + 4 * r * width)
    if norm.weight != 0:
        store(factors, rstd_of(subtract_mean(x, n, rows.e, width, square), norm.eps))
    for r in range(n):
        s = splat(ZERO)
        for i in range(0, width, W):
            at = 4 * (r * width + i)
            y = load(x + at)
            if norm.weight != 0:
                y = y * splat(load1(factors + 4 * r)) * load(norm.weight + 4 * i) + load(norm.bias + 4 * i)
            y = rope(y, load(cos_sin + 4 * first * width + at)) * splat(factor)
            store(x + at, y)
            s += y * y
        store(square + 4 * W * r, s)
    return hmax(blend_first(row_sums(square), n, splat(ZERO)))


@njit
def norm_backward(rows, first, n, width, norm, dy, scratch):
    """The gradient dy (n, width) of normed rows -> that of the rows, in place; adds to norm.d_weight and norm.d_bias.

    With z the standardised rows and u = dy weight: d_weight += dy z, d_bias += dy, and a row's gradient is
    (u - mean u - z mean(u z)) / deviation.
    """
    square, z = scratch, scratch + 4 * SQUARES
    other = square + 4 * (W * W + 3 * W)
    means, factors, products = other - 12 * W, other - 8 * W, other - 4 * W
    for r in range(n):
        read(rows, first + r, width, z + 4 * r * width)
    store(factors, rstd_of(subtract_mean(z, n, rows.e, width, square), norm.eps))
    for r in range(n):
        s, s_z, factor = splat(ZERO), splat(ZERO), splat(load1(factors + 4 * r))
        for i in range(0, width, W):
            at = 4 * (r * width + i)
            y = load(z + at) * factor
            u = load(dy + at) * load(norm.weight + 4 * i)
            store(z + at, y)
            s += u
            s_z += u * y
        store(square + 4 * W * r, s)
        store(other + 4 * W * r, s_z)
    store(means, row_means(square, rows.e))
    store(products, row_means(other, rows.e))
    for i in range(0, width, W):
        weight, d_weight, d_bias = load(norm.weight + 4 * i), load(norm.d_weight + 4 * i), load(norm.d_bias + 4 * i)
        for r in range(n):
            at = 4 * (r * width + i)
            g, y = load(dy + at), load(z + at)
            d_weight += g * y
            d_bias += g
            u = g * weight - splat(load1(means + 4 * r)) - y * splat(load1(products + 4 * r))
            store(dy + at, u * splat(load1(factors + 4 * r)))
        store(norm.d_weight + 4 * i, d_weight)
        store(norm.d_bias + 4 * i, d_bias)


@njit
def qknorm_rope_backward(dy, rows, first, n, width, cos_sin, norm, factor, target, scratch):
    """The gradient dy (n, width) of normed and rotated rows -> that of the input rows, written to `target`."""
    for at in range(0, 4 * n * width, 4 * W):
        store(dy + at, rope_backward(load(dy + at), load(cos_sin + 4 * first * width + at)) * splat(factor))
    if norm.weight != 0:
        norm_backward(rows, first, n, width, norm, dy, scratch)
    for r in range(n):
        write_row(target.p + (first + r) * target.step, target.size, target.e, dy + 4 * r * width, ONE)


@njit
def row_dots(x, rows, first, n, width, out, scratch):
    """out[r] = the dot product of row r of x (n, width) and the row of position first + r; W numbers are written."""
    square, row = scratch, scratch + 4 * W * W
    for r in range(n):
        read(rows, first + r, width, row)
        s = splat(ZERO)
        for i in range(0, width, W):
            s += load(x + 4 * (r * width + i)) * load(row + 4 * i)
        store(square + 4 * W * r, s)
    store(out, row_sums(square))
