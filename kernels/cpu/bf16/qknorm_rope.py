"""QK-norm and RoPE for attention in bfloat16, forward and backward, with a row (a position of a head) in each lane.

A row of bfloat16 is a row of words, and a word is a pair of neighbours, the pair that RoPE rotates. Transposed, pair i
of 32 rows is two registers. So means, deviations and lengths are sums of registers, and nothing is added up across
lanes: a row costs about 40 instructions, where one row after the other (attention/qknorm_rope_cpu.py) costs 130. The
results, words of 32 rows, are operand `b` of a matmul as they are (pairs.py); rows and pairs are one move away.

    words      (width / 2, 32): pair i of 32 rows
    halves     (width, 32) bfloat16: number i of 32 rows, the transpose
    pairs      (16, width) words: number i of two rows

All addresses int64, `width` a multiple of 32, zeros after the E numbers of a row, an even number.
"""

from typing import NamedTuple

import numpy as np

from nanochameleon.kernels.attention.qknorm_rope_cpu import ONE, rstd_of
from nanochameleon.kernels.cpu.bf16.pairs import (
    BLOCK,
    BLOCK_ROW,
    copy_block,
    load_high,
    load_low,
    split_words,
    store_pairs,
    whole_block,
)
from nanochameleon.kernels.cpu.simd import (
    ZERO,
    W,
    hmax,
    load,
    load1,
    njit,
    prefetch,
    row_sums,
    splat,
    store,
    store1,
    transpose,
    vmax,
)

ROW = 4 * BLOCK  # bytes of a row of words, or of float32


class Lanes(NamedTuple):
    """What 32 rows of a head share, and what each row has."""

    width: int  # a multiple of 32
    depth: int  # how much of it matmuls read
    e: int
    cos_sin: int  # (width, any) float32: cos and sin of each pair, a position in each lane
    cos_sin_row: int  # bytes
    mean: int  # (32,) float32
    factor: int  # (32,) one over the deviation
    sums: int  # (2 width, W) float32: sums of the norm's gradients, lane by lane
    spare: int  # (32, 32) bfloat16


@njit
def transpose_all(source, rows, columns, lds, target, ldt):
    """Transpose words, (rows, columns) -> (columns, rows)."""
    for i in range(0, rows, W):
        for j in range(0, columns, W):
            transpose(source + 4 * (i * lds + j), lds, target + 4 * (j * ldt + i), ldt)


@njit
def fetch_rows(rows, i, n):
    """Prefetch positions [i, i + n): rows of one head are too far apart for the processor's own prefetcher."""
    for r in range(i, i + n):
        for c in range(0, 2 * rows.e, 64):
            prefetch(rows.p + r * rows.step + c)


@njit
def load_words(rows, i, n, lanes, words):
    """Positions [i, i + n) of rows, zeros up to BLOCK -> words."""
    for c in range(0, lanes.width, BLOCK):
        p, row = whole_block(rows.p + i * rows.step + 2 * c, rows.step, n, rows.e - c, lanes.spare)
        transpose_all(p, BLOCK, BLOCK // 2, row // 4, words + ROW * (c // 2), BLOCK)


@njit
def store_rows(words, lanes, rows, i, n):
    """Words -> positions [i, i + n) of rows."""
    for c in range(0, lanes.width, BLOCK):
        transpose_all(words + ROW * (c // 2), BLOCK // 2, BLOCK, BLOCK, lanes.spare, BLOCK // 2)
        copy_block(lanes.spare, BLOCK_ROW, n, rows.e - c, rows.p + i * rows.step + 2 * c, rows.step)


@njit
def to_rows(words, width, out):
    """Words -> (32, width) bfloat16."""
    transpose_all(words, width // 2, BLOCK, BLOCK, out, width // 2)


@njit
def to_halves(words, width, out, row):
    """Words -> halves, rows this many bytes apart."""
    for i in range(width // 2):
        for lane in range(0, BLOCK, W):
            here = out + 2 * row * i + 2 * lane
            split_words(words + ROW * i + 4 * lane, here, here + row)


@njit
def to_pairs(words, width, halves, out):
    """Words -> pairs; halves are made on the way."""
    to_halves(words, width, halves, BLOCK_ROW)
    transpose_all(halves, width, BLOCK // 2, BLOCK // 2, out, width)


@njit
def transpose_cos_sin(cos_sin, t, width, out, row):
    """(t, width) -> the transpose, zeros from t on."""
    for i in range(width):
        for r in range(t, row // 4):
            store1(out + row * i + 4 * r, ZERO)
    whole = t // W * W
    transpose_all(cos_sin, whole, width, width, out, row // 4)
    for r in range(whole, t):
        for i in range(width):
            store1(out + row * i + 4 * r, load1(cos_sin + 4 * (r * width + i)))


@njit
def load_cos_sin(lanes, i, position, scale):
    """Cos and sin of pair i for the lanes from this position on, times scale."""
    at = lanes.cos_sin + 2 * lanes.cos_sin_row * i + 4 * position
    return load(at) * splat(scale), load(at + lanes.cos_sin_row) * splat(scale)


@njit
def standard(words, mean, factor):
    """W pairs of standardised numbers."""
    return (load_low(words) - mean) * factor, (load_high(words) - mean) * factor


@njit
def mean_and_rstd(words, norm, lanes):
    """Set lanes.mean and lanes.factor (1 / deviation); 0 and 1 without a norm."""
    share = splat(ONE / np.float32(lanes.e))
    for lane in range(0, 4 * BLOCK, 4 * W):
        mean, factor, a, b = splat(ZERO), splat(ONE), splat(ZERO), splat(ZERO)
        if norm.weight != 0:
            for i in range(lanes.e // 2):
                a += load_low(words + ROW * i + lane)
                b += load_high(words + ROW * i + lane)
            mean, a, b = (a + b) * share, splat(ZERO), splat(ZERO)
            for i in range(lanes.e // 2):
                x, y = standard(words + ROW * i + lane, mean, factor)
                a += x * x
                b += y * y
            factor = rstd_of((a + b) * share, norm.eps)
        store(lanes.mean + lane, mean)
        store(lanes.factor + lane, factor)


@njit
def qknorm_rope(words, position, norm, scale, lanes, out):
    """Norm, rotate and scale the words of rows from this position on -> out. Returns the largest squared length."""
    mean_and_rstd(words, norm, lanes)
    most = splat(ZERO)
    for lane in range(0, BLOCK, W):
        mean, factor, square = load(lanes.mean + 4 * lane), load(lanes.factor + 4 * lane), splat(ZERO)
        for i in range(lanes.depth // 2):
            at = ROW * i + 4 * lane
            x, y = standard(words + at, mean, factor)
            if norm.weight != 0:
                x = x * splat(load1(norm.weight + 8 * i)) + splat(load1(norm.bias + 8 * i))
                y = y * splat(load1(norm.weight + 8 * i + 4)) + splat(load1(norm.bias + 8 * i + 4))
            cos, sin = load_cos_sin(lanes, i, position + lane, scale)
            x, y = x * cos - y * sin, y * cos + x * sin
            square += x * x + y * y
            store_pairs(out + at, x, y)
        most = vmax(square, most)
    return hmax(most)


@njit
def add(p, x):
    store(p, load(p) + x)


@njit
def rope_backward(dy, words, position, norm, scale, lanes, lane):
    """The gradient dy (width, 32) float32 of normed and rotated rows -> u, that of the standardised rows, for W lanes.

    In place; adds to the norm's gradients. Returns the sums of u and of u times the standardised rows.
    """
    mean, factor = load(lanes.mean + 4 * lane), load(lanes.factor + 4 * lane)
    s, s_z = splat(ZERO), splat(ZERO)
    for i in range(lanes.depth // 2):
        at = 2 * ROW * i + 4 * lane
        cos, sin = load_cos_sin(lanes, i, position + lane, scale)
        g, h = load(dy + at), load(dy + at + ROW)
        g, h = g * cos + h * sin, h * cos - g * sin
        if norm.weight != 0:
            x, y = standard(words + ROW * i + 4 * lane, mean, factor)
            weight, bias = lanes.sums + 8 * W * i, lanes.sums + 4 * W * (lanes.width + 2 * i)
            add(weight, g * x)
            add(weight + 4 * W, h * y)
            add(bias, g)
            add(bias + 4 * W, h)
            g, h = g * splat(load1(norm.weight + 8 * i)), h * splat(load1(norm.weight + 8 * i + 4))
            s += g + h
            s_z += g * x + h * y
        store(dy + at, g)
        store(dy + at + ROW, h)
    return s, s_z


@njit
def qknorm_rope_backward(dy, words, position, norm, scale, lanes, out):
    """The gradient dy (width, 32) float32 of normed and rotated rows -> that of the rows, as words.

    lanes must hold the moments of the rows. With z the standardised rows and u = dy weight:
    d_weight += dy z,   d_bias += dy,   d row = (u - mean u - z mean(u z)) / deviation.
    """
    share = splat(ONE / np.float32(lanes.e))
    for lane in range(0, BLOCK, W):
        s, s_z = rope_backward(dy, words, position, norm, scale, lanes, lane)
        mean, factor = load(lanes.mean + 4 * lane), load(lanes.factor + 4 * lane)
        s, s_z = s * share, s_z * share
        for i in range(lanes.depth // 2):
            at = dy + 2 * ROW * i + 4 * lane
            g, h = load(at), load(at + ROW)
            if norm.weight != 0:
                x, y = standard(words + ROW * i + 4 * lane, mean, factor)
                g, h = (g - s - x * s_z) * factor, (h - s - y * s_z) * factor
            store_pairs(out + ROW * i + 4 * lane, g, h)


@njit
def add_sums(norm, lanes):
    """Add the sums of all lanes to the norm's gradients."""
    if norm.weight != 0:
        for i in range(0, lanes.width, W):
            add(norm.d_weight + 4 * i, row_sums(lanes.sums + 4 * W * i))
            add(norm.d_bias + 4 * i, row_sums(lanes.sums + 4 * W * (lanes.width + i)))


@njit
def row_dots(x, y, width, out):
    """out[r] = the dot product of row r of x and row r of y, both words."""
    for lane in range(0, BLOCK, W):
        s, s_high = splat(ZERO), splat(ZERO)
        for i in range(width // 2):
            at = ROW * i + 4 * lane
            s += load_low(x + at) * load_low(y + at)
            s_high += load_high(x + at) * load_high(y + at)
        store(out + 4 * lane, s + s_high)
