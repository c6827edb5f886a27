"""The layers of one step: new ids at places (row, position) of the cache -> their rows' hidden states.

Ids of many rows, one each, are a step of decoding; many ids of one row are a prompt being read; any mixture of both is
the same work. It is cut into phases, a phase for each product and for what lies between two of them: PHASES of each
layer. A phase is blocks that can be done at once, in any order, by anybody; team.py says who does which.

Activations are rows of float32, filled up with zeros to whole registers; see memory.py for m and the letters.
"""

import math
from functools import cache

import numpy as np
from numba import types

from nanochameleon.generation.cpu.matmul import call_matmul
from nanochameleon.generation.cpu.memory import call_at, inner, map_at, padded
from nanochameleon.kernels.attention.cpu import LOG2E, NEG_INF
from nanochameleon.kernels.block.swiglu_cpu import sigmoid
from nanochameleon.kernels.cpu.exp2 import exp2
from nanochameleon.kernels.cpu.launch import compiled
from nanochameleon.kernels.cpu.matmul import matmul_add
from nanochameleon.kernels.cpu.simd import (
    ZERO,
    W,
    address,
    blend_first,
    clear,
    count,
    dot_rows,
    hmax,
    hsum,
    instruction,
    load,
    load1,
    load1_int,
    read_row,
    rope,
    splat,
    store,
    store1,
    vmax,
    write_row,
)

ONE = np.float32(1)
FIELDS = 20  # numbers of a layer, at m.layers
WQ, WK, WV, WO, W1, W3, W2 = range(0, 14, 2)  # a matrix and, behind it, its scales
ATTENTION_NORM, FFN_NORM, Q_NORM, K_NORM, KEYS, VALUES = range(14, 20)  # (D'), (groups, 2, E'), (N, G, context, E)
PHASES = 8  # of a layer
PROJECT, REMEMBER, ATTEND, OUT, JOIN, GATE, DOWN, JOIN_AGAIN = range(PHASES)


@inner
def field(m, layer, which):
    return load1_int(m.layers + 8 * (FIELDS * layer + which))


@inner
def row_of(m, i):
    """Of the i-th id in the queue."""
    return load1_int(m.queue + 8 * (m.queue_size + i))


@inner
def position_of(m, i):
    return load1_int(m.queue + 8 * (2 * m.queue_size + i))


@inner
def width(m, n):
    """How many outputs of n a block has: some blocks for each member, whole registers."""
    return max(padded((n + 4 * m.n_threads - 1) // (4 * m.n_threads)), W)


@inner
def outputs(m, phase):
    """Of all products of a phase."""
    if phase == PROJECT:
        return (m.n_heads + 2 * m.kv_heads) * m.head_dim
    return m.ffn_dim if phase == GATE else m.dim


@inner
def pieces(m, phase, n):
    """Of a phase that is no product, with n ids."""
    return n * m.kv_heads if phase in (REMEMBER, ATTEND) else n


@inner
def each_block(m, phase, n):
    """Outputs of a product, or pieces: some blocks for each member, since taking one costs a part of a microsecond."""
    if phase in (REMEMBER, ATTEND, JOIN, JOIN_AGAIN):
        return (pieces(m, phase, n) + 4 * m.n_threads - 1) // (4 * m.n_threads)
    return width(m, outputs(m, phase))


@inner
def blocks(m, phase, n):
    """Of a phase with n ids."""
    whole = pieces(m, phase, n) if phase in (REMEMBER, ATTEND, JOIN, JOIN_AGAIN) else outputs(m, phase)
    each = each_block(m, phase, n)
    return (whole + each - 1) // each


# ---------------------------------------------------------------------------------------------------------------------
# Rows, between two products


@inner
def norm(x, n, weight, eps, out):
    """RMSNorm of one row."""
    factor = splat(np.float32(ONE / math.sqrt(dot_rows(x, x, padded(n)) / np.float32(n) + eps)))
    for i in range(0, n, W):
        store(out + 4 * i, load(x + 4 * i) * factor * load(weight + 4 * i))


@inner
def embed(m, i):
    """Id i's row of x, and what the first product reads."""
    at = 4 * i * padded(m.dim)
    read_row(m.embeddings + 4 * load1_int(m.queue + 8 * i) * m.dim, 4, m.dim, m.x + at)
    if m.pre_norm:
        norm(m.x + at, m.dim, field(m, 0, ATTENTION_NORM), m.eps, m.normed + at)


@inner
def join(m, layer, phase, i, n, scratch):
    """Id i's branch joins x, and what reads x next is made: the next product's input or, at the end, the hidden state
    of id i's row, unless the next of the n ids is of the same row."""
    at = 4 * i * padded(m.dim)
    x, branch, own = m.x + at, m.branch + at, ATTENTION_NORM if phase == JOIN else FFN_NORM
    if not m.pre_norm:
        norm(branch, m.dim, field(m, layer, own), m.eps, branch)
    for d in range(0, m.dim, W):
        store(x + 4 * d, load(x + 4 * d) + load(branch + 4 * d))
    if phase == JOIN_AGAIN and layer + 1 == m.n_layers:
        if i + 1 == n or row_of(m, i + 1) != row_of(m, i):
            norm(x, m.dim, m.norm, m.eps, scratch)
            write_row(m.hidden + 4 * row_of(m, i) * m.dim, 4, m.dim, scratch, ONE)
    elif m.pre_norm:
        follows = field(m, layer, FFN_NORM) if phase == JOIN else field(m, layer + 1, ATTENTION_NORM)
        norm(x, m.dim, follows, m.eps, m.normed + at)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@inner
def cached(m, layer, which, row, g):
    """Where the keys or values of a row and key head begin."""
    return field(m, layer, which) + 4 * (row * m.kv_heads + g) * m.context * m.head_dim


@inner
def projected(m, i, h):
    """Where head h of id i begins among queries, keys and values, which follow each other."""
    return m.qkv + 4 * (i * (m.n_heads + 2 * m.kv_heads) + h) * m.head_dim


@inner
def centre(x, e):
    """One head (E'), in place: mean 0, zeros behind it -> its variance."""
    s = splat(ZERO)
    for d in range(0, e, W):
        s += load(x + 4 * d)
    mean, s = splat(hsum(s) / np.float32(e)), splat(ZERO)
    for d in range(0, e, W):
        y = blend_first(load(x + 4 * d) - mean, e - d, splat(ZERO))
        store(x + 4 * d, y)
        s += y * y
    return hsum(s) / np.float32(e)


@inner
def turned(m, norms, group, source, position, factor, out):
    """Norm and turn of one head -> out (E'), times factor."""
    e, wide = m.head_dim, padded(m.head_dim)
    weight, table = norms + 8 * group * wide, m.freqs_cis + 4 * position * wide
    read_row(source, 4, e, out)
    scale = splat(np.float32(ONE / math.sqrt(centre(out, e) + m.eps)) if m.groups > 0 else ONE)
    for d in range(0, 4 * e, 4 * W):
        y = load(out + d)
        if m.groups > 0:
            y = y * scale * load(weight + d) + load(weight + 4 * wide + d)
        store(out + d, rope(y, load(table + d)) * splat(factor))


@inner
def remember(m, layer, i, g, scratch):
    """Keys and values of id i and key head g go into the cache."""
    row, position, at = row_of(m, i), position_of(m, i), 4 * position_of(m, i) * m.head_dim
    group = g * m.groups // m.kv_heads
    turned(m, field(m, layer, K_NORM), group, projected(m, i, m.n_heads + g), position, ONE, scratch)
    write_row(cached(m, layer, KEYS, row, g) + at, 4, m.head_dim, scratch, ONE)
    read_row(projected(m, i, m.n_heads + m.kv_heads + g), 4, m.head_dim, scratch)
    write_row(cached(m, layer, VALUES, row, g) + at, 4, m.head_dim, scratch, ONE)


@inner
def soften(scores, n):
    """n scores, as powers of two -> weights 2^(score - largest), zeros up to the next whole register -> their sum."""
    most, s = splat(NEG_INF), splat(ZERO)
    for t in range(0, n, W):
        most = vmax(blend_first(load(scores + 4 * t), n - t, splat(NEG_INF)), most)
    most = splat(hmax(most))
    for t in range(0, n, W):
        x = blend_first(exp2(load(scores + 4 * t) - most), n - t, splat(ZERO))
        store(scores + 4 * t, x)
        s += x
    return hsum(s)


@inner
def times_values(weights, across, heads, n, values, e, out):
    """out (heads, E') = weights (heads, n) times values (n, E)."""
    wide, whole = padded(e), e // W * W
    clear(out, heads * wide)
    if whole > 0:
        matmul_add(heads, whole, weights, across, 1, values, e, out, wide, n)
    for h in range(heads):
        for d in range(whole, e):
            s = ZERO
            for t in range(n):
                s += load1(weights + 4 * (h * across + t)) * load1(values + 4 * (t * e + d))
            store1(out + 4 * (h * wide + d), s)


@inner
def attend(m, layer, i, g, scratch):
    """The query heads of id i that share key head g, over all ids up to its own."""
    e, wide, each = m.head_dim, padded(m.head_dim), m.n_heads // m.kv_heads
    row, n = row_of(m, i), position_of(m, i) + 1
    across, out, scores = padded(n), scratch + 4 * each * wide, scratch + 8 * each * wide
    factor = LOG2E / np.float32(math.sqrt(np.float32(e)))
    for h in range(each):
        group = (g * each + h) * m.groups // m.n_heads
        source = projected(m, i, g * each + h)
        turned(m, field(m, layer, Q_NORM), group, source, n - 1, factor, scratch + 4 * h * wide)
    call_matmul(m.matmul_fp32, scratch, each, wide, cached(m, layer, KEYS, row, g), e, 0, 0, n, scores, across)
    for h in range(each):
        store1(scratch + 4 * h, ONE / soften(scores + 4 * h * across, n))  # over queries that are no longer needed
    times_values(scores, across, each, n, cached(m, layer, VALUES, row, g), e, out)
    for h in range(each):
        to = m.heads + 4 * (i * m.n_heads + g * each + h) * e
        write_row(to, 4, e, out + 4 * h * wide, load1(scratch + 4 * h))


# ---------------------------------------------------------------------------------------------------------------------
# Products


@inner
def part(m, layer, which, x, across, k, n, start, count, first, last, out, across_out):
    """Of a matrix whose outputs are start .. start + count - 1 among several, those among first .. last - 1."""
    low, high = max(first - start, 0), min(last - start, count)
    if low < high:
        w, scale = field(m, layer, which), field(m, layer, which + 1)
        call_matmul(m.matmul, x, n, across, w, k, scale, low, high, out + 4 * start, across_out)


@inner
def multiply(m, layer, phase, n, first, last):
    """Outputs first .. last - 1 of a phase, for n ids."""
    x, dim, ffn, heads = m.normed if m.pre_norm else m.x, padded(m.dim), padded(m.ffn_dim), m.n_heads * m.head_dim
    if phase == PROJECT:  # one after the other
        keys, all_heads = m.kv_heads * m.head_dim, outputs(m, PROJECT)
        part(m, layer, WQ, x, dim, m.dim, n, 0, heads, first, last, m.qkv, all_heads)
        part(m, layer, WK, x, dim, m.dim, n, heads, keys, first, last, m.qkv, all_heads)
        part(m, layer, WV, x, dim, m.dim, n, heads + keys, keys, first, last, m.qkv, all_heads)
    elif phase == OUT:
        part(m, layer, WO, m.heads, heads, heads, n, 0, m.dim, first, last, m.branch, dim)
    elif phase == DOWN:
        part(m, layer, W2, m.up, ffn, m.ffn_dim, n, 0, m.dim, first, last, m.branch, dim)
    else:  # side by side: silu(w1 x) * w3 x
        part(m, layer, W1, x, dim, m.dim, n, 0, m.ffn_dim, first, last, m.up, ffn)
        part(m, layer, W3, x, dim, m.dim, n, 0, m.ffn_dim, first, last, m.gate, ffn)
        for at in range(n):
            for f in range(first, last, W):
                up, gate = m.up + 4 * (at * ffn + f), m.gate + 4 * (at * ffn + f)
                store(up, load(up) * sigmoid(load(up)) * load(gate))


def do_block(where, layer, phase, block, n, scratch):
    """One block of a phase with n ids; `where` m lies."""
    m = map_at(where)
    each = each_block(m, phase, n)
    first, last = block * each, (block + 1) * each
    if phase in (REMEMBER, ATTEND, JOIN, JOIN_AGAIN):
        for piece in range(first, min(last, pieces(m, phase, n))):
            if phase == REMEMBER:
                remember(m, layer, piece // m.kv_heads, piece % m.kv_heads, scratch)
            elif phase == ATTEND:
                attend(m, layer, piece // m.kv_heads, piece % m.kv_heads, scratch)
            else:
                join(m, layer, phase, piece, n, scratch)
    else:
        multiply(m, layer, phase, n, first, min(last, outputs(m, phase)))


@cache
def do_block_address() -> int:
    return compiled(do_block, 6).address


@instruction(types.void, address, address, count, count, count, count, address)
def call_do_block(b, function, where, layer, phase, block, n, scratch):
    call_at(b, function, where, layer, phase, block, n, scratch)
