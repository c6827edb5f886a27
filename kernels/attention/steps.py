"""Attention on a CPU, step by step: from plain loops to the shipped kernel, one change a step.

    python kernels/attention/steps.py           check every step against float64, then time it
    python kernels/attention/steps.py --cuda    the steps of steps.cu: on a GPU, or without one in the emulator

step                       what changes
1. attention_loops         the formula as loops: no (T, T) matrix, only the scores of one query
2. attention_online        one pass over the keys: a running maximum and sum take the place of the scores
3. attention_tiles         64 keys at once: one rescale a tile, and an inner loop that vector instructions can run
4. attention_seen_tiles    tiles that a query cannot see are left out
5. attention_gradient      the backward pass as loops
6. the shipped kernel      forward and backward: cpu.py, called as a model calls it

Step 6 adds 2^x as a polynomial (../cpu/exp2.py), registers as values (../cpu/simd.py), and tiles of queries, too, so
that a number in a register is used 4 to 64 times (../cpu/matmul.py). It needs no maximum where norms bound the scores.

Shapes: q, k, v, out (B, T, H, E), already normed and rotated; doc_ids (B, T). Query i sees the keys j <= i of its own
document. The same kind of steps for the loss: ../zloss/steps.py. Not here: QK-norm, RoPE, key heads that are shared.
"""

import math

import numpy as np
from numba import njit

KEYS = 64  # keys of a tile


@njit
def attention_loops(q, k, v, doc_ids, out):
    """Step 1: one query at a time, one key at a time."""
    b_, t_, h_, e_ = q.shape
    scale = 1 / math.sqrt(e_)
    scores = np.empty(t_)
    for b, h, i in np.ndindex(b_, h_, t_):
        # 1. Scores of the keys that query i sees, and the largest of them.
        largest, total = -np.inf, 0.0
        for j in range(i + 1):
            scores[j] = -np.inf
            if doc_ids[b, j] == doc_ids[b, i]:
                scores[j] = 0.0
                for e in range(e_):
                    scores[j] += q[b, i, h, e] * k[b, j, h, e] * scale
                largest = max(largest, scores[j])
        # 2. Softmax weights, less the largest score so that exp cannot overflow, times the values.
        for e in range(e_):
            out[b, i, h, e] = 0
        for j in range(i + 1):
            weight = math.exp(scores[j] - largest)
            total += weight
            for e in range(e_):
                out[b, i, h, e] += weight * v[b, j, h, e]
        # 3. Divide once, at the end.
        for e in range(e_):
            out[b, i, h, e] /= total


@njit
def attention_online(q, k, v, doc_ids, out):
    """Step 2: online softmax. Each key is read once, and no score is kept."""
    b_, t_, h_, e_ = q.shape
    scale = 1 / math.sqrt(e_)
    for b, h, i in np.ndindex(b_, h_, t_):
        largest, total = -np.inf, 0.0  # of the keys read so far
        for e in range(e_):
            out[b, i, h, e] = 0
        for j in range(i + 1):
            if doc_ids[b, j] != doc_ids[b, i]:
                continue
            score = 0.0
            for e in range(e_):
                score += q[b, i, h, e] * k[b, j, h, e] * scale
            # A larger score came: bring what was summed to it, since e^(x - new) = e^(x - old) e^(old - new).
            if score > largest:
                rescale, largest = math.exp(largest - score), score  # for the first key e^(-inf) = 0
                total *= rescale
                for e in range(e_):
                    out[b, i, h, e] *= rescale
            weight = math.exp(score - largest)
            total += weight
            for e in range(e_):
                out[b, i, h, e] += weight * v[b, j, h, e]
        for e in range(e_):
            out[b, i, h, e] /= total


@njit
def attend_to_tile(q, k_columns, v, docs, i, j, scores, stats, out):
    """Add to out (E,) of query i what the keys from j on give it. stats: its maximum and sum so far.

    k_columns (E, N) is the tile of keys transposed, so the inner loop of 1 runs over neighbours in memory and sums
    for N keys at once. No sum in it waits for the one before, so the compiler takes vector instructions.
    """
    e_, n = k_columns.shape
    # 1. N scores at once.
    for x in range(n):
        scores[x] = 0
    for e in range(e_):
        for x in range(n):
            scores[x] += q[e] * k_columns[e, x]
    # 2. Hide what query i does not see, and find the new maximum.
    new = stats[0]
    for x in range(n):
        scores[x] = scores[x] / math.sqrt(e_) if j + x <= i and docs[j + x] == docs[i] else -np.inf
        new = max(new, scores[x])
    if new == -np.inf:
        return  # nothing is seen yet
    # 3. Rescale once a tile, not once a key.
    rescale = math.exp(stats[0] - new)
    stats[0], stats[1] = new, stats[1] * rescale
    for e in range(e_):
        out[e] *= rescale
    # 4. Add weights times values; a hidden key has weight e^(-inf) = 0.
    for x in range(n):
        scores[x] = math.exp(scores[x] - new)
        stats[1] += scores[x]
        for e in range(e_):
            out[e] += scores[x] * v[x, e]


@njit
def attention_tiles(q, k, v, doc_ids, out):
    """Step 3: tiles of keys. Keys are the outer loop, so a tile is transposed once, and all queries read it."""
    b_, t_, h_, e_ = q.shape
    scores, stats = np.empty(KEYS, q.dtype), np.empty((t_, 2), q.dtype)
    for b, h in np.ndindex(b_, h_):
        out[b, :, h], stats[:, 0], stats[:, 1] = 0, -np.inf, 0
        for j in range(0, t_, KEYS):
            end = min(j + KEYS, t_)
            k_columns = np.ascontiguousarray(k[b, j:end, h].T)
            v_tile = np.ascontiguousarray(v[b, j:end, h])
            for i in range(t_):
                attend_to_tile(q[b, i, h], k_columns, v_tile, doc_ids[b], i, j, scores, stats[i], out[b, i, h])
        for i in range(t_):
            out[b, i, h] /= stats[i, 1]


@njit
def attention_seen_tiles(q, k, v, doc_ids, out):
    """Step 4: tiles that nobody sees are left out. Half of the square lies in the future; documents hide more."""
    b_, t_, h_, e_ = q.shape
    scores, stats = np.empty(KEYS, q.dtype), np.empty((t_, 2), q.dtype)
    for b, h in np.ndindex(b_, h_):
        out[b, :, h], stats[:, 0], stats[:, 1] = 0, -np.inf, 0
        for j in range(0, t_, KEYS):
            end = min(j + KEYS, t_)
            k_columns = np.ascontiguousarray(k[b, j:end, h].T)
            v_tile = np.ascontiguousarray(v[b, j:end, h])
            first, last = doc_ids[b, j:end].min(), doc_ids[b, j:end].max()
            for i in range(j, t_):  # queries before j see no key of this tile
                if first <= doc_ids[b, i] <= last:  # nor do those of a document that is not in it
                    attend_to_tile(q[b, i, h], k_columns, v_tile, doc_ids[b], i, j, scores, stats[i], out[b, i, h])
        for i in range(t_):
            out[b, i, h] /= stats[i, 1]


@njit
def softmax_row(q, k, doc_ids, b, h, i, weights):
    """Write the weights of query i over the keys 0 to i, as in step 1."""
    largest, total = -np.inf, 0.0
    for j in range(i + 1):
        weights[j] = -np.inf
        if doc_ids[b, j] == doc_ids[b, i]:
            weights[j] = 0.0
            for e in range(q.shape[3]):
                weights[j] += q[b, i, h, e] * k[b, j, h, e] / math.sqrt(q.shape[3])
            largest = max(largest, weights[j])
    for j in range(i + 1):
        weights[j] = math.exp(weights[j] - largest)
        total += weights[j]
    for j in range(i + 1):
        weights[j] /= total


@njit
def attention_gradient(q, k, v, doc_ids, d_out, dq, dk, dv):
    """Step 5: the gradients of q, k and v, given the gradient of out. All are (B, T, H, E).

    With weights P = softmax(s):   dv_j = sum_i P_ij dO_i,   dP_ij = dO_i . v_j
    A softmax passes on ds_ij = P_ij (dP_ij - D_i), D_i = sum_j P_ij dP_ij, since raising one weight lowers the others.
    From s_ij = q_i . k_j / sqrt(E):   dq_i = sum_j ds_ij k_j / sqrt(E),   dk_j = sum_i ds_ij q_i / sqrt(E)
    """
    b_, t_, h_, e_ = q.shape
    scale = 1 / math.sqrt(e_)
    weights, d_weights = np.empty(t_), np.empty(t_)
    dq[:], dk[:], dv[:] = 0, 0, 0
    for b, h, i in np.ndindex(b_, h_, t_):
        # 1. The weights, made again: cheaper than keeping a (T, T) matrix from the forward pass.
        softmax_row(q, k, doc_ids, b, h, i, weights)
        # 2. dv, dP and D.
        d = 0.0
        for j in range(i + 1):
            d_weight = 0.0
            for e in range(e_):
                dv[b, j, h, e] += weights[j] * d_out[b, i, h, e]
                d_weight += d_out[b, i, h, e] * v[b, j, h, e]
            d_weights[j] = d_weight
            d += weights[j] * d_weight
        # 3. Through the softmax, then to the query and the keys.
        for j in range(i + 1):
            ds = weights[j] * (d_weights[j] - d) * scale
            for e in range(e_):
                dq[b, i, h, e] += ds * k[b, j, h, e]
                dk[b, j, h, e] += ds * q[b, i, h, e]
