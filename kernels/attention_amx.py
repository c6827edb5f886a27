"""Attention in bfloat16 on tiles (amx.py): the same op as attention_numba.py, which is to be read first.

Products cost a sixteenth here, so everything is arranged for what is left, the passes over scores:

    scores lie as (keys, queries)    a query is a lane: its largest score, its sum, log Z and D are registers, and
                                     nothing is ever added up across lanes
    of keys everything is an `a`     rows, or rows of the transpose, which a tile reads from any position on: runs of
                                     documents may begin anywhere, and nothing is packed twice
    of queries everything is a `b`   pairs, made once for each tile of queries, the outer loop
    weights leave a pass as both     rows for sums over queries, pairs for sums over keys

Forward, for 32 queries and 32 keys at a time (P are weights):

    S = K Q^T            a: rows of keys      b: words of queries, transposed
    P = 2^(S - shift)
    O^T += V^T P         a: rows of V^T       b: pairs of P

Backward, with dS = P * (dP - D):

    S = K Q^T, dP = V dO^T,   dV += P dO,   dK += dS Q,   dQ^T += K^T dS

Operands are rounded to bfloat16: prepared queries and keys, values, weights, dO and dS, as FlashAttention has them on
GPUs; sums, powers and the norms' gradients are float32. A weight of 0 times NaN is NaN: where a value has diverged, up
to 31 positions before it see that, too.
"""

import math
from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from nanochameleon.kernels.amx import (
    BLOCK,
    between,
    block_product,
    block_product_add,
    power,
    release_tiles,
    rounded,
    store_pairs,
    store_row,
    take_tiles,
)
from nanochameleon.kernels.attention_numba import (
    BOUND,
    LEAST,
    LN2,
    Job,
    end_of_run,
    key_norm,
    query_norm,
    read_job,
    rows_of,
    same_document,
    score_scale,
)
from nanochameleon.kernels.attention_rows_numba import (
    ONE,
    block_floats,
    prepare,
    prepare_backward,
    read,
    row_products,
)
from nanochameleon.kernels.launch import kernel
from nanochameleon.kernels.simd import (
    ZERO,
    W,
    clear,
    larger,
    load,
    njit,
    peek,
    peek_int,
    poke,
    poke_int,
    splat,
    store,
    transpose,
    write_row,
)

LANES = BLOCK  # a head's numbers are rounded up to this many
ROW = 4 * BLOCK  # bytes of a row of scores, or of pairs


class Places(NamedTuple):
    """Addresses in a thread's scratch. Keys first, of all positions; then a tile of queries; then a block of scores."""

    k: int  # (P, width) bfloat16, P = padded(t)
    v: int
    t: int  # (width, P): V transposed in the forward pass, K in the backward pass
    dk: int  # (P, width) float32
    dv: int
    ends: int  # (t,) int64: where a run of one document ends, for positions where one begins
    x: int  # (32, width) float32
    rows: int  # (32, width) bfloat16
    q: int  # (width / 2, 32) words: transposed, a product's b
    q_pairs: int  # (16, width) words
    d_out: int
    d_out_pairs: int
    sums: int  # (width, 32) float32: out or dq, transposed
    scores: int  # (32 keys, 32 queries) float32
    dp: int
    weights: int  # (32, 32) bfloat16
    ds: int
    pairs: int  # (16, 32) words, of weights in the forward pass, of ds in the backward pass
    shift: int  # (32,) float32, as all that follows
    total: int
    delta: int
    block: int
    end: int


@register_jitable
def padded(t):
    """Positions that there is memory for: a block of keys may begin at any of t."""
    return (t // BLOCK + 2) * BLOCK


@register_jitable
def places(p, t, width):
    keys, tile, square = 2 * padded(t) * width, 2 * BLOCK * width, 2 * BLOCK * BLOCK
    dk = p + 3 * keys
    ends = dk + 4 * keys
    x = ends + 8 * padded(t)
    q = x + 3 * tile
    sums = q + 4 * tile
    s = sums + 2 * tile
    shift = s + 7 * square
    block = shift + 3 * ROW
    return Places(
        p, p + keys, p + 2 * keys, dk, dk + 2 * keys, ends, x, x + 2 * tile, q, q + tile, q + 2 * tile, q + 3 * tile,
        sums, s, s + 2 * square, s + 4 * square, s + 5 * square, s + 6 * square, shift, shift + ROW, shift + 2 * ROW,
        block, block + 4 * block_floats(width),
    )  # fmt: skip


def scratch_floats(job: Job, backward: bool) -> int:
    return places(0, job.t, job.width).end // 4


# ---------------------------------------------------------------------------------------------------------------------
# Rows -> what tiles take


@njit
def transpose_all(source, rows, columns, lds, target, ldt):
    """Words, (rows, columns) -> (columns, rows)."""
    for i in range(0, rows, W):
        for j in range(0, columns, W):
            transpose(source + 4 * (i * lds + j), lds, target + 4 * (j * ldt + i), ldt)


@njit
def to_rows(x, width, out):
    for at in range(0, BLOCK * width, 2 * W):
        store_row(out + 2 * at, load(x + 4 * at), load(x + 4 * (at + W)))


@njit
def to_pairs(x, width, out):
    for r in range(0, BLOCK, 2):
        for i in range(0, width, W):
            at = x + 4 * (r * width + i)
            store_pairs(out + 4 * (r // 2 * width + i), load(at), load(at + 4 * width))


@njit
def read_block(rows, i, n, width, x):
    """Positions [i, i + n) of rows as they are; zeros up to BLOCK."""
    clear(x + 4 * n * width, (BLOCK - n) * width)
    for r in range(n):
        read(rows, i + r, width, x + 4 * r * width)


@njit
def prepare_block(job, b, rows, i, n, norm, factor, at):
    """The same, normed and turned; returns the largest square of a length."""
    most, table = ZERO, job.table + 4 * b * job.t * job.width
    clear(at.x + 4 * n * job.width, (BLOCK - n) * job.width)
    for r in range(0, n, W):
        x = at.x + 4 * r * job.width
        most = max(most, prepare(rows, i + r, min(W, n - r), job.width, table, norm, factor, x, at.block))
    return most


@njit
def transpose_keys(job, i, at):
    """at.x -> columns [i, i + BLOCK) of at.t, by way of pairs."""
    words = padded(job.t) // 2
    to_pairs(at.x, job.width, at.q_pairs)
    transpose_all(at.q_pairs, BLOCK // 2, job.width, job.width, at.t + 2 * i, words)


@njit
def prepare_keys(job, b, g, at, backward):
    """Keys and values of one head; one of them transposed, too. Returns the largest square of a key's length."""
    keys, values = rows_of(job, job.k, job.k_row, b, g), rows_of(job, job.v, job.v_row, b, g)
    norm, most = key_norm(job, b, g), ZERO
    for i in range(0, padded(job.t), BLOCK):
        n, here = max(0, min(BLOCK, job.t - i)), 2 * i * job.width
        most = max(most, prepare_block(job, b, keys, i, n, norm, ONE, at))
        to_rows(at.x, job.width, at.k + here)
        if backward:
            transpose_keys(job, i, at)
        read_block(values, i, n, job.width, at.x)
        if backward:
            to_rows(at.x, job.width, at.v + here)
        else:
            transpose_keys(job, i, at)
    return most


@njit
def to_words(job, at, out):
    """at.x as a product's b, for sums along its rows."""
    to_rows(at.x, job.width, at.rows)
    transpose_all(at.rows, BLOCK, job.width // 2, job.width // 2, out, BLOCK)


@njit
def prepare_queries(job, b, h, i, n, at):
    rows = rows_of(job, job.q, job.q_row, b, h)
    most = prepare_block(job, b, rows, i, n, query_norm(job, b, h), score_scale(job), at)
    to_words(job, at, at.q)
    return most


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom


@njit
def find_runs(docs, t, ends):
    i = 0
    while i < t:
        end = end_of_run(docs, i, t)
        poke_int(ends + 8 * i, end)
        i = end


@njit
def query_tiles(ends, t):
    """Yields (start, i, n): queries [i, i + n) of the run that begins at start."""
    start = 0
    while start < t:
        end = peek_int(ends + 8 * start)
        for i in range(start, end, BLOCK):
            yield start, i, min(BLOCK, end - i)
        start = end


@njit
def key_blocks(docs, ends, start, end):
    """Yields (j, n): keys [j, j + n) before `end` of the runs of that run's document."""
    run = 0
    while run <= start:
        stop = min(peek_int(ends + 8 * run), end)
        if same_document(docs, run, start):
            for j in range(run, stop, BLOCK):
                yield j, min(BLOCK, stop - j)
        run = stop


# ---------------------------------------------------------------------------------------------------------------------
# Passes over a block of scores. `ahead` = j - i: key c is seen by the queries from lane ahead + c on, if c < nk


@njit
def whole(ahead, nk, nq):
    """Everybody sees everything."""
    return ahead + BLOCK <= 1 and nk == BLOCK and nq == BLOCK


@njit
def first_lane(ahead, c, nk):
    return ahead + c if c < nk else BLOCK


@njit
def raise_shift(s, ahead, nk, nq, shift):
    """shift = max(shift, the largest score that each query sees)."""
    for lane in range(0, BLOCK, W):
        m = load(shift + 4 * lane)
        for c in range(nk):
            m = larger(between(load(s + ROW * c + 4 * lane), ahead + c - lane, nq - lane, m), m)
        store(shift + 4 * lane, m)


@njit
def weigh(at, ahead, nk, nq):
    """at.pairs = 2^(scores - shift) where seen, else 0. at.total += their sums over keys, for log Z; at.delta +=
    those of the rounded ones, which divide the output: where one key is all there is, the output is its value."""
    everything = whole(ahead, nk, nq)
    for lane in range(0, BLOCK, W):
        shift, total, seen = load(at.shift + 4 * lane), load(at.total + 4 * lane), load(at.delta + 4 * lane)
        for c in range(0, BLOCK, 2):
            s = at.scores + ROW * c + 4 * lane
            x, y = power(load(s) - shift), power(load(s + ROW) - shift)
            if not everything:
                x = between(x, first_lane(ahead, c, nk) - lane, nq - lane, splat(ZERO))
                y = between(y, first_lane(ahead, c + 1, nk) - lane, nq - lane, splat(ZERO))
            total += x + y
            seen += rounded(x) + rounded(y)
            store_pairs(at.pairs + ROW * (c // 2) + 4 * lane, x, y)
        store(at.total + 4 * lane, total)
        store(at.delta + 4 * lane, seen)


@njit
def weight_and_gradient(at, c, lane, everything, first, nq):
    """2^(score - shift) and that times (dp - delta), of key c and the queries from `lane` on."""
    here = ROW * c + 4 * lane
    w = power(load(at.scores + here) - load(at.shift + 4 * lane))
    ds = w * (load(at.dp + here) - load(at.delta + 4 * lane))
    if not everything:
        w = between(w, first - lane, nq - lane, splat(ZERO))
        ds = between(ds, first - lane, nq - lane, splat(ZERO))
    return w, ds


@njit
def weigh_backward(at, ahead, nk, nq):
    """at.weights, at.ds and its pairs."""
    everything = whole(ahead, nk, nq)
    for c in range(0, BLOCK, 2):
        low, high = first_lane(ahead, c, nk), first_lane(ahead, c + 1, nk)
        w0, ds0 = weight_and_gradient(at, c, 0, everything, low, nq)
        w1, ds1 = weight_and_gradient(at, c, W, everything, low, nq)
        w2, ds2 = weight_and_gradient(at, c + 1, 0, everything, high, nq)
        w3, ds3 = weight_and_gradient(at, c + 1, W, everything, high, nq)
        row = ROW // 2 * c
        store_row(at.weights + row, w0, w1)
        store_row(at.weights + row + ROW // 2, w2, w3)
        store_row(at.ds + row, ds0, ds1)
        store_row(at.ds + row + ROW // 2, ds2, ds3)
        store_pairs(at.pairs + row, ds0, ds2)
        store_pairs(at.pairs + row + 4 * W, ds1, ds3)


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@njit
def score(job, j, at):
    block_product(at.k + 2 * j * job.width, 2 * job.width, at.q, ROW, at.scores, ROW, job.width)


@njit
def add_to_queries(job, j, at):
    """at.sums += the transposed rows of keys [j, j + BLOCK) times at.pairs."""
    row = 2 * padded(job.t)
    for e in range(0, job.width, BLOCK):
        block_product_add(at.t + row * e + 2 * j, row, at.pairs, ROW, at.sums + ROW * e, ROW, BLOCK)


@njit
def find_shifts(job, docs, start, i, nq, bounded, at):
    """0 where no score can overflow, else the largest score of each query, by products of its own."""
    for lane in range(0, BLOCK, W):
        store(at.shift + 4 * lane, splat(ZERO if bounded else LEAST))
    if not bounded:
        for j, nk in key_blocks(docs, at.ends, start, i + nq):
            score(job, j, at)
            raise_shift(at.scores, j - i, nk, nq, at.shift)


@njit
def write_out(job, b, h, i, nq, at):
    transpose_all(at.sums, job.width, BLOCK, BLOCK, at.x, job.width)
    for r in range(nq):
        lse = job.lse + 4 * ((b * job.heads + h) * job.t + i + r)
        poke(lse, peek(at.shift + 4 * r) + np.float32(math.log2(peek(at.total + 4 * r))))
        target = job.out + job.size * (((b * job.t + i + r) * job.heads + h) * job.e)
        write_row(target, job.size, job.e, at.x + 4 * r * job.width, ONE / peek(at.delta + 4 * r))


@kernel
def forward(job, part, first_task, last_task, scratch):
    """out and lse of tasks [first_task, last_task), each a batch row and a key head."""
    job = read_job(job)
    t, shared, at = job.t, job.heads // job.key_heads, places(scratch, job.t, job.width)
    take_tiles()
    for task in range(first_task, last_task):
        b, g = task // job.key_heads, task % job.key_heads
        docs = job.docs + 8 * b * t if job.docs != 0 else 0
        find_runs(docs, t, at.ends)
        longest_k = prepare_keys(job, b, g, at, False)
        for h in range(g * shared, (g + 1) * shared):
            for start, i, nq in query_tiles(at.ends, t):
                longest_q = prepare_queries(job, b, h, i, nq, at)
                find_shifts(job, docs, start, i, nq, longest_k * longest_q < BOUND * BOUND, at)
                clear(at.sums, job.width * BLOCK)
                clear(at.total, 2 * BLOCK)  # and of rounded weights, in the place of delta
                for j, nk in key_blocks(docs, at.ends, start, i + nq):
                    score(job, j, at)
                    weigh(at, j - i, nk, nq)
                    add_to_queries(job, j, at)
                write_out(job, b, h, i, nq, at)
    release_tiles()


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@njit
def read_gradient(job, b, h, i, n, at):
    """The gradient of the output as words and pairs, delta its products with the output, and log Z."""
    rows, out = rows_of(job, job.d_out, job.heads * job.e, b, h), rows_of(job, job.out, job.heads * job.e, b, h)
    read_block(rows, i, n, job.width, at.x)
    for r in range(0, n, W):
        x = at.x + 4 * r * job.width
        row_products(x, out, i + r, min(W, n - r), job.width, at.delta + 4 * r, at.block)
    for r in range(n):
        poke(at.shift + 4 * r, peek(job.lse + 4 * ((b * job.heads + h) * job.t + i + r)))
    to_words(job, at, at.d_out)
    to_pairs(at.x, job.width, at.d_out_pairs)


@njit
def add_to_keys(job, j, a, pairs, sums, at):
    """Rows [j, j + BLOCK) of sums += a times pairs of queries."""
    for e in range(0, job.width, BLOCK):
        here = sums + 4 * (j * job.width + e)
        block_product_add(a, ROW // 2, pairs + 4 * e, 4 * job.width, here, 4 * job.width, BLOCK)


@njit
def write_gradient(job, b, p, row, d, h, i, n, norm, factor, x, at):
    """The gradient x of n prepared rows -> that of the rows themselves, for the tensor at p, in the one at d."""
    rows, target, table = rows_of(job, p, row, b, h), rows_of(job, d, job.d_row, b, h), 4 * b * job.t * job.width
    for r in range(0, n, W):
        dy, some = x + 4 * r * job.width, min(W, n - r)
        prepare_backward(dy, rows, i + r, some, job.width, job.table + table, norm, factor, target, at.block)


@njit
def write_key_gradients(job, b, g, at):
    write_gradient(job, b, job.k, job.k_row, job.dk, g, 0, job.t, key_norm(job, b, g), LN2, at.dk, at)
    target = rows_of(job, job.dv, job.d_row, b, g)
    for i in range(job.t):
        write_row(target.p + i * target.step, job.size, job.e, at.dv + 4 * i * job.width, ONE)


@kernel
def backward(job, part, first_task, last_task, scratch):
    """dq, dk, dv and each head's share of the norms' gradients (which start as zeros)."""
    job = read_job(job)
    t, width, shared, at = job.t, job.width, job.heads // job.key_heads, places(scratch, job.t, job.width)
    factor = score_scale(job) * LN2
    take_tiles()
    for task in range(first_task, last_task):
        b, g = task // job.key_heads, task % job.key_heads
        docs = job.docs + 8 * b * t if job.docs != 0 else 0
        find_runs(docs, t, at.ends)
        prepare_keys(job, b, g, at, True)
        clear(at.dk, 2 * padded(t) * width)  # and dv
        for h in range(g * shared, (g + 1) * shared):
            for start, i, nq in query_tiles(at.ends, t):
                read_gradient(job, b, h, i, nq, at)
                prepare_queries(job, b, h, i, nq, at)
                to_pairs(at.x, width, at.q_pairs)
                clear(at.sums, width * BLOCK)
                for j, nk in key_blocks(docs, at.ends, start, i + nq):
                    score(job, j, at)
                    block_product(at.v + 2 * j * width, 2 * width, at.d_out, ROW, at.dp, ROW, width)
                    weigh_backward(at, j - i, nk, nq)
                    add_to_keys(job, j, at.weights, at.d_out_pairs, at.dv, at)
                    add_to_keys(job, j, at.ds, at.q_pairs, at.dk, at)
                    add_to_queries(job, j, at)
                transpose_all(at.sums, width, BLOCK, BLOCK, at.x, width)
                norm = query_norm(job, b, h)
                write_gradient(job, b, job.q, job.q_row, job.dq, h, i, nq, norm, factor, at.x, at)
        write_key_gradients(job, b, g, at)
    release_tiles()
