"""One decode step of a whole model in Numba: for small models on a CPU, where torch's matrix products wait for memory.

    tokens, rows, positions (n,) -> every layer, keys and values written into the cache -> hidden states (n, D)

It equals `Chameleon.forward` with a cache, up to rounding. Activations lie as (groups, features, lanes): 16 rows
of the batch side by side, or one lane where the batch is one row. So a weight is read once for all of them, and a row's
numbers do not depend on the rows beside it; those of a batch of one row equal them up to rounding (`dots`). Weights are
float32, or int8 with a scale for each output (quantize.py).
"""

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor, nn

from nanochameleon.transformer import Chameleon, KVCache, rotary_table

LANES, TILE, BLOCK = 16, 8, 32  # rows side by side; outputs at a time in registers; outputs a thread takes at a time

# ---------------------------------------------------------------------------------------------------------------------
# Matrix products


def make_tile(n_outputs: int):
    """-> tile(x, w, n, scale, out): rows n .. n + n_outputs - 1 of w (N, K) times a group x (K, 16), into out (N, 16).

    LLVM's vectors by hand, since Numba keeps no array in registers: out[n + j] = scale[n + j] * sum_k w[n + j, k] x[k].
    """

    @intrinsic
    def tile(typingctx, x, w, n, scale, out):
        def codegen(context, builder, signature, args):
            kinds = signature.args
            arrays = {i: context.make_array(kinds[i])(context, builder, args[i]) for i in (0, 1, 3, 4)}
            i64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
            k_end, first = cgutils.unpack_tuple(builder, arrays[0].shape)[0], builder.sext(args[2], i64)

            def widened(i, index):
                value = builder.load(builder.gep(arrays[i].data, [index]))
                if kinds[i].dtype != types.float32:
                    value = builder.sitofp(value, ir.FloatType())
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
                return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

            def group(i, index):  # where row `index` of 16 floats starts
                at = builder.gep(arrays[i].data, [builder.mul(index, i64(LANES))])
                return builder.bitcast(at, vector.as_pointer())

            before, loop, behind = builder.basic_block, *(builder.append_basic_block(name) for name in ("k", "end"))
            rows = [builder.mul(builder.add(first, i64(j)), k_end) for j in range(n_outputs)]
            builder.branch(loop)
            builder.position_at_end(loop)
            k, sums = builder.phi(i64), [builder.phi(vector) for _ in rows]
            k.add_incoming(i64(0), before)
            taken = builder.load(group(0, k), align=4)
            for row, total in zip(rows, sums, strict=True):
                total.add_incoming(ir.Constant(vector, [0.0] * LANES), before)
                product = builder.fmul(widened(1, builder.add(row, k)), taken, flags=["contract"])
                total.add_incoming(builder.fadd(total, product, flags=["contract"]), loop)
            after = [total.incomings[1][0] for total in sums]
            more = builder.add(k, i64(1))
            k.add_incoming(more, loop)
            builder.cbranch(builder.icmp_signed("<", more, k_end), loop, behind)
            builder.position_at_end(behind)
            for j, total in enumerate(after):
                index = builder.add(first, i64(j))
                builder.store(builder.fmul(total, widened(3, index)), group(4, index), align=4)

        return types.void(x, w, n, scale, out), codegen

    return tile


tile_of_many, tile_of_one = make_tile(TILE), make_tile(1)


@njit(fastmath=True, cache=True)
def dots(x, w, first, last, scale, out):
    """out[n, 0] = scale[n] * (w[n] . x[:, 0]) for n in first .. last - 1: a batch of one row.

    It adds up many lanes of k at once, and so in another order than a tile, which would wait for each product in turn.
    """
    for n in range(first, last):
        total = np.float32(0)
        for k in range(w.shape[1]):
            total += np.float32(w[n, k]) * x[k, 0]
        out[n, 0] = total * scale[n]


@njit(parallel=True, cache=True)
def linear(x, w, scale, out):
    """x (G, K, W), w (N, K), scale (N,) -> out (G, N, W)."""
    n_out, lanes = w.shape[0], x.shape[2]
    for block in prange((n_out + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min((block + 1) * BLOCK, n_out)
        for g in range(x.shape[0]):
            if lanes == 1:
                dots(x[g], w, first, last, scale, out[g])
            else:
                whole = first + (last - first) // TILE * TILE
                for n in range(first, whole, TILE):
                    tile_of_many(x[g], w, n, scale, out[g])
                for n in range(whole, last):
                    tile_of_one(x[g], w, n, scale, out[g])


# ---------------------------------------------------------------------------------------------------------------------
# What lies between them


@njit(fastmath=True, cache=True)
def rms_norm(x, weight, eps, out):
    """Over the features of (G, D, W), lane by lane."""
    groups, dim, lanes = x.shape
    for g in range(groups):
        squares = np.zeros(lanes, np.float32)
        for d in range(dim):
            for lane in range(lanes):
                squares[lane] += x[g, d, lane] * x[g, d, lane]
        for lane in range(lanes):
            squares[lane] = np.float32(1) / np.sqrt(squares[lane] / np.float32(dim) + eps)
        for d in range(dim):
            for lane in range(lanes):
                out[g, d, lane] = x[g, d, lane] * squares[lane] * weight[d]


@njit(fastmath=True, cache=True)
def normed_and_turned(x, weight, bias, eps, cos, sin, out):
    """QK-norm and rotary embedding of one head: x (E,) -> out (E,). Empty weight: no norm."""
    size = len(x)
    mean = variance = np.float32(0)
    if len(weight):
        for e in range(size):
            mean += x[e]
        mean /= np.float32(size)
        for e in range(size):
            variance += (x[e] - mean) * (x[e] - mean)
        scale = np.float32(1) / np.sqrt(variance / np.float32(size) + eps)
        for e in range(size):
            out[e] = (x[e] - mean) * scale * weight[e] + bias[e]
    else:
        out[:] = x
    for e in range(0, size, 2):
        a, b = out[e], out[e + 1]
        out[e], out[e + 1] = a * cos[e // 2] - b * sin[e // 2], a * sin[e // 2] + b * cos[e // 2]


@njit(fastmath=True, cache=True)
def attend(q, keys, values, n, scores, out):
    """One query q (E,) on the first n keys and values (S, E) -> out (E,)."""
    size = len(q)
    root, largest, total = np.float32(1) / np.sqrt(np.float32(size)), np.float32(-3e38), np.float32(0)
    for t in range(n):
        score = np.float32(0)
        for e in range(size):
            score += q[e] * keys[t, e]
        scores[t] = score * root
        largest = max(largest, scores[t])
    out[:] = 0
    for t in range(n):
        weight = np.exp(scores[t] - largest)
        total += weight
        for e in range(size):
            out[e] += weight * values[t, e]
    for e in range(size):
        out[e] /= total


@njit(parallel=True, cache=True)
def attention(qkv, rows, positions, q_norm, k_norm, eps, cos, sin, keys, values, scratch, out):
    """qkv (G, (H + 2 G_k) E, W) of new ids at places (rows, positions) of the cache -> out (G, H E, W).

    keys and values (N, G_k, S, E) get all the new ids' before any query looks: several may be of one row.
    """
    lanes, kv_heads, size = qkv.shape[2], keys.shape[1], keys.shape[3]
    n_heads = qkv.shape[1] // size - 2 * kv_heads
    each = n_heads // kv_heads
    for job in prange(len(rows) * kv_heads):
        i, kv = job // kv_heads, job % kv_heads
        g, lane, row, position = i // lanes, i % lanes, rows[i], positions[i]
        at, group = (n_heads + kv) * size, kv * len(k_norm) // kv_heads
        k = np.ascontiguousarray(qkv[g, at : at + size, lane])
        normed_and_turned(
            k, k_norm[group, 0], k_norm[group, 1], eps, cos[position], sin[position], keys[row, kv, position]
        )
        at += kv_heads * size
        for e in range(size):
            values[row, kv, position, e] = qkv[g, at + e, lane]
    for job in prange(len(rows) * kv_heads):
        i, kv = job // kv_heads, job % kv_heads
        g, lane, row, position = i // lanes, i % lanes, rows[i], positions[i]
        q, o, scores = scratch[job, :size], scratch[job, size : 2 * size], scratch[job, 2 * size :]
        for head in range(kv * each, (kv + 1) * each):
            query = np.ascontiguousarray(qkv[g, head * size : (head + 1) * size, lane])
            group = head * len(q_norm) // n_heads
            normed_and_turned(query, q_norm[group, 0], q_norm[group, 1], eps, cos[position], sin[position], q)
            attend(q, keys[row, kv], values[row, kv], position + 1, scores, o)
            for e in range(size):
                out[g, head * size + e, lane] = o[e]


@njit(parallel=True, cache=True)
def gate(x, out):
    """silu of the first half of the features times the second: (G, 2 F, W) -> (G, F, W)."""
    half = out.shape[1]
    for f in prange(half):
        for g in range(x.shape[0]):
            for lane in range(x.shape[2]):
                a = x[g, f, lane]
                out[g, f, lane] = a / (np.float32(1) + np.exp(-a)) * x[g, half + f, lane]


# ---------------------------------------------------------------------------------------------------------------------
# The step


@njit(cache=True)
def layer(x, rows, positions, pre, eps, weights, norms, cos, sin, keys, values, scratch):
    """One block on x (G, D, W), in place; the arguments are those of `CPUDecoder.step`."""
    (wqkv, sqkv), (wo, so), (w13, s13), (w2, s2) = weights
    attention_norm, ffn_norm, q_norm, k_norm = norms
    groups, _, lanes = x.shape
    branch = np.empty_like(x)
    if pre:
        rms_norm(x, attention_norm, eps, branch)
    else:
        branch[:] = x
    qkv = np.empty((groups, len(wqkv), lanes), np.float32)
    linear(branch, wqkv, sqkv, qkv)
    heads = np.zeros((groups, wo.shape[1], lanes), np.float32)
    attention(qkv, rows, positions, q_norm, k_norm, eps, cos, sin, keys, values, scratch, heads)
    linear(heads, wo, so, branch)
    if not pre:
        rms_norm(branch, attention_norm, eps, branch)
    x += branch
    if pre:
        rms_norm(x, ffn_norm, eps, branch)
    else:
        branch[:] = x
    both = np.empty((groups, len(w13), lanes), np.float32)
    linear(branch, w13, s13, both)
    hidden = np.empty((groups, len(w13) // 2, lanes), np.float32)
    gate(both, hidden)
    linear(hidden, w2, s2, branch)
    if not pre:
        rms_norm(branch, ffn_norm, eps, branch)
    x += branch


def joined(*linears: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Linear layers with one input, or their int8 versions -> all weights (N, K) and a scale for each output (N,)."""
    weights = [layer.weight.detach().numpy() for layer in linears]  # of one layer they stay where they are
    scales = [getattr(layer, "scale", torch.ones(len(layer.weight))).float().numpy() for layer in linears]
    return weights[0] if len(weights) == 1 else np.concatenate(weights), np.concatenate(scales)


def qk_norm(norm: nn.Module) -> np.ndarray:
    """-> (n_groups, 2, E): weights and biases; E = 0 is without."""
    if isinstance(norm, nn.Identity):
        return np.zeros((1, 2, 0), np.float32)
    return np.stack([norm.weight.detach().numpy(), norm.bias.detach().numpy()], 1)


def share_threads() -> None:
    """As many of Numba's threads as torch has; torch keeps its number.

    Numba's first call sets that of the OpenMP that both use to all cores, and torch's sums then round differently.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


class CPUDecoder:
    """A model's weights, laid out for the step above, beside the cache that it reads and writes."""

    def __init__(self, model: Chameleon, cache: KVCache):
        cfg = model.cfg
        self.cfg, self.embeddings, self.norm = cfg, model.tok_embeddings.weight.detach(), model.norm.weight.detach()
        self.eps, self.pre = np.float32(cfg.norm_eps), cfg.norm_order == "pre"
        self.weights, self.norms = [], []
        for block in model.layers:
            a, f = block.attention, block.feed_forward
            self.weights.append((joined(a.wq, a.wk, a.wv), joined(a.wo), joined(f.w1, f.w3), joined(f.w2)))
            norms = (block.attention_norm.weight.detach().numpy(), block.ffn_norm.weight.detach().numpy())
            self.norms.append((*norms, qk_norm(a.q_norm), qk_norm(a.k_norm)))
        self.output, self.output_scale = joined(model.output)
        self.keys, self.values = ([x.numpy() for x in xs] for xs in (cache.keys, cache.values))
        positions = torch.arange(cache.keys.shape[3])[None]
        turns = rotary_table(positions, cfg.head_dim, cfg.rope_theta)[0, 0]
        self.cos, self.sin = turns.real.contiguous().numpy(), turns.imag.contiguous().numpy()
        self.scratch = np.empty((0, 2 * cfg.head_dim + cache.keys.shape[3]), np.float32)  # grows with the batch

    def step(self, tokens: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """New ids (n,) at places (rows, positions) of the cache -> hidden states (n, D). One of each of many rows, or
        the next ones of one row."""
        share_threads()
        if len(self.scratch) < len(tokens) * self.cfg.kv_heads:
            self.scratch = np.empty((len(tokens) * self.cfg.kv_heads, self.scratch.shape[1]), np.float32)
        x, places = to_lanes(self.embeddings[tokens]), (rows.numpy(), positions.numpy())
        for i, (weights, norms) in enumerate(zip(self.weights, self.norms, strict=True)):
            caches = (self.keys[i], self.values[i])
            layer(x, *places, self.pre, self.eps, weights, norms, self.cos, self.sin, *caches, self.scratch)
        rms_norm(x, self.norm.numpy(), self.eps, x)
        return from_lanes(x, len(tokens))

    def logits(self, hidden: Tensor, columns: slice) -> Tensor:
        """(n, D) -> (n, number of columns)."""
        x, weight = to_lanes(hidden), self.output[columns]
        out = np.empty((len(x), len(weight), x.shape[2]), np.float32)
        linear(x, weight, self.output_scale[columns], out)
        return from_lanes(out, len(hidden))


def to_lanes(rows: Tensor) -> np.ndarray:
    """(n, D) -> (G, D, W), empty lanes 0."""
    n, dim = rows.shape
    lanes = 1 if n == 1 else LANES
    padded = torch.zeros(-(-n // lanes) * lanes, dim)
    padded[:n] = rows
    return padded.view(-1, lanes, dim).transpose(1, 2).contiguous().numpy()


def from_lanes(x: np.ndarray, n: int) -> Tensor:
    """(G, D, W) -> (n, D)."""
    return torch.from_numpy(x).transpose(1, 2).flatten(0, 1)[:n]
