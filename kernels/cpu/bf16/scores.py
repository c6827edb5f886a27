"""Passes over a block of 32 keys x 32 queries of scores, for attention in bfloat16 (attention.py).

A query is a lane and a key is a row, so nothing is added up across lanes. `ahead` is j - i for the block's first key j
and first query i: queries from lane ahead + c on see key c, if c < nk. buf holds addresses, see attention.Buffers.
"""

from nanochameleon.kernels.cpu.bf16.pairs import BLOCK, between, rounded, store_pairs, store_row
from nanochameleon.kernels.cpu.bf16.qknorm_rope import ROW
from nanochameleon.kernels.cpu.exp2 import exp2_bf16
from nanochameleon.kernels.cpu.simd import ZERO, W, load, njit, splat, store, vmax


@njit
def all_visible(ahead, nk, nq):
    """Whether all 32 queries see all 32 keys."""
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
def weights_forward(buf, ahead, nk, nq):
    """buf.pairs = 2^(scores - shift) where seen, else 0, and their sums over keys.

    buf.total sums the weights, for log Z. buf.delta sums the rounded weights, which divide the output: where a query
    sees one key, the output is exactly that key's value.
    """
    everything = all_visible(ahead, nk, nq)
    for lane in range(0, BLOCK, W):
        shift, total, seen = load(buf.shift + 4 * lane), load(buf.total + 4 * lane), load(buf.delta + 4 * lane)
        for c in range(0, BLOCK, 2):
            s = buf.scores + ROW * c + 4 * lane
            x, y = exp2_bf16(load(s) - shift), exp2_bf16(load(s + ROW) - shift)
            if not everything:
                x = between(x, first_lane(ahead, c, nk) - lane, nq - lane, splat(ZERO))
                y = between(y, first_lane(ahead, c + 1, nk) - lane, nq - lane, splat(ZERO))
            total += x + y
            seen += rounded(x) + rounded(y)
            store_pairs(buf.pairs + ROW * (c // 2) + 4 * lane, x, y)
        store(buf.total + 4 * lane, total)
        store(buf.delta + 4 * lane, seen)


@njit
def weight_and_gradient(buf, c, lane, everything, first, nq):
    """2^(score - shift) and that times (dp - delta), of key c and the queries from `lane` on."""
    here = ROW * c + 4 * lane
    w = exp2_bf16(load(buf.scores + here) - load(buf.shift + 4 * lane))
    ds = w * (load(buf.dp + here) - load(buf.delta + 4 * lane))
    if not everything:
        w = between(w, first - lane, nq - lane, splat(ZERO))
        ds = between(ds, first - lane, nq - lane, splat(ZERO))
    return w, ds


@njit
def weights_backward(buf, ahead, nk, nq):
    """buf.weights, buf.ds, and the pairs of ds."""
    everything = all_visible(ahead, nk, nq)
    for c in range(0, BLOCK, 2):
        low, high = first_lane(ahead, c, nk), first_lane(ahead, c + 1, nk)
        w0, ds0 = weight_and_gradient(buf, c, 0, everything, low, nq)
        w1, ds1 = weight_and_gradient(buf, c, W, everything, low, nq)
        w2, ds2 = weight_and_gradient(buf, c + 1, 0, everything, high, nq)
        w3, ds3 = weight_and_gradient(buf, c + 1, W, everything, high, nq)
        row = ROW // 2 * c
        store_row(buf.weights + row, w0, w1)
        store_row(buf.weights + row + ROW // 2, w2, w3)
        store_row(buf.ds + row, ds0, ds1)
        store_row(buf.ds + row + ROW // 2, ds2, ds3)
        store_pairs(buf.pairs + row, ds0, ds2)
        store_pairs(buf.pairs + row + 4 * W, ds1, ds3)
