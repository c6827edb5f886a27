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

from nanochameleon.kernels.launch import kernel
from nanochameleon.kernels.region_numba import reader
from nanochameleon.kernels.simd import (
    FUSE,
    ROWS,
    STRIP,
    ZERO,
    W,
    add_product,
    address,
    block_add,
    clear,
    constant,
    count,
    dot_rows,
    exp2_of,
    f32,
    for_each_size,
    head,
    i64,
    instruction,
    lanes_below,
    larger,
    largest,
    load,
    load_at,
    peek,
    peek_int,
    pointer,
    poke,
    products,
    read_row,
    splat,
    splat_of,
    store,
    store_at,
    total,
    transpose,
    turn,
    turn_back,
    write_row,
)

QUERIES, KEYS = 64, 64  # a tile of scores is 16 KB: it and a tile of keys fit the first-level cache
BOUND = np.float32(60.0)  # of |score| in powers of two; sums of 2^60 are far from float32's 2^127
LOG2E, LN2 = np.float32(1 / math.log(2)), np.float32(math.log(2))
ONE, LEAST = np.float32(1), np.float32(-math.inf)


class Job(NamedTuple):
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


read_job = reader(Job)


def scratch_floats(job: Job, backward: bool) -> int:
    """Scratch of one task: rows of queries for each head that shares the keys, rows of keys, two tiles of each kind."""
    queries, keys = job.t * (job.heads // job.key_heads), job.t
    rows = (3 * queries + 4 * keys if backward else 2 * queries + 2 * keys) * job.width
    return rows + queries * (W + 2) + 2 * KEYS * (job.width + QUERIES) + W * (job.width + W)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@njit
def standardise(x, e, eps):
    """Mean 0 and variance 1, in place; returns what it multiplied by. The zeros behind the row stay zeros."""
    s = splat(ZERO)
    for i in range(0, e, W):
        s += load(x + 4 * i)
    mean = splat(total(s) / np.float32(e))
    s = splat(ZERO)
    for i in range(0, e, W):
        y = head(load(x + 4 * i) - mean, e - i, splat(ZERO))
        store(x + 4 * i, y)
        s += y * y
    factor = ONE / math.sqrt(total(s) / np.float32(e) + eps)
    for i in range(0, e, W):
        store(x + 4 * i, load(x + 4 * i) * splat(factor))
    return factor


@njit
def prepare(p, size, e, table, weight, bias, eps, factor, out):
    """A head's row of queries or keys -> normed, turned, times factor. Returns the square of its length."""
    read_row(p, size, e, out)
    if weight != 0:
        standardise(out, e, eps)
        for i in range(0, e, W):
            store(out + 4 * i, load(out + 4 * i) * load(weight + 4 * i) + load(bias + 4 * i))
    square = splat(ZERO)
    for i in range(0, e, W):
        y = turn(load(out + 4 * i), load(table + 4 * i)) * splat(factor)
        store(out + 4 * i, y)
        square += y * y
    return total(square)


@njit
def prepare_backward(dy, p, size, e, table, weight, d_weight, d_bias, eps, factor, row, out):
    """The gradient dy of a prepared row -> of the row itself, written to `out`; adds to d_weight and d_bias.

    With n the standardised row and g = dy turned back: d_weight += g n, d_bias += g, and the norm's own
    gradient is (u - mean u - n mean(u n)) / deviation, u = g weight.
    """
    for i in range(0, e, W):
        store(dy + 4 * i, turn_back(load(dy + 4 * i), load(table + 4 * i)) * splat(factor))
    if weight != 0:
        read_row(p, size, e, row)
        inverse = standardise(row, e, eps)
        s, s_n = splat(ZERO), splat(ZERO)
        for i in range(0, e, W):
            g, n = load(dy + 4 * i), load(row + 4 * i)
            store(d_weight + 4 * i, load(d_weight + 4 * i) + g * n)
            store(d_bias + 4 * i, load(d_bias + 4 * i) + g)
            u = g * load(weight + 4 * i)
            store(dy + 4 * i, u)
            s += u
            s_n += u * n
        mean, mean_n = splat(total(s) / np.float32(e)), splat(total(s_n) / np.float32(e))
        for i in range(0, e, W):
            y = load(dy + 4 * i) - mean - load(row + 4 * i) * mean_n
            store(dy + 4 * i, y * splat(inverse))
    write_row(out, size, e, dy, ONE)


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
        scores = products(b, r, v, q, width, one, kt, keys, width, start)
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
        for i, x in enumerate(products(b, r, v, d_out, width, one, vt, keys, width, start)):
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
            block_add(rows, vectors, w + 4 * i * KEYS, KEYS, 1, x + 4 * j, width, y + 4 * (i * width + j), width, seen)
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
                block_add(
                    rows, vectors, w + 4 * (i * KEYS + c), 1, KEYS, x + 4 * (i * width + j), width,
                    y + 4 * (c * width + j), width, nq - i,
                )  # fmt: skip
            c += rows


# ---------------------------------------------------------------------------------------------------------------------
# Runs of documents


@njit
def same_document(docs, i, j):
    return docs == 0 or peek_int(docs + 8 * i) == peek_int(docs + 8 * j)


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
def scale_of(job):
    return ONE / np.float32(math.sqrt(job.e))


@njit
def prepare_queries(job, b, head_, q):
    """Rows (T, width) of one query head; returns the largest square of a length."""
    most = ZERO
    for i in range(job.t):
        at = (b * job.t + i) * job.q_row + head_ * job.e
        weight = job.q_weight + 4 * head_ * job.width if job.q_weight != 0 else 0
        table = job.table + 4 * (b * job.t + i) * job.width
        square = prepare(
            job.q + job.size * at, job.size, job.e, table, weight, job.q_bias + 4 * head_ * job.width, job.eps,
            scale_of(job) * LOG2E, q + 4 * i * job.width,
        )  # fmt: skip
        most = max(most, square)
    return most


@njit
def prepare_keys(job, b, g, k, v):
    most = ZERO
    for i in range(job.t):
        at = (b * job.t + i) * job.k_row + g * job.e
        weight = job.k_weight + 4 * g * job.width if job.k_weight != 0 else 0
        table = job.table + 4 * (b * job.t + i) * job.width
        square = prepare(
            job.k + job.size * at, job.size, job.e, table, weight, job.k_bias + 4 * g * job.width, job.eps, ONE,
            k + 4 * i * job.width,
        )  # fmt: skip
        most = max(most, square)
        at = (b * job.t + i) * job.v_row + g * job.e
        read_row(job.v + job.size * at, job.size, job.e, v + 4 * i * job.width)
    return most


@njit
def peak_rows(scores, nq, nk, first, shift):
    """shift[i] = max(shift[i], the largest score that row i sees)."""
    for i in range(nq):
        seen = min(first + i, nk)
        x = splat(peek(shift + 4 * i))
        for j in range(0, seen, W):
            x = larger(head(load(scores + 4 * (i * KEYS + j)), seen - j, x), x)
        poke(shift + 4 * i, largest(x))


@njit
def find_shifts(job, docs, q, k, kt, scores, shift):
    """For each query of each head the largest score that it sees, by a product of its own."""
    t, width = job.t, job.width
    for i in range(t * (job.heads // job.key_heads)):
        poke(shift + 4 * i, LEAST)
    for i, nq, j, nk, first in tiles(docs, t):
        pack_keys(k + 4 * j * width, nk, width, kt)
        for s in range(job.heads // job.key_heads):
            clear(scores, QUERIES * KEYS)
            rows = s * t + i
            add_product(nq, (nk + W - 1) // W * W, q + 4 * rows * width, width, 1, kt, KEYS, scores, KEYS, width)
            peak_rows(scores, nq, nk, first, shift + 4 * rows)


@kernel
def forward(job, part, first_task, last_task, scratch):
    """out and lse of tasks [first_task, last_task), each a batch row and a key head."""
    job = read_job(job)
    t, width, shared = job.t, job.width, job.heads // job.key_heads
    q = scratch
    out = q + 4 * shared * t * width
    k = out + 4 * shared * t * width
    v = k + 4 * t * width
    kt = v + 4 * t * width
    w = kt + 4 * width * KEYS
    sums = w + 4 * QUERIES * KEYS
    shift = sums + 4 * shared * t * W
    for task in range(first_task, last_task):
        b, g = task // job.key_heads, task % job.key_heads
        docs = job.docs + 8 * b * t if job.docs != 0 else 0
        longest_k, longest_q = prepare_keys(job, b, g, k, v), ZERO
        for s in range(shared):
            longest_q = max(longest_q, prepare_queries(job, b, g * shared + s, q + 4 * s * t * width))
        clear(out, shared * t * width)
        clear(sums, shared * t * W)
        if longest_k * longest_q < BOUND * BOUND:
            for i in range(shared * t):
                poke(shift + 4 * i, ZERO)
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
                weight = total(load(sums + 4 * row * W))
                poke(job.lse + 4 * ((b * job.heads + h) * t + i), peek(shift + 4 * row) + np.float32(math.log2(weight)))
                target = job.out + job.size * (((b * t + i) * job.heads + h) * job.e)
                write_row(target, job.size, job.e, out + 4 * row * width, ONE / weight)


@kernel
def backward(job, part, first_task, last_task, scratch):
    """dq, dk, dv and each head's share of the norms' gradients (which start as zeros)."""
    job = read_job(job)
    t, width, size, e, shared = job.t, job.width, job.size, job.e, job.heads // job.key_heads
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
    row = delta + 4 * (shared * t + W)
    for task in range(first_task, last_task):
        b, g = task // job.key_heads, task % job.key_heads
        docs = job.docs + 8 * b * t if job.docs != 0 else 0
        lse = job.lse + 4 * (b * job.heads + g * shared) * t
        prepare_keys(job, b, g, k, v)
        for s in range(shared):
            prepare_queries(job, b, g * shared + s, q + 4 * s * t * width)
            for i in range(t):
                at = size * (((b * t + i) * job.heads + g * shared + s) * e)
                target = d_out + 4 * (s * t + i) * width
                read_row(job.d_out + at, size, e, target)
                read_row(job.out + at, size, e, row)
                poke(delta + 4 * (s * t + i), dot_rows(target, row, width))
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
        finish_backward(job, b, g, dq, dk, dv, row)


@njit
def finish_backward(job, b, g, dq, dk, dv, row):
    """Gradients of prepared rows -> of the rows that came in."""
    t, width, size, e, shared = job.t, job.width, job.size, job.e, job.heads // job.key_heads
    for i in range(t):
        table = job.table + 4 * (b * t + i) * width
        out = size * ((b * t + i) * job.d_row)
        for s in range(shared):
            h = g * shared + s
            at, part = size * ((b * t + i) * job.q_row + h * e), 4 * (b * job.heads + h) * width
            weight = job.q_weight + 4 * h * width if job.q_weight != 0 else 0
            prepare_backward(
                dq + 4 * (s * t + i) * width, job.q + at, size, e, table, weight, job.d_q_weight + part,
                job.d_q_bias + part, job.eps, scale_of(job), row, job.dq + out + size * h * e,
            )  # fmt: skip
        at, part = size * ((b * t + i) * job.k_row + g * e), 4 * (b * job.key_heads + g) * width
        weight = job.k_weight + 4 * g * width if job.k_weight != 0 else 0
        prepare_backward(
            dk + 4 * i * width, job.k + at, size, e, table, weight, job.d_k_weight + part, job.d_k_bias + part, job.eps,
            LN2, row, job.dk + out + size * g * e,
        )  # fmt: skip
        write_row(job.dv + out + size * g * e, size, e, dv + 4 * i * width, ONE)
