"""Attention on a CPU in six rungs, from plain loops to the shipped kernel. Each rung changes one thing.

    python kernels/attention/steps.py           check every rung against float64, time it, print a table
    python kernels/attention/steps.py --cuda    the same for steps.cu, on a GPU; without one, in the emulator

    s_ij = q_i . k_j / sqrt(E)                  for the keys j that query i sees: j <= i, of its own document
    out_i = sum_j P_ij v_j,   P_ij = exp(s_ij) / sum_j exp(s_ij)

Rungs 1 to 4 and 6 are forward passes, 5 and 6 gradients. Shapes: q, k, v, out (B, T, H, E) float32, already normed and
rotated; doc_ids (B, T). The same kind of ladder for the loss: ../zloss/steps.py. Not here: QK-norm, RoPE, key heads
that several query heads share. Figures are in docs/results/kernels.md.
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: torch would import its cuda.py in place of NVIDIA's package of that name

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import Tensor

from nanochameleon.kernels import ladder
from nanochameleon.kernels.attention import cpu
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.qknorm_rope_attention import qknorm_rope_attention
from nanochameleon.kernels.attention.steps_checks import Results, gradient_of, ladders
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.kernels.gpu import launch
from nanochameleon.kernels.ladder import Ladder, Rung, cuda_source, python_source

KEYS = 64  # keys of a tile

# ---------------------------------------------------------------------------------------------------------------------
# 1. Plain loops. One query at a time, one key at a time. There is no (T, T) matrix, only the scores of one query.


@njit
def attention_loops(q, k, v, doc_ids, out):
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


# ---------------------------------------------------------------------------------------------------------------------
# 2. Online softmax. Each key is read once and no score is kept: when a larger score comes, the sums so far are scaled
#    down. By itself that saves memory and little time; it is what lets tiles work in one pass.


@njit
def attention_online(q, k, v, doc_ids, out):
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


# ---------------------------------------------------------------------------------------------------------------------
# 3. Tiles of keys. 64 scores at once, then one new maximum for all of them. Keys are the outer loop, so a tile is
#    transposed once and all queries read it. The inner loops read neighbours in memory, and none of their sums waits
#    for the one before: so the compiler takes vector instructions. A tile is computed whole, seen or not.


@njit
def attend_to_tile(q, k_columns, v, docs, i, j, scores, stats, out):
    """Add to out (E,) of query i what the keys [j, j + N) give it. stats: its maximum and its sum so far.

    q (E,), k_columns (E, N): the keys transposed, v (N, E), docs (T,).
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
    b_, t_, h_, _ = q.shape
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


# ---------------------------------------------------------------------------------------------------------------------
# 4. Tiles that a query does not see are left out: half of the square lies in the future, and documents hide more.


@njit
def attention_seen_tiles(q, k, v, doc_ids, out):
    b_, t_, h_, _ = q.shape
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


# ---------------------------------------------------------------------------------------------------------------------
# 5. The gradient, as loops. Given dO, the gradient of out:
#        dv_j = sum_i P_ij dO_i,   dP_ij = dO_i . v_j
#        ds_ij = P_ij (dP_ij - D_i),   D_i = sum_j P_ij dP_ij       since a weight that grows takes from the others
#        dq_i = sum_j ds_ij k_j / sqrt(E),   dk_j = sum_i ds_ij q_i / sqrt(E)


@njit
def softmax_row(q, k, doc_ids, b, h, i, weights):
    """Write the weights of query i over the keys 0 to i, as in rung 1."""
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


# ---------------------------------------------------------------------------------------------------------------------
# 6. The shipped kernel (forward and backward in cpu.py), called as a model calls it. Queries come in tiles, too, so a
#    number in a register is used 4 to 64 times (../cpu/matmul.py); 2^x is a polynomial on registers (../cpu/exp2.py).
#    Where norms bound the scores, no maximum is needed. The backward pass takes tiles as well, with the sums of rung 2
#    kept from the forward pass. It also takes bfloat16, norms and rotates, and has a thread for each part of the heads.


def shipped(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor) -> Results:
    still = torch.tensor([1.0, 0.0]).expand(len(q), 1, q.shape[1], q.shape[3] // 2, 2)  # rotate by no angle
    with use_kernels("numba"):
        return (qknorm_rope_attention(q, k, v, still, Documents.of(doc_ids), None, None, 0.0),)


# ---------------------------------------------------------------------------------------------------------------------
# The ladder on a CPU


def on_arrays(function: Callable, outputs: int) -> Callable[..., Results]:
    """Let a rung in Numba take tensors and return this many, each like q."""

    def run(q: Tensor, *others: Tensor) -> Results:
        results = tuple(torch.empty_like(q) for _ in range(outputs))
        function(*(x.numpy() for x in (q, *others, *results)))
        return results

    return run


def on_cpu() -> list[Ladder]:
    def rung(name: str, change: str, function: Callable, *helpers: Callable, outputs: int = 1) -> Rung:
        return Rung(name, change, on_arrays(function, outputs), python_source(*helpers, function))

    def last(change: str, function: Callable, kernel) -> Rung:
        return Rung("shipped", change, function, python_source(kernel.function))

    forward = (
        rung("loops", "no (T, T) matrix, only the scores of one query", attention_loops),
        rung("online", "one pass, no scores kept", attention_online),
        rung("tiles", "64 keys at once: vector instructions, one rescale", attention_tiles, attend_to_tile),
        rung("seen tiles", "tiles that nobody sees are left out", attention_seen_tiles, attend_to_tile),
        last("tiles of queries in registers, 2^x a polynomial", shipped, cpu.forward),
    )
    gradient = (
        rung("loops", "weights made again, not kept", attention_gradient, softmax_row, outputs=3),
        last("tiles; the forward pass counts, too", partial(gradient_of, shipped), cpu.backward),
    )
    return ladders(forward, gradient, None)


# ---------------------------------------------------------------------------------------------------------------------
# The ladder on a GPU: steps.cu


def on_gpu(load: Callable, device: torch.device) -> list[Ladder]:
    """The kernels of steps.cu, which `load` compiles, and the shipped ones."""
    file = Path(__file__).with_name("steps.cu")

    def rung(name: str, change: str, launcher: Callable, *sizes: int) -> Rung:
        kernel = name.replace(" ", "_")
        kernels = {e: load(file, f"{kernel}_{e}") for e in launch.HEAD_DIMS}
        return Rung(name, change, partial(launcher, kernels, *sizes), cuda_source(file, kernel))

    def last(change: str, function: Callable, name: str, kernel: str) -> Rung:
        return Rung("shipped", change, function, cuda_source(file.with_name(f"{name}.cu"), kernel))

    # the numbers: queries of a block, its threads, tiles in dynamic shared memory
    forward = (
        rung("thread a query", "the loops of a CPU, a thread for each query", forward_on_gpu, 64, 64, 0),
        rung("warp a query", "32 lanes share a row, neighbours read neighbours", forward_on_gpu, 4, 128, 0),
        rung("shared tiles", "16 queries share each tile of 32 keys", forward_on_gpu, 16, 512, 0),
        rung("tensor cores", "a warp has 16 queries: mma.sync", forward_on_gpu, 64, 128, 3),
        last("the next tile loads during the arithmetic", launch.attention, "attention", "attention"),
    )
    gradient = (
        rung("gradient warp", "a warp for each position", gradient_on_gpu),
        last("tensor cores, two kernels", shipped_on_gpu, "attention_backward", "attention_backward_q"),
    )
    return ladders(forward, gradient, device)


def forward_on_gpu(kernels: dict, queries: int, threads: int, tiles: int, q, k, v, doc_start: Tensor) -> Results:
    b, t, heads, e = q.shape
    out, lse2 = torch.empty_like(q), q.new_empty(b, heads, t, dtype=torch.float32)
    arguments = q, k, v, doc_start, out, lse2, np.int32(t), np.int32(heads), np.int32(k.shape[2])
    grid, shared = (-(-t // queries), heads, b), launch.tile_bytes(64 * tiles, e)
    kernels[e](grid, (threads,), arguments, shared_mem=shared)
    return out, lse2


def gradient_on_gpu(kernels: dict, q, k, v, doc_start: Tensor, d_out: Tensor, doc_end: Tensor) -> Results:
    (b, t, heads, e), key_heads, gradients = q.shape, k.shape[2], [torch.empty_like(x) for x in (q, k, v)]
    out, lse2 = launch.attention(q, k, v, doc_start)
    delta = (d_out.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    arguments = d_out, q, k, v, lse2, delta, doc_start, doc_end, *gradients
    kernels[e]((t, key_heads, b), (32,), (*arguments, np.int32(t), np.int32(heads), np.int32(key_heads)))
    return tuple(gradients)


def shipped_on_gpu(q, k, v, doc_start: Tensor, d_out: Tensor, doc_end: Tensor) -> Results:
    out, lse2 = launch.attention(q, k, v, doc_start)
    return launch.attention_backward(d_out, out, lse2, q, k, v, doc_start, doc_end)


if __name__ == "__main__":
    sys.exit(ladder.main(__doc__.partition("\n")[0], on_cpu, on_gpu))
