"""Output layer and z-loss cross-entropy as one op that never holds all of the [rows, vocabulary] logits.

    x_i = W hidden_i,   loss_i = log Z_i - x_i[y_i],   log Z_i = log sum_v exp x_i[v]

The gradient, with g and h those of loss_i and log Z_i, needs only log Z of the forward pass:
    dx_i[v] = (g_i + h_i) exp(x_i[v] - log Z_i) - g_i [v = y_i],   d hidden = dx W,   dW = dx^T hidden

Shapes: hidden (N, D), weight (V, D), targets (N,) int64 below V, negative where a row is ignored. Returns the
cross-entropy (N,) and log Z (N,), as zloss.py does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.dispatch import choose
from nanochameleon.kernels.ops import FLOAT_DTYPES, INDEX_DTYPES, KERNEL_DTYPES, expect, register_op
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy, zloss_cross_entropy_reference


def linear_zloss_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return zloss_cross_entropy_reference(F.linear(hidden, weight), targets)


def linear_zloss_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """By the implementation that `dispatch.choose` names; "reference" holds the logits. Raises as
    `zloss_cross_entropy` does."""
    name = choose("linear_zloss_cross_entropy", hidden)
    if name == "reference":
        return zloss_cross_entropy(F.linear(hidden, weight), targets)
    op = linear_zloss_op if name == "numba" else torch.ops.nanochameleon.linear_zloss_cross_entropy
    return op(hidden, weight, targets)


def _expect(hidden: Tensor, weight: Tensor, targets: Tensor, **rows: Tensor) -> None:
    """Raises ValueError where these are not (N, D), (V, D), N whole numbers, and N numbers in each of `rows`."""
    name = "linear_zloss_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or not len(weight):
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{name}: hidden must be (N, D) and weight (V, D) with V > 0; they are {shapes}")
    expect(name, hidden, hidden.shape, KERNEL_DTYPES, hidden=hidden)
    expect(name, hidden, (len(weight), hidden.shape[1]), FLOAT_DTYPES, weight=weight)
    expect(name, hidden, hidden.shape[:1], INDEX_DTYPES, targets=targets)
    expect(name, hidden, hidden.shape[:1], FLOAT_DTYPES, **rows)


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from nanochameleon.kernels.zloss import linear_cpu as linear_zloss_cpu

    _expect(hidden, weight, targets)
    if len(targets) and int(targets.max()) >= len(weight):
        raise IndexError(f"target {int(targets.max())} is out of range for {len(weight)} logits")
    return linear_zloss_cpu.forward(hidden.contiguous(), weight, targets.long().contiguous())


def _backward(
    g: Tensor, h: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_z: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight, in their types."""
    _expect(hidden, weight, targets, g=g, h=h, log_z=log_z)
    from nanochameleon.kernels.zloss import linear_cpu as linear_zloss_cpu

    g, h, log_z = (x.float().contiguous() for x in (g, h, log_z))
    return linear_zloss_cpu.backward(g, h, hidden.contiguous(), weight, targets.long().contiguous(), log_z)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(backward, ctx, g, h):
    return *backward(g, h, *ctx.saved_tensors), None


linear_zloss_op = register_op("linear_zloss_cross_entropy", _forward, _backward, _save, _gradients)


@torch.library.register_fake("nanochameleon::linear_zloss_cross_entropy")
def _(hidden, weight, targets):
    return hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty(len(hidden), dtype=torch.float32)


@torch.library.register_fake("nanochameleon::linear_zloss_cross_entropy_backward")
def _(g, h, hidden, weight, targets, log_z):
    contiguous = torch.contiguous_format
    return torch.empty_like(hidden, memory_format=contiguous), torch.empty_like(weight, memory_format=contiguous)


@torch.library.register_kernel("nanochameleon::linear_zloss_cross_entropy", "cuda")
def _(hidden, weight, targets):
    from nanochameleon.kernels.zloss import linear_cuda as linear_zloss_cuda

    _expect(hidden, weight, targets)
    return linear_zloss_cuda.forward(hidden.contiguous(), weight, targets.long().contiguous())


@torch.library.register_kernel("nanochameleon::linear_zloss_cross_entropy_backward", "cuda")
def _(g, h, hidden, weight, targets, log_z):
    from nanochameleon.kernels.zloss import linear_cuda as linear_zloss_cuda

    _expect(hidden, weight, targets, g=g, h=h, log_z=log_z)
    g, h, log_z = (x.float().contiguous() for x in (g, h, log_z))
    return linear_zloss_cuda.backward(g, h, hidden.contiguous(), weight, targets.long().contiguous(), log_z)
