"""SwiGLU's gate (arXiv 2002.05202): y = silu(a) * b, silu(a) = a sigmoid(a), elementwise.

The gradient, with s = sigmoid(a): da = g b s (1 + a (1 - s)),   db = g a s.

Shapes: a, b (..., F). The compiled op takes a and b of one shape and dtype; other inputs run on the reference, by
PyTorch's rules. Not here: the linear layers before and after the gate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.dispatch import choose
from nanochameleon.kernels.ops import KERNEL_DTYPES, expect, register_op


def swiglu_reference(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """(..., F), by the implementation that `dispatch.choose` names."""
    fits = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.dim() > 0
    if choose("swiglu", a) == "reference" or not fits:
        return swiglu_reference(a, b)
    return swiglu_op(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# The op


def _in_rows(x: Tensor) -> Tensor:
    """(N, F): a view where x is one half of a wider tensor (linear.py), else a copy."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.numel() == 0 else rows.contiguous()


def _run(name: str, **tensors: Tensor) -> None:
    from nanochameleon.kernels.block import swiglu_cpu as compiled
    from nanochameleon.kernels.cpu import launch

    a, b = tensors["a"], tensors["b"]
    sizes = dict(f=a.shape[1], a_row=a.stride(0), b_row=b.stride(0), size=a.element_size())
    args = launch.make_args(compiled.KernelArgs, tensors, **sizes)
    launch.run(getattr(compiled, name), args, len(a), 3 * compiled.W)


def _check(a: Tensor, **others: Tensor) -> None:
    expect("swiglu", a, a.shape, KERNEL_DTYPES, a=a)
    expect("swiglu", a, a.shape, (a.dtype,), **others)


def _forward(a: Tensor, b: Tensor) -> Tensor:
    _check(a, b=b)
    y = torch.empty_like(a, memory_format=torch.contiguous_format)
    _run("forward", a=_in_rows(a), b=_in_rows(b), y=y)
    return y


def _backward(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(..., 2 F): the gradient of a, then that of b, as linear.py takes them without a copy."""
    _check(a, b=b, g=g)
    both = a.new_empty(*a.shape[:-1], 2 * a.shape[-1])
    da, db = _in_rows(both).chunk(2, 1)
    _run("backward", a=_in_rows(a), b=_in_rows(b), y=g.contiguous(), da=da, db=db)
    return both


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(backward, ctx, g):
    return backward(g, *ctx.saved_tensors).chunk(2, -1)


swiglu_op = register_op("swiglu", _forward, _backward, _save, _gradients)


@torch.library.register_fake("nanochameleon::swiglu")
def _(a, b):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.register_fake("nanochameleon::swiglu_backward")
def _(g, a, b):
    return a.new_empty(*a.shape[:-1], 2 * a.shape[-1])
