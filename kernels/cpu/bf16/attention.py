"""Attention in bfloat16: the same op as attention/cpu.py, which is to be read first, with matmuls of pairs (matmul.py).

Matmuls cost half of float32 ones, or a sixteenth on AMX tiles. So everything is arranged for the passes over scores:

    scores are (keys, queries)       a query is a lane: its largest score, its sum, log Z and D are registers, and
                                     nothing is ever added up across lanes
    keys are operand `a` everywhere  rows, or rows of the transpose, which are read from any position on: runs of
                                     documents may begin anywhere, and nothing is packed twice
    queries are operand `b`          pairs, made once for each tile of queries, the outer loop
    weights leave a pass as both     rows for sums over queries, pairs for sums over keys

Forward, for 32 queries and 32 keys at a time (P are weights):

    S = K Q^T            a: rows of keys      b: words of queries, transposed
    P = 2^(S - shift)
    O^T += V^T P         a: rows of V^T       b: pairs of P

Backward, with dS = P * (dP - D):

    S = K Q^T, dP = V dO^T,   dV += P dO,   dK += dS Q,   dQ^T += K^T dS

Matmul operands are rounded to bfloat16 (normed and rotated queries and keys, values, weights, dO and dS), as in
FlashAttention on GPUs. Sums, powers and the norms' gradients are float32. A weight of 0 times NaN is NaN: where a value
has diverged, up to 31 positions before it see that, too.
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
    end_of_document_run,
    head_rows,
    key_norm,
    query_norm,
    same_document,
    score_scale,
    unpack_args,
)
from nanochameleon.kernels.attention.qknorm_rope_cpu import ONE
from nanochameleon.kernels.cpu.bf16.matmul import STEP, configure, matmul, matmul_add, release
from nanochameleon.kernels.cpu.bf16.pairs import BLOCK, SQUARE, copy_block, store_pairs
from nanochameleon.kernels.cpu.bf16.qknorm_rope import (
    ROW,
    Lanes,
    add_sums,
    fetch_rows,
    load_words,
    mean_and_rstd,
    qknorm_rope,
    qknorm_rope_backward,
    row_dots,
    store_rows,
    to_halves,
    to_pairs,
    to_rows,
    transpose_all,
    transpose_cos_sin,
)
from nanochameleon.kernels.cpu.bf16.scores import raise_shift, weights_backward, weights_forward
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
    write_row,
)

LANES = BLOCK  # a head's numbers are rounded up to this many


class Buffers(NamedTuple):
    """Addresses in a thread's scratch: keys of all positions, then a tile of queries, then a block of scores.

    qknorm_rope.py says what words, halves and pairs are.
    """

    k: int  # (P, width) bfloat16, P = padded(t)
    v: int
    t: int  # (width, P): V transposed in the forward pass, K in the backward pass
    dk: int  # (P, width) float32
    dv: int
    cos_sin: int  # (width, P) float32
    ends: int  # (t,) int64: at the first position of a run, where the run ends
    sums: int  # (width, 32) float32: out or dq, transposed
    x: int  # words of input rows
    y: int  # words of output rows
    q: int  # words of normed and rotated queries
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
    shift: int  # (32,) float32, as all fields below
    total: int
    delta: int
    mean: int
    factor: int
    end: int


@register_jitable
def padded(t):
    """Positions that the buffers hold: a block of keys may begin at any of the t positions."""
    return (t + 2 * BLOCK - 2) // BLOCK * BLOCK


@register_jitable
def depth(args):
    """A head's numbers as matmuls take them."""
    return (args.e + STEP - 1) // STEP * STEP


@register_jitable
def buffers(p, t, width):
    keys, words = 2 * padded(t) * width, 2 * BLOCK * width
    dk = p + 3 * keys
    cos_sin = dk + 4 * keys
    ends = cos_sin + 2 * keys
    sums = ends + 8 * padded(t)
    x = sums + 2 * words
    norm = x + 7 * words
    s = norm + 8 * W * width
    shift = s + 8 * SQUARE
    return Buffers(
        p, p + keys, p + 2 * keys, dk, dk + 2 * keys, cos_sin, ends, sums, x, x + words, x + 2 * words, x + 3 * words,
        x + 4 * words, x + 5 * words, x + 6 * words, norm, s, s + 2 * SQUARE, s + 4 * SQUARE, s + 5 * SQUARE,
        s + 6 * SQUARE, s + 7 * SQUARE, shift, shift + ROW, shift + 2 * ROW, shift + 3 * ROW, shift + 4 * ROW,
        shift + 5 * ROW,
    )  # fmt: skip


@register_jitable
def lanes_of(args, buf):
    return Lanes(
        args.width, depth(args), args.e, buf.cos_sin, 4 * padded(args.t), buf.mean, buf.factor, buf.norm, buf.spare
    )


def scratch_floats(args: KernelArgs, backward: bool) -> int:
    return buffers(0, args.t, args.width).end // 4


# ---------------------------------------------------------------------------------------------------------------------
# Rows -> operands of matmuls


@njit
def start_task(args, b, new_sequence, buf):
    """Find a sequence's runs of documents and transpose its cos_sin; returns the address of its document ids."""
    doc_ids = args.doc_ids + 8 * b * args.t if args.doc_ids != 0 else 0
    if new_sequence:
        cos_sin = args.cos_sin + 4 * b * args.t * args.width
        find_runs(doc_ids, args.t, buf.ends)
        transpose_cos_sin(cos_sin, args.t, args.width, buf.cos_sin, 4 * padded(args.t))
    return doc_ids


@njit
def clear_padding(args, buf, backward):
    """Zeros for the keys of positions that only the buffers have."""
    for i in range((args.t + BLOCK - 1) // BLOCK * BLOCK, padded(args.t), BLOCK):
        clear(buf.k + 2 * i * args.width, BLOCK * args.width // 2)
        for e in range(args.width):
            clear(buf.t + 2 * (e * padded(args.t) + i), W)
        if backward:
            clear(buf.v + 2 * i * args.width, BLOCK * args.width // 2)


@njit
def prepare_keys(args, b, g, buf, backward):
    """Keys and values of one head, and one of the two transposed. Returns the largest squared length of a key."""
    keys, values = head_rows(args, args.k, args.k_row, b, g), head_rows(args, args.v, args.v_row, b, g)
    norm, lanes, most = key_norm(args, b, g), lanes_of(args, buf), ZERO
    clear_padding(args, buf, backward)
    for i in range(0, args.t, BLOCK):
        n, here, across = min(BLOCK, args.t - i), 2 * i * args.width, buf.t + 2 * i
        fetch_rows(keys, i + BLOCK, BLOCK)
        fetch_rows(values, i, n)
        load_words(keys, i, n, lanes, buf.x)
        most = max(most, qknorm_rope(buf.x, i, norm, ONE, lanes, buf.y))
        to_rows(buf.y, args.width, buf.k + here)
        if backward:
            to_halves(buf.y, args.width, across, 2 * padded(args.t))
            clear(buf.v + here, BLOCK * args.width // 2)
            for c in range(0, args.width, BLOCK):
                p, target = values.p + i * values.step + 2 * c, buf.v + here + 2 * c
                copy_block(p, values.step, n, args.e - c, target, 2 * args.width)
        else:
            load_words(values, i, n, lanes, buf.x)
            to_halves(buf.x, args.width, across, 2 * padded(args.t))
    return most


@njit
def prepare_queries(args, b, h, i, n, buf):
    rows = head_rows(args, args.q, args.q_row, b, h)
    fetch_rows(rows, i + n, BLOCK)
    load_words(rows, i, n, lanes_of(args, buf), buf.x)
    return qknorm_rope(buf.x, i, query_norm(args, b, h), score_scale(args), lanes_of(args, buf), buf.q)


# ---------------------------------------------------------------------------------------------------------------------
# Which queries see which keys


@njit
def find_runs(doc_ids, t, ends):
    i = 0
    while i < t:
        end = end_of_document_run(doc_ids, i, t)
        store1_int(ends + 8 * i, end)
        i = end


@njit
def query_tiles(ends, t):
    """Yield (start, i, n): queries [i, i + n) of the run that begins at start."""
    start = 0
    while start < t:
        end = load1_int(ends + 8 * start)
        for i in range(start, end, BLOCK):
            yield start, i, min(BLOCK, end - i)
        start = end


@njit
def key_blocks(doc_ids, ends, start, end):
    """Yield (j, n): keys [j, j + n) before `end`, from all runs of the document of the run that begins at start."""
    run = 0
    while run <= start:
        stop = min(load1_int(ends + 8 * run), end)
        if same_document(doc_ids, run, start):
            for j in range(run, stop, BLOCK):
                yield j, min(BLOCK, stop - j)
        run = stop


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@njit
def compute_scores(args, j, buf):
    matmul(buf.k + 2 * j * args.width, 2 * args.width, buf.q, ROW, buf.scores, ROW, BLOCK, BLOCK, depth(args))


@njit
def add_to_queries(args, j, buf):
    """buf.sums += the transposed rows of keys [j, j + BLOCK) times buf.pairs."""
    row = 2 * padded(args.t)
    matmul_add(buf.t + 2 * j, row, buf.pairs, ROW, buf.sums, ROW, depth(args), BLOCK, BLOCK)


@njit
def find_shifts(args, doc_ids, start, i, nq, bounded, buf):
    """shift = 0 where no score can overflow, else the largest score of each query, by matmuls of its own."""
    for lane in range(0, BLOCK, W):
        store(buf.shift + 4 * lane, splat(ZERO if bounded else NEG_INF))
    if not bounded:
        for j, nk in key_blocks(doc_ids, buf.ends, start, i + nq):
            compute_scores(args, j, buf)
            raise_shift(buf.scores, j - i, nk, nq, buf.shift)


@njit
def write_out(args, b, h, i, nq, buf):
    for lane in range(0, 4 * BLOCK, 4 * W):
        share = vdiv(splat(ONE), load(buf.delta + lane))
        for e in range(0, args.width, 2):
            p = buf.sums + ROW * e + lane
            store_pairs(buf.y + ROW // 2 * e + lane, load(p) * share, load(p + ROW) * share)
    store_rows(buf.y, lanes_of(args, buf), head_rows(args, args.out, args.heads * args.e, b, h), i, nq)
    for r in range(nq):
        lse2 = args.lse2 + 4 * ((b * args.heads + h) * args.t + i + r)
        store1(lse2, load1(buf.shift + 4 * r) + np.float32(math.log2(load1(buf.total + 4 * r))))


@kernel
def forward(args, chunk, first_task, last_task, scratch):
    """out and lse2 of tasks [first_task, last_task), each a sequence and a key head."""
    args = unpack_args(args)
    t, shared, buf = args.t, args.heads // args.key_heads, buffers(scratch, args.t, args.width)
    configure()
    for task in range(first_task, last_task):
        b, g = task // args.key_heads, task % args.key_heads
        doc_ids = start_task(args, b, g == 0 or task == first_task, buf)
        longest_k = prepare_keys(args, b, g, buf, False)
        for h in range(g * shared, (g + 1) * shared):
            for start, i, nq in query_tiles(buf.ends, t):
                fetch_rows(head_rows(args, args.out, args.heads * args.e, b, h), i, nq)
                longest_q = prepare_queries(args, b, h, i, nq, buf)
                find_shifts(args, doc_ids, start, i, nq, longest_k * longest_q < MAX_SCORE * MAX_SCORE, buf)
                clear(buf.sums, args.width * BLOCK)
                clear(buf.total, 2 * BLOCK)  # delta, too: it sums the rounded weights
                for j, nk in key_blocks(doc_ids, buf.ends, start, i + nq):
                    compute_scores(args, j, buf)
                    weights_forward(buf, j - i, nk, nq)
                    add_to_queries(args, j, buf)
                write_out(args, b, h, i, nq, buf)
    release()


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@njit
def read_gradient(args, b, h, i, n, buf):
    """The gradient of the output as words and pairs, delta = its dot products with the output, and lse2."""
    rows, out = (
        head_rows(args, args.d_out, args.heads * args.e, b, h),
        head_rows(args, args.out, args.heads * args.e, b, h),
    )
    fetch_rows(rows, i + n, BLOCK)
    fetch_rows(out, i, n)
    load_words(rows, i, n, lanes_of(args, buf), buf.d_out)
    load_words(out, i, n, lanes_of(args, buf), buf.y)
    row_dots(buf.d_out, buf.y, depth(args), buf.delta)
    to_pairs(buf.d_out, args.width, buf.halves, buf.d_out_pairs)
    for r in range(n):
        store1(buf.shift + 4 * r, load1(args.lse2 + 4 * ((b * args.heads + h) * args.t + i + r)))


@njit
def add_to_keys(args, j, a, pairs, sums, buf):
    """Rows [j, j + BLOCK) of sums += a times pairs of queries."""
    row = 4 * args.width
    matmul_add(a, ROW // 2, pairs, row, sums + row * j, row, BLOCK, depth(args), BLOCK)


@njit
def write_queries(args, b, h, i, n, buf):
    """dq of the tile whose words `prepare_queries` left in buf.x."""
    norm, lanes = query_norm(args, b, h), lanes_of(args, buf)
    qknorm_rope_backward(buf.sums, buf.x, i, norm, score_scale(args) * LN2, lanes, buf.y)
    store_rows(buf.y, lanes, head_rows(args, args.dq, args.d_row, b, h), i, n)


@njit
def write_keys(args, b, g, buf):
    """dk, whose norm needs the input rows once more, and dv."""
    norm, lanes, keys = key_norm(args, b, g), lanes_of(args, buf), head_rows(args, args.k, args.k_row, b, g)
    dk, dv = head_rows(args, args.dk, args.d_row, b, g), head_rows(args, args.dv, args.d_row, b, g)
    clear(buf.norm, 2 * W * args.width)
    for i in range(0, args.t, BLOCK):
        n = min(BLOCK, args.t - i)
        fetch_rows(dk, i, n)
        fetch_rows(dv, i, n)
        fetch_rows(keys, i + BLOCK, BLOCK)
        load_words(keys, i, n, lanes, buf.x)
        mean_and_rstd(buf.x, norm, lanes)
        transpose_all(buf.dk + 4 * i * args.width, BLOCK, args.width, args.width, buf.sums, BLOCK)
        qknorm_rope_backward(buf.sums, buf.x, i, norm, LN2, lanes, buf.y)
        store_rows(buf.y, lanes, dk, i, n)
    add_sums(norm, lanes)
    for i in range(args.t):
        write_row(dv.p + i * dv.step, args.size, args.e, buf.dv + 4 * i * args.width, ONE)


@kernel
def backward(args, chunk, first_task, last_task, scratch):
    """dq, dk, dv, and each sequence's part of the norms' gradients, which start as zeros."""
    args = unpack_args(args)
    t, width, shared, buf = args.t, args.width, args.heads // args.key_heads, buffers(scratch, args.t, args.width)
    configure()
    for task in range(first_task, last_task):
        b, g = task // args.key_heads, task % args.key_heads
        doc_ids = start_task(args, b, g == 0 or task == first_task, buf)
        prepare_keys(args, b, g, buf, True)
        clear(buf.dk, 2 * padded(t) * width)  # and dv
        for h in range(g * shared, (g + 1) * shared):
            clear(buf.norm, 2 * W * width)
            for start, i, nq in query_tiles(buf.ends, t):
                read_gradient(args, b, h, i, nq, buf)
                fetch_rows(head_rows(args, args.dq, args.d_row, b, h), i, nq)
                prepare_queries(args, b, h, i, nq, buf)
                to_pairs(buf.q, width, buf.halves, buf.q_pairs)
                clear(buf.sums, width * BLOCK)
                for j, nk in key_blocks(doc_ids, buf.ends, start, i + nq):
                    compute_scores(args, j, buf)
                    values = buf.v + 2 * j * width
                    matmul(values, 2 * width, buf.d_out, ROW, buf.dp, ROW, BLOCK, BLOCK, depth(args))
                    weights_backward(buf, j - i, nk, nq)
                    add_to_keys(args, j, buf.weights, buf.d_out_pairs, buf.dv, buf)
                    add_to_keys(args, j, buf.ds, buf.q_pairs, buf.dk, buf)
                    add_to_queries(args, j, buf)
                write_queries(args, b, h, i, nq, buf)
            add_sums(query_norm(args, b, h), lanes_of(args, buf))
        write_keys(args, b, g, buf)
    release()
