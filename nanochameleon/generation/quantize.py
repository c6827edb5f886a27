"""int8 weights for decoding: half the memory of bf16, so that a 7B fits a card of 12 GB. Activations stay as they are.

    w[n, k] ~ scale[n] * q[n, k],   scale[n] = max_k |w[n, k]| / 127,   q int8

Symmetric, a scale for each output, nothing calibrated; norms and the embedding table keep their type. What it costs in
bits per token is in docs/results/generation.md. A quantised model cannot be trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochameleon.transformer import Chameleon


class QuantizedLinear(nn.Module):
    """A linear layer without bias, from its weight (N, K); `columns` as for the output layer."""

    def __init__(self, weight: Tensor):
        super().__init__()
        q, scale = quantize(weight)
        self.register_buffer("weight", q)
        self.register_buffer("scale", scale)  # float32, whatever the type of the activations

    def forward(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        # one weight in the type of x at a time; scaled before the product, whose sums in fp16 would else be infinite
        return F.linear(x, self.weight[columns].to(x.dtype).mul_(self.scale[columns, None]))


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> int8 (N, K) and float32 scales (N,); a row of zeros has scale 0 and stays zeros."""
    scale = weight.float().abs().amax(1) / 127
    return (weight.float() / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def quantize_(model: Chameleon) -> Chameleon:
    """Puts a QuantizedLinear in the place of every linear layer, in the model itself, one at a time."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, QuantizedLinear(child.weight))
    return model
