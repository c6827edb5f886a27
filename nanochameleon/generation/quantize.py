"""int8 weights for decoding: half the memory of bf16, so a 7B fits a GPU of 12 GB. Activations keep their dtype.

    w[n, k] ~ scale[n] * q[n, k],   scale[n] = max_k |w[n, k]| / 127,   q int8

Symmetric, one scale per output, no calibration. Norms and the embedding table keep their dtype. The cost in bits per
token is in docs/results/generation.md. A quantised model cannot be trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochameleon.kernels.ops import matmul_dtype
from nanochameleon.transformer import Chameleon


class QuantizedLinear(nn.Module):
    """A linear layer without bias, from its weight (N, K). vocab_slice: as for LMHead."""

    def __init__(self, weight: Tensor):
        super().__init__()
        q, scale = quantize(weight)
        self.register_buffer("weight", q)
        self.register_buffer("scale", scale)  # float32 for every dtype of the activations

    def forward(self, x: Tensor, vocab_slice: slice = slice(None)) -> Tensor:
        return int8_linear(x, self.weight[vocab_slice], self.scale[vocab_slice])


def int8_linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (..., K) times the weight scale[:, None] * q: (..., N). Every dtype of x holds the integers of q exactly."""
    dtype = matmul_dtype(x)
    if dtype == torch.float16:  # which ends at 65,504: sums of x times integers up to 127 would overflow
        return F.linear(x, q.to(dtype).mul_(scale[:, None]))
    return F.linear(x, q.to(dtype)).mul_(scale)  # scaling the output spares a pass over the weight


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> int8 (N, K) and float32 scales (N,). A row of zeros has scale 0 and stays zero."""
    scale = weight.float().abs().amax(1) / 127
    return (weight.float() / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def quantize_(model: Chameleon) -> Chameleon:
    """Replace every linear layer of the model by a QuantizedLinear, in place and one at a time."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, QuantizedLinear(child.weight))
    return model
