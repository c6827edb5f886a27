"""The first versions: attention's forward pass and the loss as plain loops in Numba, to read before the fast ones.

step                                                     what it buys (docs/results/kernels.md has figures of 1 and 5)
1. these loops                                           no intermediate arrays: each number is read when needed
2. exp as a polynomial, four sums at once (zloss_numba)  LLVM calls a scalar exp; a sum of one waits for itself
3. registers as values (simd.py)                         16 numbers an instruction, whatever the loop looks like
4. products on tiles that stay in registers (simd.py)    each number that is loaded is used 4 to 64 times
5. tiles of scores in cache, no row maximum, tiles that
   nobody sees left out (attention_numba.py)             one pass, and half of the work of a full square
"""

import math

import numpy as np
from numba import njit


@njit
def attention_loops(q, k, v, docs, out):
    """q, k, v, out (B, T, H, E), prepared; docs (B, T): softmax over the keys that each query sees, one by one."""
    b_, t_, h_, e_ = q.shape
    scale = 1 / math.sqrt(e_)
    weights = np.empty(t_)
    for b in range(b_):
        for h in range(h_):
            for i in range(t_):
                largest, total = -np.inf, 0.0
                for j in range(i + 1):
                    weights[j] = -np.inf
                    if docs[b, j] == docs[b, i]:
                        weights[j] = 0.0
                        for e in range(e_):
                            weights[j] += q[b, i, h, e] * k[b, j, h, e] * scale
                        largest = max(largest, weights[j])
                for e in range(e_):
                    out[b, i, h, e] = 0
                for j in range(i + 1):
                    w = math.exp(weights[j] - largest)
                    total += w
                    for e in range(e_):
                        out[b, i, h, e] += w * v[b, j, h, e]
                for e in range(e_):
                    out[b, i, h, e] /= total


@njit
def zloss_loops(logits, targets, z_loss, share, loss, log_z, gradient):
    """As zloss_cross_entropy_, into another array: (N, V) logits -> (N,) loss and log Z, (N, V) gradient."""
    n_, v_ = logits.shape
    for n in range(n_):
        largest, total = -np.inf, 0.0
        for v in range(v_):
            largest = max(largest, logits[n, v])
        for v in range(v_):
            total += math.exp(logits[n, v] - largest)
        z, y = largest + math.log(total), targets[n]
        counted = 1.0 if y >= 0 else 0.0
        loss[n], log_z[n] = (z - logits[n, y] if y >= 0 else 0.0), z * counted
        for v in range(v_):
            p = math.exp(logits[n, v] - z)
            gradient[n, v] = counted * share * p * (1 + 2 * z_loss * z)
        if y >= 0:
            gradient[n, y] -= share
