"""The plain loops are the same functions as the fast kernels."""

import numpy as np
import torch

from nanochameleon.kernels import qknorm_rope_attention, use_kernels
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.steps import attention_loops
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy_
from nanochameleon.kernels.zloss.steps import zloss_loops


def test_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 70, 2, 6).unbind()
    docs = torch.randint(0, 2, (2, 70))
    still = torch.tensor([1.0, 0.0]).expand(2, 1, 70, 3, 2)
    out = torch.empty_like(q)
    attention_loops(q.numpy(), k.numpy(), v.numpy(), docs.numpy(), out.numpy())
    with use_kernels("numba"):
        torch.testing.assert_close(
            qknorm_rope_attention(q, k, v, still, Documents.of(docs), None, None, 1e-5), out, rtol=0, atol=1e-5
        )


def test_the_loss():
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 37), torch.tensor([0, 36, -1, 5, 5, -1, 7, 8, 9])
    loss, log_z, gradient = np.empty(9, np.float32), np.empty(9, np.float32), np.empty((9, 37), np.float32)
    zloss_loops(logits.numpy(), targets.numpy(), 1e-2, 0.5, loss, log_z, gradient)
    results = (*zloss_cross_entropy_(logits, targets, 1e-2, 0.5), logits)
    for result, expected in zip(results, (loss, log_z, gradient), strict=True):
        torch.testing.assert_close(result, torch.from_numpy(expected), rtol=0, atol=1e-5)
