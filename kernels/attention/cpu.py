"""Attention with QK-norm and RoPE for CPUs, forward and backward, fused: the score matrix is never materialised.

A task is one sequence of the batch and one key head with the query heads that share it. Keys and values are normed,
rotated and widened to float32 once, into scratch that stays in cache. Then, for tiles of QUERIES x KEYS scores:

    weights = 2^(q k' - shift)      a matmul whose sums leave the registers as weights: one pass, no row maximum
    out    += weights v             divided by the sums of the weights at the end

q carries scale * log2 e, so that 2^x serves as e^x. The shift is 0: normed rows are short, so by Cauchy-Schwarz no
score can overflow. Where that bound (`MAX_SCORE`) does not hold, one more matmul per tile finds each row's maximum.

Causal and within documents: a sequence is cut into runs of one document id, and tiles lie within runs. A query sees its
own run up to itself, and whole earlier runs of the same id. Tiles that no query sees are skipped, and on the diagonal
the matmuls are trimmed to what is seen. Keys are the outer loop and queries the inner one, so a tile of keys is
transposed once. Sums of queries (out, dq) and of keys (dk, dv) stay in the task's own scratch: no two tasks write the
same number, and the result does not depend on the number of threads.

Backward, with D_i = sum_d do_id out_id (FlashAttention-2, arXiv 2307.08691):
    weights = 2^(q k' - lse2),   dv += weights^T do
    ds = weights * (do v' - D),  dq += ds k,   dk += ds^T q

Everything is an int64 address of contiguous memory. T positions, E numbers a head, `width` the same rounded up to whole
registers and filled with zeros. Not here: norm and rotation of rows (qknorm_rope_cpu.py), matmuls (../cpu/matmul.py).
"""

import math
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types

from nanochameleon.kernels.attention.qknorm_rope_cpu import (
    ONE,
    Norm,
    Rows,
    block_floats,
    qknorm_rope,
    qknorm_rope_backward,
    row_dots,
)
from nanochameleon.kernels.cpu.exp2 import exp2_of
from nanochameleon.kernels.cpu.launch import kernel
from nanochameleon.kernels.cpu.matmul import ROWS, STRIP, block_matmul_add, emit_matmul, for_each_size, matmul_add
from nanochameleon.kernels.cpu.parallel_for import args_unpacker
from nanochameleon.kernels.cpu.simd import (
    FUSE,
    ZERO,
    W,
    address,
    blend_first,
    clear,
    constant,
    count,
    f32,
    hmax,
    hsum,
    i64,
    instruction,
    lanes_below,
    load,
    load1,
    load1_int,
    load_at,
    pointer,
    read_row,
    splat,
    splat_of,
    store1,
    store_at,
    transpose,
    vmax,
    write_row,
)

LANES = W  # a head's numbers are rounded up to this many
QUERIES, KEYS = 64, 64  # a tile of scores is 16 KB: it and a tile of keys fit the L1 cache
MAX_SCORE = np.float32(60.0)  # bound of |score| as a power of 2: sums of 2^60 are far from float32's 2^127
LOG2E, LN2 = np.float32(1 / math.log(2)), np.float32(math.log(2))
NEG_INF = np.float32(-math.inf)


class KernelArgs(NamedTuple):
    """Addresses, sizes and strides; gradients are 0 in the forward pass."""

    q: int  # (B, T, H, E), of `size` bytes a number (4 float32, 2 bfloat16), positions `q_row` numbers apart
    k: int  # (B, T, G, E)
    v: int
    out: int  # (B, T, H, E)
    lse2: int  # (B, H, T) float32: log2 of the sum of 2^score
    cos_sin: int  # (B, T, width) float32: cos and sin of each pair
    doc_ids: int  # (B, T) int64, or 0: each sequence is one document
    q_weight: int  # (H, width) float32, or 0: no norm
    q_bias: int
    k_weight: int  # (G, width)
    k_bias: int
    d_out: int  # like out
    dq: int  # like q, k, v, positions `d_row` numbers apart
    dk: int
    dv: int
    d_q_weight: int  # (B, H, width) float32
    d_q_bias: int
    d_k_weight: int  # (B, G, width)
    d_k_bias: int
    t: int
    heads: int  # query heads H
    key_heads: int  # G
    e: int
    width: int
    size: int
    q_row: int
    k_row: int
    v_row: int
    d_row: int
    eps: float


unpack_args = args_unpacker(KernelArgs)


def scratch_floats(args: KernelArgs, backward: bool) -> int:
    """Scratch of one task: rows of all queries that share the keys, rows of keys, two tiles of each kind."""
    queries, keys = args.t * (args.heads // args.key_heads), args.t
    rows = (3 * queries + 4 * keys if backward else 2 * queries + 2 * keys) * args.width
    return rows + queries * (W + 2) + 2 * KEYS * (args.width + QUERIES) + W + block_floats(args.width)


@njit
def pack_keys(rows, n, width, out):
    """Transpose (n, width) -> (width, KEYS). Columns from n to the end of its register hold garbage."""
    for j in range(0, n, W):
        for i in range(0, width, W):
            transpose(rows + 4 * (j * width + i), width, out + 4 * (i * KEYS + j), KEYS)


# ---------------------------------------------------------------------------------------------------------------------
# Matmuls of a tile. Row r sees the keys below min(first + r, n): on the diagonal `first` is 1


def _weights(b, rows, n, q, width, kt, w, shift, first, nk, sums):
    # The matmul starts at -shift, so its sums leave the registers as exponents.
    def emit(r: int, v: int) -> None:
        start = []
        for i in range(r):
            s = b.load(pointer(b, shift, f32, i), align=4)
            start += [splat_of(b, b.fneg(s))] * v
        one, keys = ir.Constant(i64, 1), ir.Constant(i64, KEYS)
        scores = emit_matmul(b, r, v, q, width, one, kt, keys, width, start)
        for i in range(r):
            seen = b.add(first, ir.Constant(i64, i))
            seen = b.select(b.icmp_signed("<", seen, nk), seen, nk)
            row = None
            for j in range(v):
                mask = lanes_below(b, b.sub(seen, ir.Constant(i64, W * j)))
                x = b.select(mask, exp2_of(b, scores[i * v + j]), constant(0.0))
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
        start = []
        for i in range(r):
            s = b.load(pointer(b, delta, f32, i), align=4)
            start += [splat_of(b, b.fneg(s))] * v
        one, keys = ir.Constant(i64, 1), ir.Constant(i64, KEYS)
        for i, x in enumerate(emit_matmul(b, r, v, d_out, width, one, vt, keys, width, start)):
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


# ---------------------------------------------------------------------------------------------------------------------
# Which tiles exist: runs of documents


@njit
def same_document(doc_ids, i, j):
    return doc_ids == 0 or load1_int(doc_ids + 8 * i) == load1_int(doc_ids + 8 * j)


@njit
def end_of_document_run(doc_ids, i, t):
    """The first position after i that belongs to another document."""
    j = i + 1
    while j < t and same_document(doc_ids, i, j):
        j += 1
    return j


@njit
def tiles(doc_ids, t):
    """Yield (i, nq, j, nk, first): queries [i, i + nq) of a run, keys [j, j + nk) of a run of the same document."""
    start = 0
    while start < t:
        end = end_of_document_run(doc_ids, start, t)
        for j in range(start, end, KEYS):
            nk, low, high = min(KEYS, end - j), j, end
            while low < t:
                for i in range(low, high, QUERIES):
                    yield i, min(QUERIES, high - i), j, nk, i - j + 1
                low = high
                while low < t and not same_document(doc_ids, j, low):
                    low = end_of_document_run(doc_ids, low, t)
                if low < t:
                    high = end_of_document_run(doc_ids, low, t)
        start = end


# ---------------------------------------------------------------------------------------------------------------------
# One task: a sequence and a key head


@njit
def head_rows(args, p, row, b, head):
    """The rows of one head, in a tensor whose positions are `row` numbers apart."""
    return Rows(p + args.size * (b * args.t * row + head * args.e), args.size * row, args.size, args.e)


@njit
def query_norm(args, b, h):
    if args.q_weight == 0:
        return Norm(0, 0, 0, 0, args.eps)
    at, chunk = 4 * h * args.width, 4 * (b * args.heads + h) * args.width
    return Norm(args.q_weight + at, args.q_bias + at, args.d_q_weight + chunk, args.d_q_bias + chunk, args.eps)


@njit
def key_norm(args, b, g):
    if args.k_weight == 0:
        return Norm(0, 0, 0, 0, args.eps)
    at, chunk = 4 * g * args.width, 4 * (b * args.key_heads + g) * args.width
    return Norm(args.k_weight + at, args.k_bias + at, args.d_k_weight + chunk, args.d_k_bias + chunk, args.eps)


@njit
def score_scale(args):
    return LOG2E / np.float32(math.sqrt(args.e))


@njit
def prepare_queries(args, b, h, q, scratch):
    """Norm and rotate one query head -> q (T, width). Returns the largest squared length."""
    rows, norm, most = head_rows(args, args.q, args.q_row, b, h), query_norm(args, b, h), ZERO
    cos_sin = args.cos_sin + 4 * b * args.t * args.width
    for i in range(0, args.t, W):
        n = min(W, args.t - i)
        most = max(
            most, qknorm_rope(rows, i, n, args.width, cos_sin, norm, score_scale(args), q + 4 * i * args.width, scratch)
        )
    return most


@njit
def prepare_keys(args, b, g, k, v, scratch):
    """Norm and rotate one key head -> k (T, width), widen v. Returns the largest squared length of a key."""
    rows, norm, most = head_rows(args, args.k, args.k_row, b, g), key_norm(args, b, g), ZERO
    values, cos_sin = head_rows(args, args.v, args.v_row, b, g), args.cos_sin + 4 * b * args.t * args.width
    for i in range(0, args.t, W):
        n = min(W, args.t - i)
        most = max(most, qknorm_rope(rows, i, n, args.width, cos_sin, norm, ONE, k + 4 * i * args.width, scratch))
    for i in range(args.t):
        read_row(values.p + i * values.step, args.size, args.e, v + 4 * i * args.width)
    return most


@njit
def raise_shift(scores, nq, nk, first, shift):
    """shift[i] = max(shift[i], the largest score that query i sees)."""
    for i in range(nq):
        seen = min(first + i, nk)
        x = splat(load1(shift + 4 * i))
        for j in range(0, seen, W):
            x = vmax(blend_first(load(scores + 4 * (i * KEYS + j)), seen - j, x), x)
        store1(shift + 4 * i, hmax(x))


@njit
def find_shifts(args, doc_ids, q, k, kt, scores, shift):
    """shift = the largest score that each query sees, by a matmul of its own."""
    t, width = args.t, args.width
    for i in range(t * (args.heads // args.key_heads)):
        store1(shift + 4 * i, NEG_INF)
    for i, nq, j, nk, first in tiles(doc_ids, t):
        pack_keys(k + 4 * j * width, nk, width, kt)
        for s in range(args.heads // args.key_heads):
            clear(scores, QUERIES * KEYS)
            rows = s * t + i
            matmul_add(nq, (nk + W - 1) // W * W, q + 4 * rows * width, width, 1, kt, KEYS, scores, KEYS, width)
            raise_shift(scores, nq, nk, first, shift + 4 * rows)


@kernel
def forward(args, chunk, first_task, last_task, scratch):
    """out and lse2 of tasks [first_task, last_task), each a sequence and a key head."""
    args = unpack_args(args)
    t, width, shared = args.t, args.width, args.heads // args.key_heads
    q = scratch
    out = q + 4 * shared * t * width
    k = out + 4 * shared * t * width
    v = k + 4 * t * width
    kt = v + 4 * t * width
    w = kt + 4 * width * KEYS
    sums = w + 4 * QUERIES * KEYS
    shift = sums + 4 * shared * t * W
    block = shift + 4 * shared * t
    for task in range(first_task, last_task):
        b, g = task // args.key_heads, task % args.key_heads
        doc_ids = args.doc_ids + 8 * b * t if args.doc_ids != 0 else 0
        longest_k, longest_q = prepare_keys(args, b, g, k, v, block), ZERO
        for s in range(shared):
            longest_q = max(longest_q, prepare_queries(args, b, g * shared + s, q + 4 * s * t * width, block))
        clear(out, shared * t * width)
        clear(sums, shared * t * W)
        if longest_k * longest_q < MAX_SCORE * MAX_SCORE:
            for i in range(shared * t):
                store1(shift + 4 * i, ZERO)
        else:
            find_shifts(args, doc_ids, q, k, kt, w, shift)
        packed = -1
        for i, nq, j, nk, first in tiles(doc_ids, t):
            if packed != j:
                pack_keys(k + 4 * j * width, nk, width, kt)
                packed = j
            for s in range(shared):
                rows = s * t + i
                tile_weights(q + 4 * rows * width, nq, kt, nk, width, first, shift + 4 * rows, sums + 4 * rows * W, w)
                matmul_over_keys(w, nq, nk, first, v + 4 * j * width, width, out + 4 * rows * width)
        for s in range(shared):
            h = g * shared + s
            for i in range(t):
                row = s * t + i
                weight = hsum(load(sums + 4 * row * W))
                lse2 = load1(shift + 4 * row) + np.float32(math.log2(weight))
                store1(args.lse2 + 4 * ((b * args.heads + h) * t + i), lse2)
                target = args.out + args.size * (((b * t + i) * args.heads + h) * args.e)
                write_row(target, args.size, args.e, out + 4 * row * width, ONE / weight)


@kernel
def backward(args, chunk, first_task, last_task, scratch):
    """dq, dk, dv, and each sequence's part of the norms' gradients, which start as zeros."""
    args = unpack_args(args)
    t, width, shared = args.t, args.width, args.heads // args.key_heads
    q = scratch
    d_out = q + 4 * shared * t * width
    dq = d_out + 4 * shared * t * width
    k = dq + 4 * shared * t * width
    v = k + 4 * t * width
    dk = v + 4 * t * width
    dv = dk + 4 * t * width
    kt = dv + 4 * t * width
    vt = kt + 4 * width * KEYS
    w = vt + 4 * width * KEYS
    ds = w + 4 * QUERIES * KEYS
    delta = ds + 4 * QUERIES * KEYS
    block = delta + 4 * (shared * t + W)
    for task in range(first_task, last_task):
        b, g = task // args.key_heads, task % args.key_heads
        doc_ids = args.doc_ids + 8 * b * t if args.doc_ids != 0 else 0
        lse2 = args.lse2 + 4 * (b * args.heads + g * shared) * t
        prepare_keys(args, b, g, k, v, block)
        for s in range(shared):
            prepare_queries(args, b, g * shared + s, q + 4 * s * t * width, block)
            read_gradient(args, b, g * shared + s, d_out + 4 * s * t * width, delta + 4 * s * t, block)
        clear(dq, shared * t * width)
        clear(dk, 2 * t * width)  # and dv
        packed = -1
        for i, nq, j, nk, first in tiles(doc_ids, t):
            if packed != j:
                pack_keys(k + 4 * j * width, nk, width, kt)
                pack_keys(v + 4 * j * width, nk, width, vt)
                packed = j
            for s in range(shared):
                rows, keys = s * t + i, 4 * j * width
                queries = 4 * rows * width
                tile_weights(q + queries, nq, kt, nk, width, first, lse2 + 4 * rows, 0, w)
                tile_ds(d_out + queries, nq, vt, nk, width, first, delta + 4 * rows, w, ds)
                matmul_over_queries(w, nq, nk, first, d_out + queries, width, dv + keys)
                matmul_over_queries(ds, nq, nk, first, q + queries, width, dk + keys)
                matmul_over_keys(ds, nq, nk, first, k + keys, width, dq + queries)
        finish_backward(args, b, g, dq, dk, dv, block)


@njit
def read_gradient(args, b, h, d_out, delta, scratch):
    """d_out (T, width) of one head, and delta = its dot products with the output."""
    row = args.heads * args.e
    rows, out = head_rows(args, args.d_out, row, b, h), head_rows(args, args.out, row, b, h)
    for i in range(0, args.t, W):
        n = min(W, args.t - i)
        for r in range(i, i + n):
            read_row(rows.p + r * rows.step, args.size, args.e, d_out + 4 * r * args.width)
        row_dots(d_out + 4 * i * args.width, out, i, n, args.width, delta + 4 * i, scratch)


@njit
def finish_backward(args, b, g, dq, dk, dv, scratch):
    """Gradients of normed and rotated rows -> gradients of q, k and v."""
    t, width, shared = args.t, args.width, args.heads // args.key_heads
    cos_sin, keys = args.cos_sin + 4 * b * t * width, head_rows(args, args.k, args.k_row, b, g)
    norm, target = key_norm(args, b, g), head_rows(args, args.dk, args.d_row, b, g)
    for i in range(0, t, W):
        qknorm_rope_backward(dk + 4 * i * width, keys, i, min(W, t - i), width, cos_sin, norm, LN2, target, scratch)
    for s in range(shared):
        h = g * shared + s
        rows, target = head_rows(args, args.q, args.q_row, b, h), head_rows(args, args.dq, args.d_row, b, h)
        norm = query_norm(args, b, h)
        for i in range(0, t, W):
            dy, n = dq + 4 * (s * t + i) * width, min(W, t - i)
            qknorm_rope_backward(dy, rows, i, n, width, cos_sin, norm, score_scale(args) * LN2, target, scratch)
    target = head_rows(args, args.dv, args.d_row, b, g)
    for i in range(t):
        write_row(target.p + i * target.step, args.size, args.e, dv + 4 * i * width, ONE)
