"""Cross-entropy with z-loss: the loss of each row of logits and the gradient of their sum.

    loss = scale * sum_i (log Z_i - x_i[y_i] + z_loss * (log Z_i)^2),   log Z_i = log sum_v exp x_i[v]

The softmax does not change if all logits shift. The z-loss (paper section 2.3) keeps them from drifting.

    zloss_cross_entropy(logits, targets)                    cross-entropy and log Z of each row
    zloss_cross_entropy_(logits, targets, z_loss, scale)    the same; the gradient overwrites the logits
    zloss_gradient_(logits, targets, log_z, z_loss, scale)  the gradient from log Z, for a vocabulary in parts

The caller knows z_loss and scale in advance, so one pass makes loss and gradient. Nothing here is recorded
by autograd: nanochameleon/losses.py connects loss and gradient.

Shapes: logits (N, V) of any float type; targets (N,) integers below V; cross-entropy and log Z (N,), float32 or wider.
A row with a negative target is ignored: zeros everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochameleon.kernels.dispatch import choose
from nanochameleon.kernels.ops import FLOAT_DTYPES, INDEX_DTYPES, KERNEL_DTYPES, expect, is_plain_tensor

# ---------------------------------------------------------------------------------------------------------------------
# Reference: any device and type


def zloss_cross_entropy_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log Z (N,), without a gradient."""
    valid, index = targets >= 0, targets.clamp(min=0).long()  # (N,)
    x = logits if logits.dtype == torch.float64 else logits.float()  # bfloat16 sums would stop growing
    log_z = x.logsumexp(-1)  # (N,)
    target_logit = x.gather(-1, index[:, None])[:, 0]  # (N,)
    return torch.where(valid, log_z - target_logit, 0), torch.where(valid, log_z, 0)


def zloss_cross_entropy_reference_(
    logits: Tensor, targets: Tensor, z_loss: float, scale: float
) -> tuple[Tensor, Tensor]:
    """The same, and overwrites the logits with their gradient. Both use the same exponentials."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    # log Z = m + log sum_v exp(x_v - m): with the largest logit m subtracted, no exponential overflows
    largest = x.amax(-1, keepdim=True)  # (N, 1)
    powers = (x - largest).exp_()  # (N, V)
    total = powers.sum(-1, keepdim=True)  # (N, 1)
    log_z = (largest + total.log())[:, 0]
    cross_entropy = log_z - x.gather(-1, targets.clamp(min=0).long()[:, None])[:, 0]
    logits.copy_(gradient_of_powers_(powers, total, targets, log_z, z_loss, scale))
    return torch.where(targets >= 0, cross_entropy, 0), torch.where(targets >= 0, log_z, 0)


def zloss_gradient_reference_(logits: Tensor, targets: Tensor, log_z: Tensor, z_loss: float, scale: float) -> None:
    shift = torch.where(targets >= 0, log_z, logits.amax(-1))[:, None]  # an ignored row has no log Z
    powers = (logits - shift).exp_()
    logits.copy_(gradient_of_powers_(powers, torch.ones_like(shift), targets, log_z, z_loss, scale))


def gradient_of_powers_(
    powers: Tensor, total: Tensor, targets: Tensor, log_z: Tensor, z_loss: float, scale: float
) -> Tensor:
    """powers (N, V) = exp(x - shift), float32 or wider, become the gradient; total (N, 1) = Z / exp(shift). A row:"""
    # d log Z / dx_v = exp(x_v) / Z = powers_v / total = p_v, the softmax
    # d loss / dx_v = scale (p_v + 2 z_loss log Z p_v - [v = y])
    factor = torch.where(targets >= 0, scale * (1 + 2 * z_loss * log_z), 0)  # (N,)
    powers *= factor[:, None] / total
    # [v = y] is subtracted here, so that the gradient is rounded once, to the logits' type. A target of V or more is in
    # another part of the vocabulary.
    n_columns = powers.shape[1]
    at_target = torch.where((targets >= 0) & (targets < n_columns), -scale, 0.0).to(powers.dtype)  # (N,)
    return powers.scatter_add_(-1, targets.clamp(0, n_columns - 1).long()[:, None], at_target[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def zloss_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log Z of each row.

    Raises ValueError for shapes or types that do not fit. For a target of V or more it raises IndexError on a CPU, and
    the reference RuntimeError. On a GPU, which does not wait to raise, our kernels make loss and gradient of the row
    NaN; in the reference an assertion of torch's `gather` ends all use of the GPU by this process.
    """
    name = implementation(logits)
    expect_rows(logits, targets, FLOAT_DTYPES if name == "reference" else KERNEL_DTYPES)
    if name == "reference":
        return zloss_cross_entropy_reference(logits, targets)
    logits, targets = logits.contiguous(), targets.long().resolve_neg().contiguous()
    if name == "cuda":
        from nanochameleon.kernels.gpu import launch as gpu

        return gpu.zloss_forward(logits, targets)
    return on_cpu("forward", logits, targets)


def zloss_cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float, scale: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log Z of each row; contiguous logits are overwritten with the gradient. Raises as above."""
    name = implementation(logits)
    expect_overwritable(logits, targets, name)
    if name == "reference":
        return zloss_cross_entropy_reference_(logits, targets, z_loss, scale)
    torch.autograd.graph.increment_version(logits)  # so that autograd notices where another op has saved them
    targets = targets.long().resolve_neg().contiguous()
    if name == "cuda":
        from nanochameleon.kernels.gpu import launch as gpu

        return gpu.zloss_overwrite(logits, targets, z_loss, scale, gpu.shared_kilobytes(logits.device.index))
    return on_cpu("overwrite", logits, targets, z_loss, scale)


def zloss_gradient_(logits: Tensor, targets: Tensor, log_z: Tensor, z_loss: float, scale: float) -> None:
    """Overwrite contiguous logits with the gradient.

    They may be some columns of a larger vocabulary. log_z (N,) is then that of all columns, and a target of V or more
    is in another part.
    """
    name = implementation(logits)
    expect_overwritable(logits, targets, name)
    expect("zloss_gradient_", logits, targets.shape, FLOAT_DTYPES, log_z=log_z)
    if name == "reference":
        zloss_gradient_reference_(logits, targets, log_z, z_loss, scale)
        return
    torch.autograd.graph.increment_version(logits)
    targets, log_z = targets.long().resolve_neg().contiguous(), log_z.float().resolve_neg().contiguous()
    if name == "cuda":
        from nanochameleon.kernels.gpu import launch as gpu

        g, h = torch.full_like(log_z, scale), 2 * scale * z_loss * log_z
        gpu.zloss_backward_(g, h, logits, targets, log_z)
        return
    run_on_cpu("backward", logits, targets, log_z=log_z, z_loss=z_loss, scale=scale)


# ---------------------------------------------------------------------------------------------------------------------
# Which implementation runs, on what


def implementation(logits: Tensor) -> str:
    """The name that `dispatch.choose` gives; "reference" for tensors that torch.compile traces: they have no memory."""
    traced = torch.compiler.is_compiling() or not is_plain_tensor(logits)
    return "reference" if traced else choose("zloss_cross_entropy", logits)


def expect_rows(logits: Tensor, targets: Tensor, types: Sequence[torch.dtype]) -> None:
    """Raises ValueError unless these are logits (N, V) of these types, V > 0, and one integer for each row."""
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"zloss_cross_entropy: logits must be (N, V) with V > 0; they are {tuple(logits.shape)}")
    expect("zloss_cross_entropy", logits, logits.shape, types, logits=logits)
    expect("zloss_cross_entropy", logits, logits.shape[:1], INDEX_DTYPES, targets=targets)


def expect_overwritable(logits: Tensor, targets: Tensor, name: str) -> None:
    expect_rows(logits, targets, FLOAT_DTYPES if name == "reference" else KERNEL_DTYPES)
    if not can_overwrite(logits):
        raise ValueError("logits that are overwritten must be contiguous, and not a view that negates them: copy them")


def can_overwrite(logits: Tensor) -> bool:
    """Whether memory holds the logits row after row, and not their negatives (torch._neg_view)."""
    return logits.is_contiguous() and (torch.compiler.is_compiling() or not logits.is_neg())


# ---------------------------------------------------------------------------------------------------------------------
# The compiled kernels of the CPU


def on_cpu(
    kernel: str, logits: Tensor, targets: Tensor, z_loss: float = 0.0, scale: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Run forward or overwrite (cpu.py) on contiguous tensors. Returns cross-entropy and log Z (N,)."""
    if len(targets) and int(targets.max()) >= logits.shape[1]:  # would be read from another row
        raise IndexError(f"target {int(targets.max())} is out of range for {logits.shape[1]} logits")
    cross_entropy, log_z = (torch.empty(len(logits), dtype=torch.float32, device="cpu") for _ in range(2))
    run_on_cpu(kernel, logits, targets, cross_entropy=cross_entropy, log_z=log_z, z_loss=z_loss, scale=scale)
    return cross_entropy, log_z


def run_on_cpu(kernel: str, logits: Tensor, targets: Tensor, **arguments: Tensor | float) -> None:
    from nanochameleon.kernels.cpu import launch
    from nanochameleon.kernels.zloss import cpu

    values = dict.fromkeys(cpu.KernelArgs._fields, 0) | {"v": logits.shape[1], "size": logits.element_size()}
    for name, x in {"logits": logits, "targets": targets, **arguments}.items():
        values[name] = x.data_ptr() if isinstance(x, Tensor) else x
    launch.run(getattr(cpu, kernel), cpu.KernelArgs(**values), len(logits), cpu.scratch(logits.shape[1]))
