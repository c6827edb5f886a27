"""Linear layers that read one input, as one product: queries, keys and values, or the two inputs of a gate.

    y_1, y_2, ... = x W_1^T, x W_2^T, ...,   dx = sum_i dy_i W_i,   dW_i = dy_i^T x

With the weights stacked, the products' sum needs no sums afterwards, and a wide product is faster than narrow ones. The
weights stay apart as parameters: they are copied side by side each time, in the products' type, which autocast would do
one by one. The results are views of one tensor; gradients that lie beside one another likewise (`beside`) are taken as
they are. The weights' gradient has a product of its own where the processor has a matrix unit (AMX): torch's takes g^T
at half speed and rounds the result to bfloat16, only for it to be widened again.

Shapes: x (..., K), weights (N_i, K).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.dispatch import decide
from nanochameleon.kernels.ops import expect, is_plain_tensor, matmul_dtype

MIN_SIZE = 64  # rows, inputs and outputs; below, tiles' margins and the launches cost more than they save


def linear_reference(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight) for weight in weights)


def linear(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """By the implementation that `dispatch.decide` names for products of their type; torch.compile sees the plain
    ones, which also refuse what does not fit."""
    kind = matmul_dtype(x)
    name = decide("linear", x.device, kind)[0]
    if name == "reference" or torch.compiler.is_compiling() or not _join(x, weights, kind):
        return linear_reference(x, weights)
    return _Joined.apply(x, kind, name == "amx", *weights)


def _join(x: Tensor, weights: Sequence[Tensor], kind: torch.dtype) -> bool:
    """Whether torch would multiply x by each of the weights, as matrices: copied side by side, any would pass."""
    width = x.shape[-1:]
    alike = (w.dim() == 2 and w.shape[1:] == width and matmul_dtype(w) == kind and w.is_cpu for w in weights)
    return len(weights) > 0 and all(alike)


def concat_view(parts: Sequence[Tensor]) -> Tensor:
    """(N, F_i) each -> (N, sum F_i): a view where they already lie so in one tensor, else a copy."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    place, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        where = part.stride(), part.storage_offset(), part.untyped_storage().data_ptr(), part.is_neg()
        if where != ((width, 1), place, storage, first.is_neg()):
            return torch.cat(parts, 1)
        place += part.shape[1]
    return first.as_strided((len(first), width), (width, 1))


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kind: torch.dtype, tiles: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.widths, ctx.kind, ctx.tiles = [len(weight) for weight in weights], x.dtype, tiles
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
        g = concat_view([part.reshape(-1, part.shape[-1]) for part in gradients])
        dx = (g @ joined).view(x.shape).to(ctx.kind) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[3:]):
            return dx, None, None, *(None for _ in ctx.widths)
        x = x.reshape(-1, x.shape[-1])
        weight = weight_gradient(g, x) if ctx.tiles and worth_amx(g, x) else (g.T @ x).float()
        return dx, None, None, *weight.split(ctx.widths)


# ---------------------------------------------------------------------------------------------------------------------
# The weights' gradient on tiles


def worth_amx(g: Tensor, x: Tensor) -> bool:
    """Whether it is worth two launches and bringing both operands into blocks."""
    return min(*g.shape, x.shape[1]) >= MIN_SIZE


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g (T, out), x (T, in) bfloat16, numbers of a row side by side -> g^T x (out, in) float32, not rounded between.
    Machines that have no tiles must not call it (dispatch.why_amx_unavailable)."""
    from nanochameleon.kernels.cpu import launch
    from nanochameleon.kernels.cpu.amx import weight_gradient as compiled

    expect("weight_gradient", g, (*g.shape[:1], *x.shape[1:]), (torch.bfloat16,), x=x)
    expect("weight_gradient", g, (len(x), *g.shape[1:]), (torch.bfloat16,), g=g)
    (t, n_out), n_in = g.shape, x.shape[1]
    rows, outputs, columns = (-(-n // compiled.BLOCK) for n in (t, n_out, n_in))
    if not rows * outputs * columns:
        return torch.zeros(n_out, n_in, dtype=torch.float32, device="cpu")
    g, x = (y if y.stride(1) == 1 and is_plain_tensor(y) else y.resolve_neg().contiguous() for y in (g, x))
    pairs = torch.empty(columns, rows, compiled.BLOCK**2, dtype=torch.bfloat16, device="cpu")
    c = torch.empty(outputs * compiled.BLOCK, columns * compiled.BLOCK, dtype=torch.float32, device="cpu")
    where = {"g": g.data_ptr(), "x": x.data_ptr(), "pairs": pairs.data_ptr(), "c": c.data_ptr()}
    sizes = {"t": t, "n_out": n_out, "n_in": n_in, "g_row": 2 * g.stride(0), "x_row": 2 * x.stride(0)}
    job, threads = compiled.KernelArgs(**where, **sizes), torch.get_num_threads()
    launch.run(compiled.pack, job, rows, compiled.SCRATCH)
    launch.run(compiled.multiply, job, outputs, compiled.SCRATCH, -(-outputs // (compiled.PANELS * threads)) * threads)
    return c[:n_out, :n_in]
