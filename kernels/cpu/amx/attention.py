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

from nanochameleon.kernels.attention.cpu import (
    LN2,
    MAX_SCORE,
    NEG_INF,
    KernelArgs,
    end_of_run,
    key_norm,
    query_norm,
    rows_of,
    same_document,
    score_scale,
    unpack_args,
)
from nanochameleon.kernels.attention.qknorm_rope_cpu import ONE
from nanochameleon.kernels.cpu.amx.attention_lanes import (
    ROW,
    Lanes,
    add_sums,
    fetch_rows,
    find_moments,
    give_rows,
    products_of_rows,
    qknorm_rope,
    qknorm_rope_backward,
    take_words,
    to_halves,
    to_pairs,
    to_rows,
    transpose_all,
    transpose_cos_sin,
)
from nanochameleon.kernels.cpu.amx.tiles import (
    BLOCK,
    SQUARE,
    between,
    copy_block,
    release_tiles,
    rounded,
    store_pairs,
    store_row,
    take_tiles,
    tile_matmul,
    tile_matmul_add,
)
from nanochameleon.kernels.cpu.exp2 import exp2_bf16
from nanochameleon.kernels.cpu.launch import kernel
from nanochameleon.kernels.cpu.simd import (
    ZERO,
    W,
    clear,
    load,
    load1,
    load1_int,
    njit,
    splat,
    store,
    store1,
    store1_int,
    vdiv,
    vmax,
    write_row,
)

LANES = BLOCK  # a head's numbers are rounded up to this many


class Places(NamedTuple):
    """Addresses in a thread's scratch. Keys first, of all positions; then a tile of queries; then a block of scores.
    What words, halves and pairs are says attention_lanes_amx.py."""

    k: int  # (P, width) bfloat16, P = padded(t)
    v: int
    t: int  # (width, P): V transposed in the forward pass, K in the backward pass
    dk: int  # (P, width) float32
    dv: int
    table: int  # (width, P) float32
    ends: int  # (t,) int64: where a run of one document ends, for positions where one begins
    sums: int  # (width, 32) float32: out or dq, transposed
    x: int  # words of rows as they are
    y: int  # and of what comes out
    q: int  # words of prepared queries
    q_pairs: int
    d_out: int  # words
    d_out_pairs: int
    halves: int
    norm: int  # (2 width, W) float32
    scores: int  # (32 keys, 32 queries) float32
    dp: int
    weights: int  # (32, 32) bfloat16
    ds: int
    pairs: int  # (16, 32) words, of weights in the forward pass, of ds in the backward pass
    spare: int
    shift: int  # (32,) float32, as all that follows
    total: int
    delta: int
    mean: int
    factor: int
    end: int


@register_jitable
def padded(t):
    """Positions that there is memory for: a block of keys may begin at any of t."""
    return (t // BLOCK + 2) * BLOCK


@register_jitable
def places(p, t, width):
    keys, words = 2 * padded(t) * width, 2 * BLOCK * width
    dk = p + 3 * keys
    table = dk + 4 * keys
    ends = table + 2 * keys
    sums = ends + 8 * padded(t)
    x = sums + 2 * words
    norm = x + 7 * words
    s = norm + 8 * W * width
    shift = s + 8 * SQUARE
    return Places(
        p, p + keys, p + 2 * keys, dk, dk + 2 * keys, table, ends, sums, x, x + words, x + 2 * words, x + 3 * words,
        x + 4 * words, x + 5 * words, x + 6 * words, norm, s, s + 2 * SQUARE, s + 4 * SQUARE, s + 5 * SQUARE,
        s + 6 * SQUARE, s + 7 * SQUARE, shift, shift + ROW, shift + 2 * ROW, shift + 3 * ROW, shift + 4 * ROW,
        shift + 5 * ROW,
    )  # fmt: skip


@register_jitable
def lanes_of(job, at):
    return Lanes(job.width, job.e, at.table, 4 * padded(job.t), at.mean, at.factor, at.norm, at.spare)


def scratch_floats(job: KernelArgs, backward: bool) -> int:
    return places(0, job.t, job.width).end // 4


# ---------------------------------------------------------------------------------------------------------------------
# Rows -> what tiles take


@njit
def begin(job, b, at):
    """What a task needs to know of its row of the batch; returns its documents."""
    docs = job.docs + 8 * b * job.t if job.docs != 0 else 0
    find_runs(docs, job.t, at.ends)
    transpose_cos_sin(job.table + 4 * b * job.t * job.width, job.t, job.width, at.table, 4 * padded(job.t))
    return docs


@njit
def prepare_keys(job, b, g, at, backward):
    """Keys and values of one head; one of them transposed, too. Returns the largest square of a key's length."""
    keys, values = rows_of(job, job.k, job.k_row, b, g), rows_of(job, job.v, job.v_row, b, g)
    norm, lanes, most = key_norm(job, b, g), lanes_of(job, at), ZERO
    for i in range(0, padded(job.t), BLOCK):
        n, here, across = max(0, min(BLOCK, job.t - i)), 2 * i * job.width, at.t + 2 * i
        fetch_rows(keys, i + BLOCK, BLOCK)
        fetch_rows(values, i, n)
        take_words(keys, i, n, lanes, at.x)
        most = max(most, qknorm_rope(at.x, i, norm, ONE, lanes, at.y))
        to_rows(at.y, job.width, at.k + here)
        if backward:
            to_halves(at.y, job.width, across, 2 * padded(job.t))
            clear(at.v + here, BLOCK * job.width // 2)
            for c in range(0, job.width, BLOCK):
                p, target = values.p + i * values.step + 2 * c, at.v + here + 2 * c
                copy_block(p, values.step, n, job.e - c, target, 2 * job.width)
        else:
            take_words(values, i, n, lanes, at.x)
            to_halves(at.x, job.width, across, 2 * padded(job.t))
    return most


@njit
def prepare_queries(job, b, h, i, n, at):
    rows = rows_of(job, job.q, job.q_row, b, h)
    fetch_rows(rows, i + n, BLOCK)
    take_words(rows, i, n, lanes_of(job, at), at.x)
    return qknorm_rope(at.x, i, query_norm(job, b, h), score_scale(job), lanes_of(job, at), at.q)


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom


@njit
def find_runs(docs, t, ends):
    i = 0
    while i < t:
        end = end_of_run(docs, i, t)
        store1_int(ends + 8 * i, end)
        i = end


@njit
def query_tiles(ends, t):
    """Yields (start, i, n): queries [i, i + n) of the run that begins at start."""
    start = 0
    while start < t:
        end = load1_int(ends + 8 * start)
        for i in range(start, end, BLOCK):
            yield start, i, min(BLOCK, end - i)
        start = end


@njit
def key_blocks(docs, ends, start, end):
    """Yields (j, n): keys [j, j + n) before `end` of the runs of that run's document."""
    run = 0
    while run <= start:
        stop = min(load1_int(ends + 8 * run), end)
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
            m = vmax(between(load(s + ROW * c + 4 * lane), ahead + c - lane, nq - lane, m), m)
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
            x, y = exp2_bf16(load(s) - shift), exp2_bf16(load(s + ROW) - shift)
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
    w = exp2_bf16(load(at.scores + here) - load(at.shift + 4 * lane))
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
    tile_matmul(at.k + 2 * j * job.width, 2 * job.width, at.q, ROW, at.scores, ROW, job.width)


@njit
def add_to_queries(job, j, at):
    """at.sums += the transposed rows of keys [j, j + BLOCK) times at.pairs."""
    row = 2 * padded(job.t)
    for e in range(0, job.width, BLOCK):
        tile_matmul_add(at.t + row * e + 2 * j, row, at.pairs, ROW, at.sums + ROW * e, ROW, BLOCK)


@njit
def find_shifts(job, docs, start, i, nq, bounded, at):
    """0 where no score can overflow, else the largest score of each query, by products of its own."""
    for lane in range(0, BLOCK, W):
        store(at.shift + 4 * lane, splat(ZERO if bounded else NEG_INF))
    if not bounded:
        for j, nk in key_blocks(docs, at.ends, start, i + nq):
            score(job, j, at)
            raise_shift(at.scores, j - i, nk, nq, at.shift)


@njit
def write_out(job, b, h, i, nq, at):
    for lane in range(0, 4 * BLOCK, 4 * W):
        share = vdiv(splat(ONE), load(at.delta + lane))
        for e in range(0, job.width, 2):
            p = at.sums + ROW * e + lane
            store_pairs(at.y + ROW // 2 * e + lane, load(p) * share, load(p + ROW) * share)
    give_rows(at.y, lanes_of(job, at), rows_of(job, job.out, job.heads * job.e, b, h), i, nq)
    for r in range(nq):
        lse = job.lse + 4 * ((b * job.heads + h) * job.t + i + r)
        store1(lse, load1(at.shift + 4 * r) + np.float32(math.log2(load1(at.total + 4 * r))))


@kernel
def forward(job, part, first_task, last_task, scratch):
    """out and lse of tasks [first_task, last_task), each a batch row and a key head."""
    job = unpack_args(job)
    t, shared, at = job.t, job.heads // job.key_heads, places(scratch, job.t, job.width)
    take_tiles()
    for task in range(first_task, last_task):
        b, g = task // job.key_heads, task % job.key_heads
        docs = begin(job, b, at)
        longest_k = prepare_keys(job, b, g, at, False)
        for h in range(g * shared, (g + 1) * shared):
            for start, i, nq in query_tiles(at.ends, t):
                fetch_rows(rows_of(job, job.out, job.heads * job.e, b, h), i, nq)
                longest_q = prepare_queries(job, b, h, i, nq, at)
                find_shifts(job, docs, start, i, nq, longest_k * longest_q < MAX_SCORE * MAX_SCORE, at)
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
    fetch_rows(rows, i + n, BLOCK)
    fetch_rows(out, i, n)
    take_words(rows, i, n, lanes_of(job, at), at.d_out)
    take_words(out, i, n, lanes_of(job, at), at.y)
    products_of_rows(at.d_out, at.y, job.width, at.delta)
    to_pairs(at.d_out, job.width, at.halves, at.d_out_pairs)
    for r in range(n):
        store1(at.shift + 4 * r, load1(job.lse + 4 * ((b * job.heads + h) * job.t + i + r)))


@njit
def add_to_keys(job, j, a, pairs, sums, at):
    """Rows [j, j + BLOCK) of sums += a times pairs of queries."""
    for e in range(0, job.width, BLOCK):
        here = sums + 4 * (j * job.width + e)
        tile_matmul_add(a, ROW // 2, pairs + 4 * e, 4 * job.width, here, 4 * job.width, BLOCK)


@njit
def write_queries(job, b, h, i, n, at):
    """dq of a tile whose words `prepare_queries` has left."""
    norm, lanes = query_norm(job, b, h), lanes_of(job, at)
    qknorm_rope_backward(at.sums, at.x, i, norm, score_scale(job) * LN2, lanes, at.y)
    give_rows(at.y, lanes, rows_of(job, job.dq, job.d_row, b, h), i, n)


@njit
def write_keys(job, b, g, at):
    """dk, which needs the rows once more, and dv."""
    norm, lanes, keys = key_norm(job, b, g), lanes_of(job, at), rows_of(job, job.k, job.k_row, b, g)
    dk, dv = rows_of(job, job.dk, job.d_row, b, g), rows_of(job, job.dv, job.d_row, b, g)
    clear(at.norm, 2 * W * job.width)
    for i in range(0, job.t, BLOCK):
        n = min(BLOCK, job.t - i)
        fetch_rows(dk, i, n)
        fetch_rows(dv, i, n)
        fetch_rows(keys, i + BLOCK, BLOCK)
        take_words(keys, i, n, lanes, at.x)
        find_moments(at.x, norm, lanes)
        transpose_all(at.dk + 4 * i * job.width, BLOCK, job.width, job.width, at.sums, BLOCK)
        qknorm_rope_backward(at.sums, at.x, i, norm, LN2, lanes, at.y)
        give_rows(at.y, lanes, dk, i, n)
    add_sums(norm, lanes)
    for i in range(job.t):
        write_row(dv.p + i * dv.step, job.size, job.e, at.dv + 4 * i * job.width, ONE)


@kernel
def backward(job, part, first_task, last_task, scratch):
    """dq, dk, dv and each head's share of the norms' gradients (which start as zeros)."""
    job = unpack_args(job)
    t, width, shared, at = job.t, job.width, job.heads // job.key_heads, places(scratch, job.t, job.width)
    take_tiles()
    for task in range(first_task, last_task):
        b, g = task // job.key_heads, task % job.key_heads
        docs = begin(job, b, at)
        prepare_keys(job, b, g, at, True)
        clear(at.dk, 2 * padded(t) * width)  # and dv
        for h in range(g * shared, (g + 1) * shared):
            clear(at.norm, 2 * W * width)
            for start, i, nq in query_tiles(at.ends, t):
                read_gradient(job, b, h, i, nq, at)
                fetch_rows(rows_of(job, job.dq, job.d_row, b, h), i, nq)
                prepare_queries(job, b, h, i, nq, at)
                to_pairs(at.q, width, at.halves, at.q_pairs)
                clear(at.sums, width * BLOCK)
                for j, nk in key_blocks(docs, at.ends, start, i + nq):
                    score(job, j, at)
                    tile_matmul(at.v + 2 * j * width, 2 * width, at.d_out, ROW, at.dp, ROW, width)
                    weigh_backward(at, j - i, nk, nq)
                    add_to_keys(job, j, at.weights, at.d_out_pairs, at.dv, at)
                    add_to_keys(job, j, at.ds, at.q_pairs, at.dk, at)
                    add_to_queries(job, j, at)
                write_queries(job, b, h, i, nq, at)
            add_sums(query_norm(job, b, h), lanes_of(job, at))
        write_keys(job, b, g, at)
    release_tiles()
