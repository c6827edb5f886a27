"""Attention's forward pass as plain loops in Numba, to read before cpu.py, and what each step from here to there buys.

1. these loops                          no intermediate arrays: each number is read when it is needed
2. registers as values (cpu/simd.py)    16 numbers an instruction, whatever the loop looks like
3. exp as a polynomial (cpu/exp2.py)    LLVM would call a scalar exp
4. matmuls on tiles that stay in
   registers (cpu/matmul.py)            each number that is loaded is used 4 to 64 times
5. tiles of scores in cache, no row
   maximum, hidden tiles skipped        one pass, and half of the work of a full square
   (attention/cpu.py)

docs/results/kernels.md times the first and the last.
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
