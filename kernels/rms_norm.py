"""RMSNorm (arXiv 1910.07467): y = x / sqrt(mean x^2 + eps) * weight, over the last dimension.

The gradient, with r = 1 / sqrt(mean x^2 + eps) and u = g * weight:
    dx = r (u - x r^2 mean(u x)),   dweight = sum over rows of g x r

Shapes: x (..., D), weight (D,). Under autocast the result has autocast's type, that of the products which read it (with
norm_order "post" the residual sum reads it, too); otherwise that of x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.dispatch import choose


def _result_type(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps).to(_result_type(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """By the implementation that `dispatch.choose` names."""
    if choose("rms_norm", x) == "reference":
        return rms_norm_reference(x, weight, eps)
    return torch.ops.nanochameleon.rms_norm(x, weight, eps, _result_type(x) == torch.bfloat16)


def _run(name: str, eps: float, parts: int | None, d: int, **tensors: Tensor) -> None:
    import numpy as np

    from nanochameleon.kernels import launch
    from nanochameleon.kernels import rms_norm_numba as compiled

    sizes = {"d": d, "size": tensors["x"].element_size(), "y_size": tensors["y"].element_size()}
    where = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    job = compiled.Job(**(dict.fromkeys(compiled.Job._fields, 0) | where | sizes))

    def task(part: int, first: int, last: int) -> None:
        row, extra = launch.scratch(2 * d + compiled.W), (part,) if parts else ()
        getattr(compiled, name)(job, *extra, first, last, row, np.float32(eps))

    launch.run(task, tensors["x"].numel() // d, parts)


def _padded(x: Tensor) -> Tensor:
    """Contiguous, with zeros to whole registers, which change no sum; the mean is scaled back by the caller."""
    from nanochameleon.kernels.simd import W

    return F.pad(x, (0, -x.shape[-1] % W)).contiguous()


def _scaled(weight: Tensor, eps: float, width: int) -> tuple[Tensor, float, float]:
    """Padding changes mean x^2 by D / width: the same result from sqrt(D / width) weight and D / width eps."""
    share = weight.shape[0] / width
    return _padded(weight.float()) * share**0.5, eps * share, share**0.5


@torch.library.custom_op("nanochameleon::rms_norm", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, weight: Tensor, eps: float, bf16: bool) -> Tensor:
    padded = _padded(x)
    scaled, eps, _ = _scaled(weight, eps, padded.shape[-1])
    y = torch.empty_like(padded, dtype=torch.bfloat16 if bf16 else x.dtype)
    _run("forward", eps, None, padded.shape[-1], x=padded, weight=scaled, y=y)
    return y if y.shape == x.shape else y[..., : x.shape[-1]].contiguous()


@_forward.register_fake
def _(x, weight, eps, bf16):
    contiguous = torch.contiguous_format
    return torch.empty_like(x, dtype=torch.bfloat16 if bf16 else x.dtype, memory_format=contiguous)


@torch.library.custom_op("nanochameleon::rms_norm_backward", mutates_args=(), device_types="cpu")
def _backward(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    padded, upstream, d = _padded(x), _padded(g), x.shape[-1]
    scaled, eps, share = _scaled(weight, eps, padded.shape[-1])
    dx, parts = torch.empty_like(padded), torch.get_num_threads()
    d_weight = torch.zeros(parts, padded.shape[-1])
    _run("backward", eps, parts, padded.shape[-1], x=padded, weight=scaled, y=upstream, dx=dx, d_weight=d_weight)
    dx = dx if dx.shape == x.shape else dx[..., :d].contiguous()
    return dx, (d_weight.sum(0)[:d] * share).to(weight.dtype)


@_backward.register_fake
def _(g, x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, g):
    return *torch.ops.nanochameleon.rms_norm_backward(g, *ctx.saved_tensors, ctx.eps), None, None


_forward.register_autograd(_gradients, setup_context=_save)
