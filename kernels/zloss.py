"""Cross-entropy with z-loss on logits. Plain torch: the reference of every later kernel.

    loss_i = lse_i - x_i[y_i]          cross-entropy, lse_i = log sum_v exp x_i[v] = log Z_i
    z_i    = lse_i^2                   the softmax cannot see a shift of all logits; this keeps them from drifting

The total of paper section 2.3 is sum_i loss_i + 1e-5 z_i; its gradient is p_v (1 + 2 * 1e-5 * lse_i) - [v = y_i].
"""

import torch
from torch import Tensor


def zloss_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (N, V) of any float type, targets (N,) in [0, V) -> (cross-entropy (N,), log Z (N,)), both float32 or wider.

    A mean over no rows at all is the caller's to avoid: rows stay apart here.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    log_z = x.logsumexp(-1)
    return log_z - x.gather(-1, targets[:, None])[:, 0], log_z
