"""Step 1 of the fast kernels: attention's forward pass as plain loops in Numba, to read before the other steps.

step                                                        what it buys (docs/results has figures of 1 and 5)
1. these loops                                              no intermediate arrays: a number is read when used
2. 2^x as a polynomial (../cpu/exp2.py), four sums at once  no call of exp per number; additions run in parallel
3. registers as values (../cpu/simd.py)                     W numbers an instruction, whatever the loop looks like
4. matmul tiles in registers (../cpu/matmul.py)             each number that is loaded is used 4 to 64 times
5. tiles of scores in cache, no row maximum, unseen tiles   one pass, and half the work of a full square
   skipped (cpu.py)

The same steps for the loss: ../zloss/steps.py. Not here: QK-norm, RoPE and the gradient.
"""

import math

import numpy as np
from numba import njit


@njit
def attention_loops(q, k, v, doc_ids, out):
    """q, k, v, out (B, T, H, E), already normed and rotated; doc_ids (B, T). One query at a time, one key at a time."""
    b_, t_, h_, e_ = q.shape
    scale = 1 / math.sqrt(e_)
    scores = np.empty(t_)
    for b in range(b_):
        for h in range(h_):
            for i in range(t_):
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
