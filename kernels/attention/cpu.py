"""Attention with QK-norm and rotary positions for the CPU: forward and backward, never a score in memory for long.

A task is one row of the batch and one key head with the query heads that share it. Its keys and values are normalised,
turned and widened to float32 once, into scratch that stays in cache. Then tiles of QUERIES x KEYS scores:

    weights = 2^(q k' - shift)      products whose sums leave the registers as weights: one pass, no row maximum
    out    += weights v             divided by the sums of the weights at the end

q carries scale * log2 e, so 2^x does for e^x. The shift is 0: normed rows are short, so by Cauchy and Schwarz no score
can overflow. Where that bound does not hold (`BOUND`), one more product per tile finds the largest score of each row.

Causal and documents: a row of the batch is cut into runs of one document id, and tiles lie within runs: a query's own
run up to itself, and whole earlier runs of the same id. Tiles that nobody sees do not exist, and on the diagonal the
products are trimmed to what is seen. Order of the loops: keys outside, queries inside, so that a tile of keys is
transposed once, and sums of queries (out, dq) and of keys (dk, dv) all lie in the task's own scratch: no two tasks
write one number, and the result does not depend on the number of threads.

Backward, with D_i = sum_d do_id out_id (FlashAttention-2, arXiv 2307.08691):
    weights = 2^(q k' - log2 of the sum),   dv += weights^T do
    ds = weights * (do v' - D),             dq += ds k,   dk += ds^T q

Everything is an address (int64) of contiguous memory. T positions, E numbers a head, `width` the same rounded up to
whole registers, filled with zeros.
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
    row_products,
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
QUERIES, KEYS = 64, 64  # a tile of scores is 16 KB: it and a tile of keys fit the first-level cache
MAX_SCORE = np.float32(60.0)  # of |score| in powers of two; sums of 2^60 are far from float32's 2^127
LOG2E, LN2 = np.float32(1 / math.log(2)), np.float32(math.log(2))
NEG_INF = np.float32(-math.inf)


class KernelArgs(NamedTuple):
    """Where everything lies; gradients are 0 in the forward pass."""

    q: int  # (B, T, H, E), of `size` bytes a number: 4 float32, 2 bfloat16; rows of a position `q_row` numbers apart
    k: int  # (B, T, G, E)
    v: int
    out: int  # (B, T, H, E)
    lse: int  # (B, H, T) float32: log2 of the sum of 2^score
    table: int  # (B, T, E) float32: cos and sin of each pair in turn
    docs: int  # (B, T) int64, or 0: a row is one document
    q_weight: int  # (H, width) float32, or 0: no norm
    q_bias: int
    k_weight: int  # (G, width)
    k_bias: int
    d_out: int  # like out
    dq: int  # like q, k, v, rows `d_row` numbers apart
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


def scratch_floats(job: KernelArgs, backward: bool) -> int:
    """Scratch of one task: rows of queries for each head that shares the keys, rows of keys, two tiles of each kind."""
    queries, keys = job.t * (job.heads // job.key_heads), job.t
    rows = (3 * queries + 4 * keys if backward else 2 * queries + 2 * keys) * job.width
    return rows + queries * (W + 2) + 2 * KEYS * (job.width + QUERIES) + W + block_floats(job.width)


@njit
def pack_keys(rows, n, width, out):
    """(n, width) -> (width, KEYS), the transpose; columns from n on to the next register hold anything."""
    for j in range(0, n, W):
        for i in range(0, width, W):
            transpose(rows + 4 * (j * width + i), width, out + 4 * (i * KEYS + j), KEYS)


# ---------------------------------------------------------------------------------------------------------------------
# Products of a tile. Row r of a tile sees the keys below min(first + r, n): `first` = 1 on the diagonal


def _weights(b, rows, n, q, width, kt, w, shift, first, most, sums):
    def emit(r: int, v: int) -> None:
        start = []
        for i in range(r):
            s = b.load(pointer(b, shift, f32, i), align=4)
            start += [splat_of(b, b.fneg(s))] * v
        one, keys = ir.Constant(i64, 1), ir.Constant(i64, KEYS)
        scores = emit_matmul(b, r, v, q, width, one, kt, keys, width, start)
        for i in range(r):
            seen = b.add(first, ir.Constant(i64, i))
            seen = b.select(b.icmp_signed("<", seen, most), seen, most)
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
def block_weights_sum(b, rows, n, q, width, kt, w, shift, first, most, sums):
    """w = 2^(q kt - shift) where seen, else 0; sums (rows, W) += w, lane by lane."""
    _weights(b, rows, n, q, width, kt, w, shift, first, most, sums)


@instruction(types.void, count, count, address, count, address, address, address, count, count)
def block_weights(b, rows, n, q, width, kt, w, shift, first, most):
    _weights(b, rows, n, q, width, kt, w, shift, first, most, None)


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
    """The weights of a tile and, unless sums is 0, their sums; rows of four are trimmed to the registers they see."""
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
def times_keys(w, nq, nk, first, x, width, y):
    """y (nq, width) += w x, over the keys that are seen."""
    for j in range(0, width, STRIP):
        vectors = min(STRIP, width - j) // W
        i = 0
        while i < nq:
            rows = ROWS if i + ROWS <= nq else 1
            seen = min(first + i + rows - 1, nk)
            block_matmul_add(
                rows, vectors, w + 4 * i * KEYS, KEYS, 1, x + 4 * j, width, y + 4 * (i * width + j), width, seen
            )
            i += rows


@njit
def times_queries(w, nq, nk, first, x, width, y):
    """y (nk, width) += w^T x, over the queries that see."""
    for j in range(0, width, STRIP):
        vectors = min(STRIP, width - j) // W
        c = 0
        while c < nk:
            rows = ROWS if c + ROWS <= nk else 1
            i = max(0, c - first + 1)  # the first query that sees key c
            if i < nq:
                block_matmul_add(
                    rows, vectors, w + 4 * (i * KEYS + c), 1, KEYS, x + 4 * (i * width + j), width,
                    y + 4 * (c * width + j), width, nq - i,
                )  # fmt: skip
            c += rows


# ---------------------------------------------------------------------------------------------------------------------
# Runs of documents


@njit
def same_document(docs, i, j):
    return docs == 0 or load1_int(docs + 8 * i) == load1_int(docs + 8 * j)


@njit
def end_of_run(docs, i, t):
    """The first position after i of another document."""
    j = i + 1
    while j < t and same_document(docs, i, j):
        j += 1
    return j


@njit
def tiles(docs, t):
    """Yields (i, nq, j, nk, first): queries [i, i + nq) of a run, keys [j, j + nk) of a run of the same document."""
    start = 0
    while start < t:
        end = end_of_run(docs, start, t)
        for j in range(start, end, KEYS):
            nk, low, high = min(KEYS, end - j), j, end
            while low < t:
                for i in range(low, high, QUERIES):
                    yield i, min(QUERIES, high - i), j, nk, i - j + 1
                low = high
                while low < t and not same_document(docs, j, low):
                    low = end_of_run(docs, low, t)
                if low < t:
                    high = end_of_run(docs, low, t)
        start = end


# ---------------------------------------------------------------------------------------------------------------------
# One task: batch row and key head


@njit
def rows_of(job, p, row, b, head):
    """The rows of one head, of tensors whose positions are `row` numbers apart."""
    return Rows(p + job.size * (b * job.t * row + head * job.e), job.size * row, job.size, job.e)


@njit
def query_norm(job, b, h):
    if job.q_weight == 0:
        return Norm(0, 0, 0, 0, job.eps)
    at, part = 4 * h * job.width, 4 * (b * job.heads + h) * job.width
    return Norm(job.q_weight + at, job.q_bias + at, job.d_q_weight + part, job.d_q_bias + part, job.eps)


@njit
def key_norm(job, b, g):
    if job.k_weight == 0:
        return Norm(0, 0, 0, 0, job.eps)
    at, part = 4 * g * job.width, 4 * (b * job.key_heads + g) * job.width
    return Norm(job.k_weight + at, job.k_bias + at, job.d_k_weight + part, job.d_k_bias + part, job.eps)


@njit
def score_scale(job):
    return LOG2E / np.float32(math.sqrt(job.e))


@njit
def prepare_queries(job, b, h, q, scratch):
    """Rows (T, width) of one query head; returns the largest square of a length."""
    rows, norm, most = rows_of(job, job.q, job.q_row, b, h), query_norm(job, b, h), ZERO
    table = job.table + 4 * b * job.t * job.width
    for i in range(0, job.t, W):
        n = min(W, job.t - i)
        most = max(
            most, qknorm_rope(rows, i, n, job.width, table, norm, score_scale(job), q + 4 * i * job.width, scratch)
        )
    return most


@njit
def prepare_keys(job, b, g, k, v, scratch):
    rows, norm, most = rows_of(job, job.k, job.k_row, b, g), key_norm(job, b, g), ZERO
    values, table = rows_of(job, job.v, job.v_row, b, g), job.table + 4 * b * job.t * job.width
    for i in range(0, job.t, W):
        n = min(W, job.t - i)
        most = max(most, qknorm_rope(rows, i, n, job.width, table, norm, ONE, k + 4 * i * job.width, scratch))
    for i in range(job.t):
        read_row(values.p + i * values.step, job.size, job.e, v + 4 * i * job.width)
    return most


@njit
def peak_rows(scores, nq, nk, first, shift):
    """shift[i] = max(shift[i], the largest score that row i sees)."""
    for i in range(nq):
        seen = min(first + i, nk)
        x = splat(load1(shift + 4 * i))
        for j in range(0, seen, W):
            x = vmax(blend_first(load(scores + 4 * (i * KEYS + j)), seen - j, x), x)
        store1(shift + 4 * i, hmax(x))


@njit
def find_shifts(job, docs, q, k, kt, scores, shift):
    """For each query of each head the largest score that it sees, by a product of its own."""
    t, width = job.t, job.width
    for i in range(t * (job.heads // job.key_heads)):
        store1(shift + 4 * i, NEG_INF)
    for i, nq, j, nk, first in tiles(docs, t):
        pack_keys(k + 4 * j * width, nk, width, kt)
        for s in range(job.heads // job.key_heads):
            clear(scores, QUERIES * KEYS)
            rows = s * t + i
            matmul_add(nq, (nk + W - 1) // W * W, q + 4 * rows * width, width, 1, kt, KEYS, scores, KEYS, width)
            peak_rows(scores, nq, nk, first, shift + 4 * rows)


@kernel
def forward(job, part, first_task, last_task, scratch):
    """out and lse of tasks [first_task, last_task), each a batch row and a key head."""
    job = unpack_args(job)
    t, width, shared = job.t, job.width, job.heads // job.key_heads
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
        b, g = task // job.key_heads, task % job.key_heads
        docs = job.docs + 8 * b * t if job.docs != 0 else 0
        longest_k, longest_q = prepare_keys(job, b, g, k, v, block), ZERO
        for s in range(shared):
            longest_q = max(longest_q, prepare_queries(job, b, g * shared + s, q + 4 * s * t * width, block))
        clear(out, shared * t * width)
        clear(sums, shared * t * W)
        if longest_k * longest_q < MAX_SCORE * MAX_SCORE:
            for i in range(shared * t):
                store1(shift + 4 * i, ZERO)
        else:
            find_shifts(job, docs, q, k, kt, w, shift)
        packed = -1
        for i, nq, j, nk, first in tiles(docs, t):
            if packed != j:
                pack_keys(k + 4 * j * width, nk, width, kt)
                packed = j
            for s in range(shared):
                rows = s * t + i
                tile_weights(q + 4 * rows * width, nq, kt, nk, width, first, shift + 4 * rows, sums + 4 * rows * W, w)
                times_keys(w, nq, nk, first, v + 4 * j * width, width, out + 4 * rows * width)
        for s in range(shared):
            h = g * shared + s
            for i in range(t):
                row = s * t + i
                weight = hsum(load(sums + 4 * row * W))
                store1(
                    job.lse + 4 * ((b * job.heads + h) * t + i), load1(shift + 4 * row) + np.float32(math.log2(weight))
                )
                target = job.out + job.size * (((b * t + i) * job.heads + h) * job.e)
                write_row(target, job.size, job.e, out + 4 * row * width, ONE / weight)


@kernel
def backward(job, part, first_task, last_task, scratch):
    """dq, dk, dv and each head's share of the norms' gradients (which start as zeros)."""
    job = unpack_args(job)
    t, width, shared = job.t, job.width, job.heads // job.key_heads
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
        b, g = task // job.key_heads, task % job.key_heads
        docs = job.docs + 8 * b * t if job.docs != 0 else 0
        lse = job.lse + 4 * (b * job.heads + g * shared) * t
        prepare_keys(job, b, g, k, v, block)
        for s in range(shared):
            prepare_queries(job, b, g * shared + s, q + 4 * s * t * width, block)
            read_gradient(job, b, g * shared + s, d_out + 4 * s * t * width, delta + 4 * s * t, block)
        clear(dq, shared * t * width)
        clear(dk, 2 * t * width)  # and dv
        packed = -1
        for i, nq, j, nk, first in tiles(docs, t):
            if packed != j:
                pack_keys(k + 4 * j * width, nk, width, kt)
                pack_keys(v + 4 * j * width, nk, width, vt)
                packed = j
            for s in range(shared):
                rows, keys = s * t + i, 4 * j * width
                queries = 4 * rows * width
                tile_weights(q + queries, nq, kt, nk, width, first, lse + 4 * rows, 0, w)
                tile_ds(d_out + queries, nq, vt, nk, width, first, delta + 4 * rows, w, ds)
                times_queries(w, nq, nk, first, d_out + queries, width, dv + keys)
                times_queries(ds, nq, nk, first, q + queries, width, dk + keys)
                times_keys(ds, nq, nk, first, k + keys, width, dq + queries)
        finish_backward(job, b, g, dq, dk, dv, block)


@njit
def read_gradient(job, b, h, d_out, delta, scratch):
    """Rows (T, width) of the gradient of one head's output, and their products with the output."""
    rows, out = rows_of(job, job.d_out, job.heads * job.e, b, h), rows_of(job, job.out, job.heads * job.e, b, h)
    for i in range(0, job.t, W):
        n = min(W, job.t - i)
        for r in range(i, i + n):
            read_row(rows.p + r * rows.step, job.size, job.e, d_out + 4 * r * job.width)
        row_products(d_out + 4 * i * job.width, out, i, n, job.width, delta + 4 * i, scratch)


@njit
def finish_backward(job, b, g, dq, dk, dv, scratch):
    """Gradients of prepared rows -> of the rows that came in."""
    t, width, shared = job.t, job.width, job.heads // job.key_heads
    table, keys = job.table + 4 * b * t * width, rows_of(job, job.k, job.k_row, b, g)
    norm, target = key_norm(job, b, g), rows_of(job, job.dk, job.d_row, b, g)
    for i in range(0, t, W):
        qknorm_rope_backward(dk + 4 * i * width, keys, i, min(W, t - i), width, table, norm, LN2, target, scratch)
    for s in range(shared):
        h = g * shared + s
        rows, target = rows_of(job, job.q, job.q_row, b, h), rows_of(job, job.dq, job.d_row, b, h)
        norm = query_norm(job, b, h)
        for i in range(0, t, W):
            dy, n = dq + 4 * (s * t + i) * width, min(W, t - i)
            qknorm_rope_backward(dy, rows, i, n, width, table, norm, score_scale(job) * LN2, target, scratch)
    target = rows_of(job, job.dv, job.d_row, b, g)
    for i in range(t):
        write_row(target.p + i * target.step, job.size, job.e, dv + 4 * i * width, ONE)
