"""Linear layers that read one input, as one product: queries, keys and values, or the two inputs of a gate.

    y_1, y_2, ... = x W_1^T, x W_2^T, ...,   dx = sum_i dy_i W_i,   dW_i = dy_i^T x

With the weights stacked, the products' sum needs no sums afterwards, and a wide product is faster than narrow ones. The
weights stay apart as parameters: they are copied side by side each time, in the products' type, which autocast would do
one by one. The results are views of one tensor; gradients that lie beside one another likewise (`beside`) are taken as
they are.

Shapes: x (..., K), weights (N_i, K).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.dispatch import choose
from nanochameleon.kernels.ops import product_type


def linear_reference(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight) for weight in weights)


def linear(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """By the implementation that `dispatch.choose` names; torch.compile sees the plain products."""
    if choose("linear", x) == "reference" or torch.compiler.is_compiling():
        return linear_reference(x, weights)
    return _Joined.apply(x, product_type(x), *weights)


def beside(parts: Sequence[Tensor]) -> Tensor:
    """(N, F_i) each -> (N, sum F_i): a view where they already lie so in one tensor, else a copy."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    place, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        where = part.stride(), part.storage_offset(), part.untyped_storage().data_ptr()
        if where != ((width, 1), place, storage):
            return torch.cat(parts, 1)
        place += part.shape[1]
    return first.as_strided((len(first), width), (width, 1))


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kind: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.widths, ctx.kind = [len(weight) for weight in weights], x.dtype
        joined = torch.empty(sum(ctx.widths), x.shape[-1], dtype=kind, device=x.device)
        for part, weight in zip(joined.split(ctx.widths), weights, strict=True):
            part.copy_(weight)
        x = x.to(kind)
        ctx.save_for_backward(x, joined)
        return F.linear(x, joined).split(ctx.widths, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, joined = ctx.saved_tensors
        g = beside([part.reshape(-1, part.shape[-1]) for part in gradients])
        dx = (g @ joined).view(x.shape).to(ctx.kind) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return dx, None, *(None for _ in ctx.widths)
        weight = (g.T @ x.reshape(-1, x.shape[-1])).float()
        return dx, None, *weight.split(ctx.widths)
