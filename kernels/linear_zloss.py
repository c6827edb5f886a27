"""Output layer and z-loss cross-entropy as one op that never holds the [rows, vocabulary] logits.

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
from nanochameleon.kernels.ops import differentiable
from nanochameleon.kernels.zloss import zloss_cross_entropy, zloss_cross_entropy_reference


def linear_zloss_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return zloss_cross_entropy_reference(F.linear(hidden, weight), targets)


def linear_zloss_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """By the implementation that `dispatch.choose` names; "reference" holds the logits."""
    name = choose("linear_zloss_cross_entropy", hidden)
    if name == "reference":
        return zloss_cross_entropy(F.linear(hidden, weight), targets)
    op = linear_zloss_op if name == "numba" else torch.ops.nanochameleon.linear_zloss_cross_entropy
    return op(hidden, weight, targets)


def _tensors(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """As the kernels take them: float32, rows padded to whole registers, hidden times log2 e."""
    from nanochameleon.kernels.linear_zloss_numba import LOG2E
    from nanochameleon.kernels.simd import W

    if len(targets) and int(targets.max()) >= len(weight):
        raise IndexError(f"target {int(targets.max())} is out of range for {len(weight)} logits")
    padding = 0, -hidden.shape[1] % W
    hidden = F.pad(hidden.float(), padding) * float(LOG2E)
    weight = F.pad(weight.float(), (*padding, 0, -len(weight) % W)).contiguous()  # tiles read whole registers of rows
    return {"hidden": hidden.contiguous(), "weight": weight, "targets": targets.long().contiguous()}


def _job(tensors: dict[str, Tensor], v: int):
    from nanochameleon.kernels.linear_zloss_numba import Job

    n, width = tensors["hidden"].shape
    where = {name: x.data_ptr() for name, x in tensors.items()}
    return Job(**(dict.fromkeys(Job._fields, 0) | where | {"n": n, "v": v, "width": width}))


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from nanochameleon.kernels import launch
    from nanochameleon.kernels import linear_zloss_numba as compiled

    tensors = _tensors(hidden, weight, targets)
    cross_entropy, log_z = (torch.empty(len(hidden), dtype=torch.float32, device="cpu") for _ in range(2))
    job = _job(tensors | {"cross_entropy": cross_entropy, "log_z": log_z}, len(weight))
    tasks = -(-job.n // compiled.ROWS_A_TASK)
    launch.run(compiled.forward, job, tasks, compiled.SCRATCH + compiled.KEYS * job.width)
    return cross_entropy, log_z


def _backward(
    g: Tensor, h: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_z: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight, in their types."""
    from nanochameleon.kernels import launch
    from nanochameleon.kernels import linear_zloss_numba as compiled

    tensors = _tensors(hidden, weight, targets)
    parts = torch.get_num_threads()
    upstream = {"g": g.float().contiguous(), "h": h.float().contiguous(), "shift": log_z * float(compiled.LOG2E)}
    d_hidden, d_weight = torch.zeros_like(tensors["hidden"].expand(parts, -1, -1)), torch.empty_like(tensors["weight"])
    job = _job(tensors | upstream | {"d_hidden": d_hidden, "d_weight": d_weight}, len(weight))
    tiles, floats = -(-len(weight) // compiled.KEYS), compiled.SCRATCH + 2 * compiled.KEYS * job.width
    launch.run(compiled.backward, job, tiles, floats, parts)
    v, d = weight.shape
    total = d_hidden[0] if parts == 1 else d_hidden.sum(0)
    return total[:, :d].to(hidden.dtype).contiguous(), d_weight[:v, :d].to(weight.dtype).contiguous()


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(backward, ctx, g, h):
    return *backward(g, h, *ctx.saved_tensors), None


linear_zloss_op = differentiable("linear_zloss_cross_entropy", _forward, _backward, _save, _gradients)


@torch.library.register_fake("nanochameleon::linear_zloss_cross_entropy")
def _(hidden, weight, targets):
    return hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty(len(hidden), dtype=torch.float32)


@torch.library.register_fake("nanochameleon::linear_zloss_cross_entropy_backward")
def _(g, h, hidden, weight, targets, log_z):
    contiguous = torch.contiguous_format
    return torch.empty_like(hidden, memory_format=contiguous), torch.empty_like(weight, memory_format=contiguous)


@torch.library.register_kernel("nanochameleon::linear_zloss_cross_entropy", "cuda")
def _(hidden, weight, targets):
    from nanochameleon.kernels import linear_zloss_cuda

    return linear_zloss_cuda.forward(hidden.contiguous(), weight, targets.long().contiguous())


@torch.library.register_kernel("nanochameleon::linear_zloss_cross_entropy_backward", "cuda")
def _(g, h, hidden, weight, targets, log_z):
    from nanochameleon.kernels import linear_zloss_cuda

    g, h = g.float().contiguous(), h.float().contiguous()
    return linear_zloss_cuda.backward(g, h, hidden.contiguous(), weight, targets.long().contiguous(), log_z)
