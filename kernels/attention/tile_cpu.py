"""Matmuls of one tile of scores for attention on a CPU (cpu.py): QUERIES x KEYS, in registers and the L1 cache.

    tile_weights         w = 2^(q k' - shift)
    tile_ds              ds = w * (d_out v' - delta)
    matmul_over_keys     y += w x       out and dq
    matmul_over_queries  y += w^T x     dv and dk

Row r of a tile sees the keys below min(first + r, n): on the diagonal `first` is 1, so that query i sees key i. Matmuls
are trimmed to what is seen. Shapes: q, d_out (queries, width); kt, vt (width, KEYS), transposed by `pack_keys`;
w, ds (QUERIES, KEYS). All float32, all addresses int64.
"""

from llvmlite import ir
from numba import njit, types

from nanochameleon.kernels.cpu.exp2 import exp2_of
from nanochameleon.kernels.cpu.matmul import ROWS, STRIP, block_matmul_add, emit_matmul, for_each_size
from nanochameleon.kernels.cpu.simd import (
    FUSE,
    W,
    address,
    constant,
    count,
    f32,
    i64,
    instruction,
    lanes_below,
    load_at,
    pointer,
    splat_of,
    store_at,
    transpose,
)

QUERIES, KEYS = 64, 64  # a tile of scores is 16 KB: it and a tile of keys fit the L1 cache


@njit
def pack_keys(rows, n, width, out):
    """Transpose (n, width) -> (width, KEYS). Columns from n to the end of its register hold garbage."""
    for j in range(0, n, W):
        for i in range(0, width, W):
            transpose(rows + 4 * (j * width + i), width, out + 4 * (i * KEYS + j), KEYS)


def _minus(b, rows: int, n: int, x, width, yt, offset) -> list:
    """Emit x yt - offset, with offset (rows,): the matmul's sums start at -offset."""
    start = []
    for i in range(rows):
        s = b.load(pointer(b, offset, f32, i), align=4)
        start += [splat_of(b, b.fneg(s))] * n
    return emit_matmul(b, rows, n, x, width, ir.Constant(i64, 1), yt, ir.Constant(i64, KEYS), width, start)


def _weights(b, rows, n, q, width, kt, w, shift, first, nk, sums):
    def emit(r: int, v: int) -> None:
        scores = _minus(b, r, v, q, width, kt, shift)
        for i in range(r):
            seen = b.add(first, ir.Constant(i64, i))
            seen = b.select(b.icmp_signed("<", seen, nk), seen, nk)
            row = None
            for j, x in enumerate(exp2_of(b, *scores[i * v : (i + 1) * v])):
                mask = lanes_below(b, b.sub(seen, ir.Constant(i64, W * j)))
                x = b.select(mask, x, constant(0.0))
                store_at(b, x, w, KEYS * i + W * j)
                row = x if row is None else b.fadd(row, x)
            if sums is not None:
                store_at(b, b.fadd(load_at(b, sums, W * i), row), sums, W * i)

    for_each_size(b, rows, n, emit)


@instruction(types.void, count, count, address, count, address, address, address, count, count, address)
def block_weights_sum(b, rows, n, q, width, kt, w, shift, first, nk, sums):
    """w = 2^(q kt - shift) where seen, else 0; sums (rows, W) += w, lane by lane."""
    _weights(b, rows, n, q, width, kt, w, shift, first, nk, sums)


@instruction(types.void, count, count, address, count, address, address, address, count, count)
def block_weights(b, rows, n, q, width, kt, w, shift, first, nk):
    _weights(b, rows, n, q, width, kt, w, shift, first, nk, None)


@instruction(types.void, count, count, address, count, address, address, address, address)
def block_ds(b, rows, n, d_out, width, vt, w, delta, ds):
    """ds = w * (d_out vt - delta)."""

    def emit(r: int, v: int) -> None:
        for i, x in enumerate(_minus(b, r, v, d_out, width, vt, delta)):
            at = KEYS * (i // v) + W * (i % v)
            store_at(b, b.fmul(load_at(b, w, at), x, flags=FUSE), ds, at)

    for_each_size(b, rows, n, emit)


@njit
def tile_weights(q, nq, kt, nk, width, first, shift, sums, w):
    """Weights of a tile and, unless sums is 0, their sums. Blocks of ROWS rows compute only registers they see."""
    i = 0
    while i < nq:
        rows = ROWS if i + ROWS <= nq else 1
        seen = min(first + i + rows - 1, nk)
        for j in range(0, seen, STRIP):
            vectors = (min(STRIP, seen - j) + W - 1) // W
            a, k, c = q + 4 * i * width, kt + 4 * j, w + 4 * (i * KEYS + j)
            if sums != 0:
                block_weights_sum(rows, vectors, a, width, k, c, shift + 4 * i, first + i - j, nk - j, sums + 4 * W * i)
            else:
                block_weights(rows, vectors, a, width, k, c, shift + 4 * i, first + i - j, nk - j)
        i += rows


@njit
def tile_ds(d_out, nq, vt, nk, width, first, delta, w, ds):
    """ds = w * (d_out vt - delta) of a tile."""
    i = 0
    while i < nq:
        rows = ROWS if i + ROWS <= nq else 1
        seen = min(first + i + rows - 1, nk)
        for j in range(0, seen, STRIP):
            vectors = (min(STRIP, seen - j) + W - 1) // W
            at = 4 * (i * KEYS + j)
            block_ds(rows, vectors, d_out + 4 * i * width, width, vt + 4 * j, w + at, delta + 4 * i, ds + at)
        i += rows


@njit
def matmul_over_keys(w, nq, nk, first, x, width, y):
    """y (nq, width) += w x, over the keys that each query sees."""
    for j in range(0, width, STRIP):
        vectors = min(STRIP, width - j) // W
        i = 0
        while i < nq:
            rows = ROWS if i + ROWS <= nq else 1
            seen = min(first + i + rows - 1, nk)
            a, c = w + 4 * i * KEYS, y + 4 * (i * width + j)
            block_matmul_add(rows, vectors, a, KEYS, 1, x + 4 * j, width, c, width, seen)
            i += rows


@njit
def matmul_over_queries(w, nq, nk, first, x, width, y):
    """y (nk, width) += w^T x, over the queries that see each key."""
    for j in range(0, width, STRIP):
        vectors = min(STRIP, width - j) // W
        c = 0
        while c < nk:
            rows = ROWS if c + ROWS <= nk else 1
            i = max(0, c - first + 1)  # the first query that sees key c
            if i < nq:
                a, b = w + 4 * (i * KEYS + c), x + 4 * (i * width + j)
                block_matmul_add(rows, vectors, a, 1, KEYS, b, width, y + 4 * (c * width + j), width, nq - i)
            c += rows
