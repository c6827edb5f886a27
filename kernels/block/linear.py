"""Linear layers that read one input, as one matmul: queries, keys and values, or the two inputs of SwiGLU.

    y_1, y_2, ... = x W_1^T, x W_2^T, ...,   dx = sum_i dy_i W_i,   dW_i = dy_i^T x

With stacked weights dx is one matmul without sums after it, and one wide matmul is faster than several narrow ones.
The weights stay apart as parameters. Each call copies them into one tensor of the matmul's dtype, where autocast would
cast them one by one. The results are views of one tensor, and gradients that are such views are taken without a copy
(`concat_view`).

On a processor with AMX the weight gradient has a matmul of its own (../cpu/bf16/): torch runs g^T x at half speed, and
rounds the result to bfloat16 before it becomes float32. Not here: biases.

Shapes: x (..., K), weights (N_i, K).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.dispatch import decide
from nanochameleon.kernels.ops import expect, is_plain_tensor, matmul_dtype

MIN_SIZE = 64  # rows, inputs and outputs: below it, padding and launches cost more than AMX saves


def linear_reference(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight) for weight in weights)


def linear(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(..., N_i) each, by the implementation that `dispatch.decide` names for the matmul's dtype.

    torch.compile traces the reference, which also raises for shapes that do not fit.
    """
    dtype = matmul_dtype(x)
    name = decide("linear", x.device, dtype)[0]
    if name == "reference" or torch.compiler.is_compiling() or not _joinable(x, weights, dtype):
        return linear_reference(x, weights)
    return _Joined.apply(x, dtype, name == "bf16", *weights)


def _joinable(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether torch would multiply x by each weight. A copy into one tensor would accept any shape and dtype."""
    width = x.shape[-1:]
    fits = (w.dim() == 2 and w.shape[1:] == width and matmul_dtype(w) == dtype and w.is_cpu for w in weights)
    return len(weights) > 0 and all(fits)


def concat_view(parts: Sequence[Tensor]) -> Tensor:
    """(N, F_i) each -> (N, sum F_i): a view where they are adjacent columns of one tensor, else a copy."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    offset, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        where = part.stride(), part.storage_offset(), part.untyped_storage().data_ptr(), part.is_neg()
        if where != ((width, 1), offset, storage, first.is_neg()):
            return torch.cat(parts, 1)
        offset += part.shape[1]
    return first.as_strided((len(first), width), (width, 1))


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, pairs: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.widths, ctx.dtype, ctx.pairs = [len(weight) for weight in weights], x.dtype, pairs
        joined = torch.empty(sum(ctx.widths), x.shape[-1], dtype=dtype, device=x.device)  # (sum N_i, K)
        for part, weight in zip(joined.split(ctx.widths), weights, strict=True):
            part.copy_(weight)
        x = x.to(dtype)
        ctx.save_for_backward(x, joined)
        return F.linear(x, joined).split(ctx.widths, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, joined = ctx.saved_tensors
        g = concat_view([part.reshape(-1, part.shape[-1]) for part in gradients])  # (rows, sum N_i)
        dx = (g @ joined).view(x.shape).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[3:]):
            return dx, None, None, *(None for _ in ctx.widths)
        x = x.reshape(-1, x.shape[-1])
        weight = weight_gradient(g, x) if ctx.pairs and worth_packing(g, x) else (g.T @ x).float()
        return dx, None, None, *weight.split(ctx.widths)


# ---------------------------------------------------------------------------------------------------------------------
# The weight gradient by pairs of bfloat16


def worth_packing(g: Tensor, x: Tensor) -> bool:
    """Whether the matmul is large enough to pay for two launches and for packing both operands."""
    return min(*g.shape, x.shape[1]) >= MIN_SIZE


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g (T, out), x (T, in) bfloat16 -> g^T x (out, in) float32, never rounded to bfloat16.

    Only for processors that multiply pairs (dispatch.why_bf16_unavailable).
    """
    from nanochameleon.kernels.cpu import launch
    from nanochameleon.kernels.cpu.bf16 import weight_gradient as compiled

    expect("weight_gradient", g, (*g.shape[:1], *x.shape[1:]), (torch.bfloat16,), x=x)
    expect("weight_gradient", g, (len(x), *g.shape[1:]), (torch.bfloat16,), g=g)
    (t, n_out), n_in = g.shape, x.shape[1]
    rows, outputs, columns = (-(-n // compiled.BLOCK) for n in (t, n_out, n_in))
    if not rows * outputs * columns:
        return torch.zeros(n_out, n_in, dtype=torch.float32, device="cpu")
    g, x = (y if y.stride(1) == 1 and is_plain_tensor(y) else y.resolve_neg().contiguous() for y in (g, x))
    pairs = torch.empty(columns, rows, compiled.BLOCK**2, dtype=torch.bfloat16, device="cpu")
    c = torch.empty(outputs * compiled.BLOCK, columns * compiled.BLOCK, dtype=torch.float32, device="cpu")
    sizes = dict(t=t, n_out=n_out, n_in=n_in, g_row=2 * g.stride(0), x_row=2 * x.stride(0))
    args = launch.make_args(compiled.KernelArgs, dict(g=g, x=x, pairs=pairs, c=c), **sizes)
    threads = torch.get_num_threads()
    chunks = -(-outputs // (compiled.PANELS * threads)) * threads  # at most PANELS panels each, evenly over threads
    launch.run(compiled.pack_x, args, rows, compiled.SCRATCH)
    launch.run(compiled.matmul_panels, args, outputs, compiled.SCRATCH, chunks)
    return c[:n_out, :n_in]
