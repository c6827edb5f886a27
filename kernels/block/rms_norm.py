"""RMSNorm (arXiv 1910.07467), alone and fused with the residual sum next to it in a transformer block:

    rms_norm   y = x / sqrt(mean x^2 + eps) * weight    over the last dimension
    add_norm   s = x + branch,   y = rms_norm(s)        norm before each branch (7B): s is the residual stream
    norm_add   x + rms_norm(branch)                     norm after each branch (34B)

The norm's gradient, with r = 1 / sqrt(mean x^2 + eps) and u = g * weight:
    dx = r (u - x r^2 mean(u x)),   dweight = sum over rows of g x r

Shapes: x and branch (..., D), weight (D,); s has the dtype of x. Under autocast y has autocast's dtype, that of the
matmuls which read it; otherwise that of x. Inputs that the compiled ops do not take (a branch that is broadcast or of a
wider dtype than x, a weight of several dimensions, empty tensors) run on the reference, by PyTorch's rules.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.dispatch import choose
from nanochameleon.kernels.ops import FLOAT_DTYPES, KERNEL_DTYPES, expect, matmul_dtype, register_op


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, weight.dtype)  # torch runs six kernels in place of one where these differ
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(matmul_dtype(x))


def add_norm_reference(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    s = x + branch
    return s, rms_norm_reference(s, weight, eps)


def norm_add_reference(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x + rms_norm_reference(branch, weight, eps)


def _compilable(x: Tensor, branch: Tensor, weight: Tensor) -> bool:
    """Whether the compiled ops take these inputs."""
    if x.dtype != branch.dtype and (x.dtype, branch.dtype) != (torch.float32, torch.bfloat16):
        return False
    vector = weight.dim() == 1 and weight.shape == x.shape[-1:] and weight.dtype in FLOAT_DTYPES and x.numel() > 0
    return vector and x.shape == branch.shape and x.device == branch.device == weight.device


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y (..., D), by the implementation that `dispatch.choose` names."""
    dtype = matmul_dtype(x)
    if choose("rms_norm", x) == "reference" or dtype not in KERNEL_DTYPES or not _compilable(x, x, weight):
        return rms_norm_reference(x, weight, eps)
    return rms_norm_op(x, weight, eps, dtype == torch.bfloat16)


def add_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s, y), both (..., D)."""
    dtype = matmul_dtype(x)
    if choose("rms_norm", x) == "reference" or dtype not in KERNEL_DTYPES or not _compilable(x, branch, weight):
        return add_norm_reference(x, branch, weight, eps)
    return add_norm_op(x, branch, weight, eps, dtype == torch.bfloat16)


def norm_add(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> Tensor:
    """s (..., D)."""
    if choose("rms_norm", x) == "reference" or not _compilable(x, branch, weight):
        return norm_add_reference(x, branch, weight, eps)
    return norm_add_op(x, branch, weight, eps)


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def _run(name: str, weight: Tensor, eps: float, parts: int | None = None, **tensors: Tensor | None) -> Tensor | None:
    """Run a kernel on contiguous tensors. Given `parts`, run that many chunks and return the weight's gradient."""
    from nanochameleon.kernels.block import rms_norm_cpu as compiled
    from nanochameleon.kernels.cpu import launch

    x, d = tensors["x"], len(weight)
    expect("rms_norm", x, x.shape, KERNEL_DTYPES, **tensors)
    expect("rms_norm", x, x.shape[-1:], FLOAT_DTYPES, weight=weight)
    width = -(-d // compiled.W) * compiled.W
    tensors["weight"] = weight.float().contiguous() if d == width else F.pad(weight.float(), (0, width - d))
    tensors["d_weight"] = torch.zeros(parts, width, dtype=torch.float32, device="cpu") if parts else None
    sized = {"size": ("x", "dx"), "branch_size": ("branch", "d_branch"), "y_size": ("y", "dy")}
    sizes = {key: next((tensors[n].element_size() for n in names if n in tensors), 0) for key, names in sized.items()}
    args = launch.make_args(compiled.KernelArgs, tensors, **sizes, d=d, width=width, eps=eps)
    launch.run(getattr(compiled, name), args, x.shape[:-1].numel(), 3 * width, parts)
    return tensors["d_weight"].sum(0)[:d].to(weight.dtype) if parts else None


def _new(x: Tensor, bf16: bool = False) -> Tensor:
    return torch.empty_like(x, dtype=torch.bfloat16 if bf16 else x.dtype, memory_format=torch.contiguous_format)


def _norm(x: Tensor, weight: Tensor, eps: float, bf16: bool) -> Tensor:
    y = _new(x, bf16)
    _run("add_norm", weight, eps, x=x.contiguous(), y=y)
    return y


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx, parts = _new(x), 4 * torch.get_num_threads()
    return dx, _run("add_norm_backward", weight, eps, parts, x=x.contiguous(), dy=dy.contiguous(), dx=dx)


def _add_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float, bf16: bool) -> tuple[Tensor, Tensor]:
    s, y = _new(x), _new(x, bf16)
    _run("add_norm", weight, eps, x=x.contiguous(), branch=branch.contiguous(), s=s, y=y)
    return s, y


def _add_norm_backward(
    ds: Tensor, dy: Tensor, s: Tensor, weight: Tensor, eps: float, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the branch (the same in bfloat16; empty unless `narrow`), and of the weight."""
    dx, d_branch, parts = _new(s), _new(s, narrow) if narrow else s.new_empty(0), 4 * torch.get_num_threads()
    given = dict(x=s, ds=ds.contiguous(), dy=dy.contiguous(), dx=dx) | (dict(d_branch=d_branch) if narrow else {})
    return dx, d_branch, _run("add_norm_backward", weight, eps, parts, **given)


def _norm_add(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> Tensor:
    s = _new(x)
    _run("norm_add", weight, eps, x=x.contiguous(), branch=branch.contiguous(), s=s)
    return s


def _norm_add_backward(ds: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx, parts = _new(branch), 4 * torch.get_num_threads()
    return dx, _run("add_norm_backward", weight, eps, parts, x=branch.contiguous(), dy=ds.contiguous(), dx=dx)


def _save_norm(ctx, inputs, output) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _save_add_norm(ctx, inputs, output) -> None:
    x, branch, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(output[0], weight)
    ctx.narrow, ctx.dtype = x.dtype == torch.float32 and branch.dtype == torch.bfloat16, branch.dtype


def _save_norm_add(ctx, inputs, output) -> None:
    _, branch, weight, ctx.eps = inputs
    ctx.save_for_backward(branch, weight)


def _norm_gradients(backward, ctx, dy):
    return *backward(dy, *ctx.saved_tensors, ctx.eps), None, None


def _add_norm_gradients(backward, ctx, ds, dy):
    dx, d_branch, d_weight = backward(ds, dy, *ctx.saved_tensors, ctx.eps, ctx.narrow)
    return dx, d_branch if ctx.narrow else dx.to(ctx.dtype), d_weight, None, None


def _norm_add_gradients(backward, ctx, ds):
    return ds, *backward(ds, *ctx.saved_tensors, ctx.eps), None


rms_norm_op = register_op("rms_norm", _norm, _norm_backward, _save_norm, _norm_gradients)
add_norm_op = register_op("add_norm", _add_norm, _add_norm_backward, _save_add_norm, _add_norm_gradients)
norm_add_op = register_op("norm_add", _norm_add, _norm_add_backward, _save_norm_add, _norm_add_gradients)


@torch.library.register_fake("nanochameleon::rms_norm")
def _(x, weight, eps, bf16):
    return _new(x, bf16)


@torch.library.register_fake("nanochameleon::rms_norm_backward")
def _(dy, x, weight, eps):
    return _new(x), torch.empty_like(weight)


@torch.library.register_fake("nanochameleon::add_norm")
def _(x, branch, weight, eps, bf16):
    return _new(x), _new(x, bf16)


@torch.library.register_fake("nanochameleon::add_norm_backward")
def _(ds, dy, s, weight, eps, narrow):
    return _new(s), _new(s, narrow) if narrow else s.new_empty(0), torch.empty_like(weight)


@torch.library.register_fake("nanochameleon::norm_add")
def _(x, branch, weight, eps):
    return _new(x)


@torch.library.register_fake("nanochameleon::norm_add_backward")
def _(ds, branch, weight, eps):
    return _new(branch), torch.empty_like(weight)
