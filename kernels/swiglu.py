"""SwiGLU's gate (arXiv 2002.05202): y = silu(a) * b, silu(a) = a sigmoid(a), elementwise.

The gradient, with s = sigmoid(a): da = g b s (1 + a (1 - s)),   db = g a s. a and b of one shape and type.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.dispatch import choose


def swiglu_reference(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """By the implementation that `dispatch.choose` names."""
    if choose("swiglu", a) == "reference":
        return swiglu_reference(a, b)
    return torch.ops.nanochameleon.swiglu(a, b)


def _run(name: str, **tensors: Tensor) -> None:
    from nanochameleon.kernels import launch
    from nanochameleon.kernels import swiglu_numba as compiled

    where = {key: x.data_ptr() for key, x in tensors.items()}
    sizes = {"n": tensors["a"].numel(), "size": tensors["a"].element_size()}
    job = compiled.Job(**(dict.fromkeys(compiled.Job._fields, 0) | where | sizes))
    kernel, floats = getattr(compiled, name), 3 * compiled.CHUNK
    chunks = -(-sizes["n"] // compiled.CHUNK)
    launch.run(lambda part, first, last: kernel(job, first, last, launch.scratch(floats)), chunks)


@torch.library.custom_op("nanochameleon::swiglu", mutates_args=(), device_types="cpu")
def _forward(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty_like(a)
    _run("forward", a=a, b=b, y=y)
    return y


@_forward.register_fake
def _(a, b):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.custom_op("nanochameleon::swiglu_backward", mutates_args=(), device_types="cpu")
def _backward(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b, g = a.contiguous(), b.contiguous(), g.contiguous()
    da, db = torch.empty_like(a), torch.empty_like(b)
    _run("backward", a=a, b=b, y=g, da=da, db=db)
    return da, db


@_backward.register_fake
def _(g, a, b):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, b))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, g):
    return torch.ops.nanochameleon.swiglu_backward(g, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save)
