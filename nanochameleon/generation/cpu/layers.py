"""The layers of one compiled step: queued tokens at (slot, position) -> the hidden states of their slots.

One token of each of many slots is a decode step. Many tokens of one slot are prefill. Any mixture is the same work.
The work is cut into phases: PHASES per layer, one for each matmul, and one for the work between two matmuls. A phase is
cut into blocks, which any thread may do, in any order; threads.py shares them out.

Activations are rows of float32, padded with zeros to whole registers. See memory.py for `m` and the letters.
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
FIELDS = 20  # addresses per layer, at m.layers
WQ, WK, WV, WO, W1, W3, W2 = range(0, 14, 2)  # a matrix and, in the next field, its scales
ATTENTION_NORM, FFN_NORM, Q_NORM, K_NORM, KEYS, VALUES = range(14, 20)  # (D'), (groups, 2, E'), (N, G, context, E)
PHASES = 8  # per layer
QKV, WRITE_CACHE, ATTEND, OUT, ADD_ATTENTION, GATE_UP, DOWN, ADD_FFN = range(PHASES)


@inner
def field(m, layer, which):
    return load1_int(m.layers + 8 * (FIELDS * layer + which))


@inner
def slot_of(m, i):
    """The slot of the i-th token in the queue."""
    return load1_int(m.queue + 8 * (m.queue_size + i))


@inner
def position_of(m, i):
    return load1_int(m.queue + 8 * (2 * m.queue_size + i))


@inner
def width(m, n):
    """Outputs per block, out of n: about four blocks per thread, in whole registers."""
    return max(padded((n + 4 * m.n_threads - 1) // (4 * m.n_threads)), W)


@inner
def outputs(m, phase):
    """The number of outputs of a matmul phase."""
    if phase == QKV:
        return (m.n_heads + 2 * m.kv_heads) * m.head_dim
    return m.ffn_dim if phase == GATE_UP else m.dim


@inner
def items(m, phase, n):
    """The number of independent items in a phase that is not a matmul, with n tokens."""
    return n * m.kv_heads if phase in (WRITE_CACHE, ATTEND) else n


@inner
def each_block(m, phase, n):
    """Outputs or items per block: few blocks per thread, since taking one costs a fraction of a microsecond."""
    if phase in (WRITE_CACHE, ATTEND, ADD_ATTENTION, ADD_FFN):
        return (items(m, phase, n) + 4 * m.n_threads - 1) // (4 * m.n_threads)
    return width(m, outputs(m, phase))


@inner
def blocks(m, phase, n):
    """The number of blocks in a phase with n tokens."""
    whole = items(m, phase, n) if phase in (WRITE_CACHE, ATTEND, ADD_ATTENTION, ADD_FFN) else outputs(m, phase)
    each = each_block(m, phase, n)
    return (whole + each - 1) // each


# ---------------------------------------------------------------------------------------------------------------------
# Between two matmuls


@inner
def norm(x, n, weight, eps, out):
    """RMSNorm of one row of n."""
    factor = splat(np.float32(ONE / math.sqrt(dot_rows(x, x, padded(n)) / np.float32(n) + eps)))
    for i in range(0, n, W):
        store(out + 4 * i, load(x + 4 * i) * factor * load(weight + 4 * i))


@inner
def embed(m, i):
    """Token i's row of x, and its norm, which the first matmul reads."""
    at = 4 * i * padded(m.dim)
    read_row(m.embeddings + 4 * load1_int(m.queue + 8 * i) * m.dim, 4, m.dim, m.x + at)
    if m.pre_norm:
        norm(m.x + at, m.dim, field(m, 0, ATTENTION_NORM), m.eps, m.normed + at)


@inner
def add_branch(m, layer, phase, i, n, scratch):
    """Add token i's branch to x, then norm x for the next matmul.

    After the last layer, the norm is the slot's hidden state; only the last of a slot's tokens writes it.
    """
    at = 4 * i * padded(m.dim)
    x, branch, own = m.x + at, m.branch + at, ATTENTION_NORM if phase == ADD_ATTENTION else FFN_NORM
    if not m.pre_norm:
        norm(branch, m.dim, field(m, layer, own), m.eps, branch)
    for d in range(0, m.dim, W):
        store(x + 4 * d, load(x + 4 * d) + load(branch + 4 * d))
    if phase == ADD_FFN and layer + 1 == m.n_layers:
        if i + 1 == n or slot_of(m, i + 1) != slot_of(m, i):
            norm(x, m.dim, m.norm, m.eps, scratch)
            write_row(m.hidden + 4 * slot_of(m, i) * m.dim, 4, m.dim, scratch, ONE)
    elif m.pre_norm:
        follows = field(m, layer, FFN_NORM) if phase == ADD_ATTENTION else field(m, layer + 1, ATTENTION_NORM)
        norm(x, m.dim, follows, m.eps, m.normed + at)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@inner
def cache_at(m, layer, which, slot, g):
    """The address of the keys or values of a slot and key head."""
    return field(m, layer, which) + 4 * (slot * m.kv_heads + g) * m.context * m.head_dim


@inner
def head_at(m, i, h):
    """The address of head h of token i; queries, keys and values follow each other."""
    return m.qkv + 4 * (i * (m.n_heads + 2 * m.kv_heads) + h) * m.head_dim


@inner
def subtract_mean(x, e):
    """Subtract the mean of one head (E') in place, keeping the padding 0 -> its variance."""
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
def norm_and_rope(m, norms, group, source, position, factor, out):
    """QK-norm and RoPE of one head, times factor -> out (E')."""
    e, wide = m.head_dim, padded(m.head_dim)
    weight, table = norms + 8 * group * wide, m.freqs_cis + 4 * position * wide
    read_row(source, 4, e, out)
    scale = splat(np.float32(ONE / math.sqrt(subtract_mean(out, e) + m.eps)) if m.groups > 0 else ONE)
    for d in range(0, 4 * e, 4 * W):
        y = load(out + d)
        if m.groups > 0:
            y = y * scale * load(weight + d) + load(weight + 4 * wide + d)
        store(out + d, rope(y, load(table + d)) * splat(factor))


@inner
def write_cache(m, layer, i, g, scratch):
    """Write the keys and values of token i and key head g into the cache."""
    slot, position = slot_of(m, i), position_of(m, i)
    at = 4 * position * m.head_dim
    group = g * m.groups // m.kv_heads
    norm_and_rope(m, field(m, layer, K_NORM), group, head_at(m, i, m.n_heads + g), position, ONE, scratch)
    write_row(cache_at(m, layer, KEYS, slot, g) + at, 4, m.head_dim, scratch, ONE)
    read_row(head_at(m, i, m.n_heads + m.kv_heads + g), 4, m.head_dim, scratch)
    write_row(cache_at(m, layer, VALUES, slot, g) + at, 4, m.head_dim, scratch, ONE)


@inner
def softmax_weights(scores, n):
    """Replace n scores by 2^(score - largest), and the padding by zeros -> their sum."""
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
def weights_times_values(weights, stride, heads, n, values, e, out):
    """out (heads, E') = weights (heads, n) @ values (n, E)."""
    wide, whole = padded(e), e // W * W
    clear(out, heads * wide)
    if whole > 0:
        matmul_add(heads, whole, weights, stride, 1, values, e, out, wide, n)
    for h in range(heads):
        for d in range(whole, e):
            s = ZERO
            for t in range(n):
                s += load1(weights + 4 * (h * stride + t)) * load1(values + 4 * (t * e + d))
            store1(out + 4 * (h * wide + d), s)


@inner
def attend(m, layer, i, g, scratch):
    """Attention of token i's query heads that share key head g, over all positions up to its own."""
    e, wide, each = m.head_dim, padded(m.head_dim), m.n_heads // m.kv_heads
    slot, n = slot_of(m, i), position_of(m, i) + 1
    stride, out, scores = padded(n), scratch + 4 * each * wide, scratch + 8 * each * wide
    factor = LOG2E / np.float32(math.sqrt(np.float32(e)))
    for h in range(each):
        group = (g * each + h) * m.groups // m.n_heads
        source = head_at(m, i, g * each + h)
        norm_and_rope(m, field(m, layer, Q_NORM), group, source, n - 1, factor, scratch + 4 * h * wide)
    call_matmul(m.matmul_fp32, scratch, each, wide, cache_at(m, layer, KEYS, slot, g), e, 0, 0, n, scores, stride)
    for h in range(each):
        store1(scratch + 4 * h, ONE / softmax_weights(scores + 4 * h * stride, n))  # overwrites queries, which are done
    weights_times_values(scores, stride, each, n, cache_at(m, layer, VALUES, slot, g), e, out)
    for h in range(each):
        to = m.heads + 4 * (i * m.n_heads + g * each + h) * e
        write_row(to, 4, e, out + 4 * h * wide, load1(scratch + 4 * h))


# ---------------------------------------------------------------------------------------------------------------------
# Matmuls


@inner
def part_of_linear(m, layer, which, x, stride, k, n, start, count, first, last, out, out_stride):
    """Those of a phase's outputs first .. last - 1 that are of one matrix, whose own are start .. start + count - 1."""
    low, high = max(first - start, 0), min(last - start, count)
    if low < high:
        w, scale = field(m, layer, which), field(m, layer, which + 1)
        call_matmul(m.matmul, x, n, stride, w, k, scale, low, high, out + 4 * start, out_stride)


@inner
def linears(m, layer, phase, n, first, last):
    """Outputs first .. last - 1 of a matmul phase, for n tokens."""
    x, dim, ffn, heads = m.normed if m.pre_norm else m.x, padded(m.dim), padded(m.ffn_dim), m.n_heads * m.head_dim
    if phase == QKV:  # three matrices, one after the other
        keys, all_heads = m.kv_heads * m.head_dim, outputs(m, QKV)
        part_of_linear(m, layer, WQ, x, dim, m.dim, n, 0, heads, first, last, m.qkv, all_heads)
        part_of_linear(m, layer, WK, x, dim, m.dim, n, heads, keys, first, last, m.qkv, all_heads)
        part_of_linear(m, layer, WV, x, dim, m.dim, n, heads + keys, keys, first, last, m.qkv, all_heads)
    elif phase == OUT:
        part_of_linear(m, layer, WO, m.heads, heads, heads, n, 0, m.dim, first, last, m.branch, dim)
    elif phase == DOWN:
        part_of_linear(m, layer, W2, m.up, ffn, m.ffn_dim, n, 0, m.dim, first, last, m.branch, dim)
    else:  # GATE_UP: silu(w1 x) * w3 x
        part_of_linear(m, layer, W1, x, dim, m.dim, n, 0, m.ffn_dim, first, last, m.up, ffn)
        part_of_linear(m, layer, W3, x, dim, m.dim, n, 0, m.ffn_dim, first, last, m.gate, ffn)
        for at in range(n):
            for f in range(first, last, W):
                up, gate = m.up + 4 * (at * ffn + f), m.gate + 4 * (at * ffn + f)
                store(up, load(up) * sigmoid(load(up)) * load(gate))


def do_block(m_address, layer, phase, block, n, scratch):
    """Do one block of a phase with n tokens."""
    m = map_at(m_address)
    each = each_block(m, phase, n)
    first, last = block * each, (block + 1) * each
    if phase in (WRITE_CACHE, ATTEND, ADD_ATTENTION, ADD_FFN):
        for item in range(first, min(last, items(m, phase, n))):
            if phase == WRITE_CACHE:
                write_cache(m, layer, item // m.kv_heads, item % m.kv_heads, scratch)
            elif phase == ATTEND:
                attend(m, layer, item // m.kv_heads, item % m.kv_heads, scratch)
            else:
                add_branch(m, layer, phase, item, n, scratch)
    else:
        linears(m, layer, phase, n, first, min(last, outputs(m, phase)))


@cache
def do_block_address() -> int:
    return compiled(do_block, 6).address


@instruction(types.void, address, address, count, count, count, count, address)
def call_do_block(b, function, m_address, layer, phase, block, n, scratch):
    call_at(b, function, m_address, layer, phase, block, n, scratch)
