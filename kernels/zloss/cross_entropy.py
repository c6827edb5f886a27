"""Cross-entropy with z-loss on logits: the plain reference, one for autograd by hand, and the compiled op.

    loss_i = lse_i - x_i[y_i]          cross-entropy, lse_i = log sum_v exp x_i[v] = log Z_i
    z_i    = lse_i^2                   the softmax cannot see a shift of all logits; this keeps them from drifting

The total of paper section 2.3 is sum_i loss_i + 1e-5 z_i; its gradient is p_v (1 + 2 * 1e-5 * lse_i) - [v = y_i].

Shapes: logits (N, V) of any float type, targets (N,) int64 below V. A row whose target is negative is ignored: zeros in
every output, and no gradient. All functions return the cross-entropy (N,) and log Z (N,), float32 or wider. A mean over
no rows at all is the caller's to avoid: rows stay apart here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochameleon.kernels.dispatch import choose
from nanochameleon.kernels.ops import FLOAT_DTYPES, INDEX_DTYPES, KERNEL_DTYPES, expect, is_plain_tensor, register_op


def zloss_cross_entropy_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The formula, differentiated by autograd."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    counted = targets >= 0
    log_z = x.logsumexp(-1)
    loss = log_z - x.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(counted, loss, 0), torch.where(counted, log_z, 0)


class _ZLossCrossEntropy(torch.autograd.Function):
    """The gradient by hand, from the one buffer e = exp(x - max) that the forward pass makes.

    With upstream gradients g for the cross-entropy and h for log Z:
        dx_v = (g + h) p_v - g [v = y],   p = e / sum e
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = logits if logits.dtype == torch.float64 else logits.float()
        counted, targets = targets >= 0, targets.clamp(min=0)
        largest = x.amax(-1, keepdim=True)
        e = (x - largest).exp_()
        total = e.sum(-1, keepdim=True)
        log_z = (total.log() + largest)[:, 0]
        ctx.save_for_backward(e, total, targets, counted)
        ctx.dtype = logits.dtype
        loss = log_z - x.gather(-1, targets[:, None])[:, 0]
        return torch.where(counted, loss, 0), torch.where(counted, log_z, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor, h: Tensor) -> tuple[Tensor, None]:
        e, total, targets, counted = ctx.saved_tensors
        g, h = torch.where(counted, g, 0), torch.where(counted, h, 0)
        gradient = e * ((g + h)[:, None] / total)
        gradient.scatter_add_(-1, targets[:, None], -g[:, None])
        return gradient.to(ctx.dtype), None


def zloss_cross_entropy_by_hand(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Equal to the reference, in torch's operations but with fewer of them: any device and type."""
    expect_rows(logits, targets, FLOAT_DTYPES)
    return _ZLossCrossEntropy.apply(logits, targets)


def expect_rows(logits: Tensor, targets: Tensor, types: Sequence[torch.dtype] = KERNEL_DTYPES) -> None:
    """Raises ValueError where these are not logits (N, V) of these types, V > 0, and one whole number for each row."""
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"zloss_cross_entropy: logits must be (N, V) with V > 0; they are {tuple(logits.shape)}")
    expect("zloss_cross_entropy", logits, logits.shape, types, logits=logits)
    expect("zloss_cross_entropy", logits, logits.shape[:1], INDEX_DTYPES, targets=targets)


def zloss_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Equal to the reference, by the implementation that `dispatch.choose` names. Raises ValueError for shapes or types
    that do not fit, and on a CPU IndexError for a target from V on; on a GPU the loss of such a row is NaN."""
    name = choose("zloss_cross_entropy", logits)
    if name == "reference":
        return zloss_cross_entropy_by_hand(logits, targets)
    return (zloss_op if name == "numba" else torch.ops.nanochameleon.zloss_cross_entropy)(logits, targets)


# ---------------------------------------------------------------------------------------------------------------------
# The op


def _run(
    name: str, logits: Tensor, targets: Tensor, z_loss: float = 0.0, share: float = 0.0, **tensors: Tensor
) -> None:
    from nanochameleon.kernels.cpu import launch
    from nanochameleon.kernels.zloss import cpu as zloss_numba

    where = {key: x.data_ptr() for key, x in (("logits", logits), ("targets", targets), *tensors.items())}
    sizes = {"v": logits.shape[1], "size": logits.element_size(), "z_loss": z_loss, "share": share}
    job = zloss_numba.KernelArgs(**(dict.fromkeys(zloss_numba.KernelArgs._fields, 0) | where | sizes))
    launch.run(getattr(zloss_numba, name), job, len(logits), zloss_numba.scratch(logits.shape[1]))


def _checked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous. Raises ValueError where they do not fit, IndexError for a target that no row of logits has."""
    expect_rows(logits, targets)
    if len(targets) and int(targets.max()) >= logits.shape[1]:
        raise IndexError(f"target {int(targets.max())} is out of range for {logits.shape[1]} logits")
    return logits.contiguous(), targets.long().contiguous()


def forward_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of contiguous logits and targets below V."""
    cross_entropy, log_z = (torch.empty(len(logits), dtype=torch.float32, device="cpu") for _ in range(2))
    _run("forward", logits, targets, cross_entropy=cross_entropy, log_z=log_z)
    return cross_entropy, log_z


def backward_(g: Tensor, h: Tensor, logits: Tensor, targets: Tensor, log_z: Tensor) -> None:
    """The gradient in the place of contiguous logits, which may be a stretch of the columns: a target from V on is in
    another, and log Z that of all."""
    _run("backward", logits, targets, log_z=log_z, g=g, h=h, gradient=logits)


def _forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return forward_rows(*_checked(logits, targets))


def _expect_gradients(g: Tensor, h: Tensor, logits: Tensor, targets: Tensor, log_z: Tensor) -> None:
    expect_rows(logits, targets)
    expect("zloss_cross_entropy", logits, targets.shape, FLOAT_DTYPES, g=g, h=h, log_z=log_z)


def _backward(g: Tensor, h: Tensor, logits: Tensor, targets: Tensor, log_z: Tensor) -> Tensor:
    """The gradient of the logits, in their type, for the gradients g and h of the two outputs."""
    _expect_gradients(g, h, logits, targets, log_z)
    logits, targets = logits.contiguous(), targets.long().contiguous()
    gradient = torch.empty_like(logits)
    g, h, log_z = (x.float().contiguous() for x in (g, h, log_z))
    _run("backward", logits, targets, log_z=log_z, g=g, h=h, gradient=gradient)
    return gradient


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(backward, ctx, g, h):
    return backward(g, h, *ctx.saved_tensors), None


zloss_op = register_op("zloss_cross_entropy", _forward, _backward, _save, _gradients)


@torch.library.register_fake("nanochameleon::zloss_cross_entropy")
def _(logits, targets):
    return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.register_fake("nanochameleon::zloss_cross_entropy_backward")
def _(g, h, logits, targets, log_z):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_kernel("nanochameleon::zloss_cross_entropy", "cuda")
def _(logits, targets):
    from nanochameleon.kernels.gpu import launch as gpu

    expect_rows(logits, targets)
    return gpu.zloss_forward(logits.contiguous(), targets.long().contiguous())


@torch.library.register_kernel("nanochameleon::zloss_cross_entropy_backward", "cuda")
def _(g, h, logits, targets, log_z):
    from nanochameleon.kernels.gpu import launch as gpu

    _expect_gradients(g, h, logits, targets, log_z)
    g, h, log_z = (x.float().contiguous() for x in (g, h, log_z))
    return gpu.zloss_backward(g, h, logits.contiguous(), targets.long().contiguous(), log_z)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient in the logits' place


class Expected(NamedTuple):
    """A loss whose upstream gradient is known before: share * sum (cross-entropy + z_loss * (log Z)^2)."""

    z_loss: float
    share: float  # not 0


def zloss_cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float, share: float) -> tuple[Tensor, Tensor]:
    """Overwrites contiguous logits with the gradient of share * sum (loss + z_loss * z), in one pass over memory.

    To be differentiated once: the gradient that autograd gets is the logits' own memory. Should the loss turn out to be
    another one, it is corrected there. float32 and bfloat16.
    """
    if not logits.is_contiguous() or not is_plain_tensor(logits):
        raise ValueError("logits that are overwritten must be contiguous, and not negated whenever they are read")
    return _InPlace.apply(logits, targets, z_loss, share)


def fits_in_place(logits: Tensor) -> bool:
    """Whether that is the way for logits that nobody reads again. On a GPU it would have to wait for the correction."""
    if torch.compiler.is_compiling() or not is_plain_tensor(logits) or not logits.is_contiguous():
        return False
    return torch.is_grad_enabled() and logits.requires_grad and choose("zloss_cross_entropy", logits) == "numba"


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, z_loss: float, share: float) -> tuple[Tensor, Tensor]:
        cross_entropy, log_z = _overwrite(logits, targets, z_loss, share)
        torch.autograd.graph.increment_version(logits)  # whoever kept them for a gradient of his own is told
        ctx.save_for_backward(logits.detach(), targets, log_z)  # as memory: they may be a view of another op's output
        ctx.expected, ctx.taken = (z_loss, share), False
        return cross_entropy, log_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor, h: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.taken:
            raise RuntimeError("the logits' place holds one gradient, which was taken: use zloss_cross_entropy")
        ctx.taken, (gradient, targets, log_z) = True, ctx.saved_tensors
        return _corrected_(gradient, targets, log_z, g, h, *ctx.expected), None, None, None


def _corrected_(gradient, targets, log_z, g, h, z_loss: float, share: float) -> Tensor:
    """made p - share [v = y] -> (g + h) p - g [v = y], where made = share (1 + 2 z_loss log Z), away from zero."""
    from nanochameleon.kernels.zloss.cpu import LEAST_FACTOR

    counted, made = targets >= 0, 1 + 2 * z_loss * log_z
    made = torch.where(made.abs() > float(LEAST_FACTOR), made, float(LEAST_FACTOR))
    ratio = torch.where(counted, (g + h) / (share * made), 1)
    own = torch.where(counted, share * ratio - g, 0)
    near = 8 * torch.finfo(torch.float32).eps  # h comes by another order of the same products
    if bool(((ratio - 1).abs() <= near).all() and (own.abs() <= near * abs(share)).all()):
        return gradient
    gradient *= ratio[:, None]
    return gradient.scatter_add_(1, targets.clamp(min=0)[:, None], own[:, None].to(gradient.dtype))


def _overwrite(logits: Tensor, targets: Tensor, z_loss: float, share: float) -> tuple[Tensor, Tensor]:
    if logits.is_cuda:
        expect_rows(logits, targets)
        from nanochameleon.kernels.gpu import launch as gpu

        kilobytes = gpu.shared_kilobytes(logits.device.index)
        return gpu.zloss_overwrite(logits, targets.long().contiguous(), z_loss, share, kilobytes)
    targets = _checked(logits, targets)[1]
    cross_entropy, log_z = (torch.empty(len(logits), dtype=torch.float32, device="cpu") for _ in range(2))
    _run("overwrite", logits, targets, z_loss, share, cross_entropy=cross_entropy, log_z=log_z)
    return cross_entropy, log_z
