"""The loss as plain loops in Numba, to read before cpu.py, and what each step from here to there buys.

Milliseconds on one core of a Xeon, float32, from memory that neighbours read as well (docs/results/kernels.md):

    2,048 x 4,096   512 x 65,536   loss and gradient
       104             408         1. these loops: no intermediate arrays, each logit is read when it is needed
         9.6            34         6. cpu.overwrite: loss and gradient in one pass over memory

                                   loss alone
         5.0            19.5       2. 2^x as a polynomial (exp2.py) on registers as values (simd.py), four sums at once;
                                      the row is widened into scratch, its largest found on the way
         5.2            21.3       3. no scratch and no maximum beforehand: blocks less a shift that follows the largest
         4.7            14.5       4. 2^x in half as many instructions (exp2_bounded): no power is above the shift's
                                      headroom
         3.9            12.6       5. each cache line is asked for half a page ahead

From a cache, where arithmetic counts more, step 2 takes 4.4 ms and step 5 takes 2.6 for 2,048 x 4,096.
"""

import math

import numpy as np
from numba import njit


@njit
def zloss_loops(logits, targets, z_loss, scale, cross_entropy, log_z, gradient):
    """As zloss_cross_entropy_, into another array: (N, V) logits -> (N,) cross-entropy and log Z, (N, V) gradient."""
    n_rows, n_columns = logits.shape
    for n in range(n_rows):
        y = targets[n]
        if y < 0:
            cross_entropy[n], log_z[n] = 0.0, 0.0
            gradient[n, :] = 0.0
            continue
        # 1. log Z = m + log sum_v exp(x_v - m): with the largest m taken off, no power overflows
        largest, total = -np.inf, 0.0
        for v in range(n_columns):
            largest = max(largest, logits[n, v])
        for v in range(n_columns):
            total += math.exp(logits[n, v] - largest)
        log_z[n] = z = largest + math.log(total)
        cross_entropy[n] = z - logits[n, y]
        # 2. d loss / dx_v = scale ((1 + 2 z_loss log Z) p_v - [v = y])
        for v in range(n_columns):
            gradient[n, v] = scale * (1 + 2 * z_loss * z) * math.exp(logits[n, v] - z)
        gradient[n, y] -= scale
