"""Spread a model over the ranks of a mesh: DDP, FSDP2 or tensor parallelism, all of them torch's own.

Training calls it in this order:

    objective = Objective(model, ...)               the model is on the meta device, without weights
    parallelize(objective, mesh, parallel)          shard it, if it is to be sharded
    model.to_empty(device=...), then its weights    each rank sets only what it holds (sharding.shard_like)
    wrap(objective, mesh, parallel)                 compile it, and let DDP wrap it

transformer.py knows nothing of this. Results do not depend on the mesh, up to rounding: losses are sums divided by the
count of the whole batch, and every random draw is a function of (seed, step, sequence).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochameleon.config import ModelConfig, ParallelConfig
from nanochameleon.errors import UserError
from nanochameleon.parallel.compile import compile_blocks
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.parallel.sharding import is_sharded
from nanochameleon.training.objective import Objective
from nanochameleon.transformer import Chameleon, LMHead, QKNorm, RMSNorm

# ---------------------------------------------------------------------------------------------------------------------
# Tensor parallelism: classes that take the place of the transformer's
#
# Parameters become DTensors. torch's own linear layers take them as they are; our kernels take plain tensors.


class TensorParallelLinear(nn.Linear):
    """nn.Linear under another name, since the transformer fuses plain nn.Linears past the hooks that split them."""


class TensorParallelLMHead(LMHead):
    """Logits of this rank's part of the vocabulary."""

    def forward(self, x: Tensor, vocab_slice: slice = slice(None)) -> Tensor:
        return F.linear(x, self.weight[vocab_slice])  # (..., V / tp_size)


class ReplicatedRMSNorm(RMSNorm):
    def affine(self) -> Tensor:
        return self.weight.to_local()  # (D,)


class TensorParallelQKNorm(QKNorm):
    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the groups that this rank's heads belong to, as plain tensors."""
        from torch.distributed.tensor import Partial

        tp_mesh, n_groups = self.weight.device_mesh, len(self.weight)
        rank, tp_size = tp_mesh.get_local_rank(), tp_mesh.size()
        groups = slice(rank * n_groups // tp_size, -(-(rank + 1) * n_groups // tp_size))  # at least one
        # every rank holds all groups but sees only its own heads, so gradients are partial sums over the ranks
        weight, bias = (x.to_local(grad_placements=[Partial()]) for x in (self.weight, self.bias))
        return weight[groups], bias[groups]  # (groups of this rank, E)


SWAPS = {
    nn.Linear: TensorParallelLinear,
    LMHead: TensorParallelLMHead,
    RMSNorm: ReplicatedRMSNorm,
    QKNorm: TensorParallelQKNorm,
}


def check_tensor_parallel(cfg: ModelConfig, tp_size: int) -> None:
    """Raises UserError where a layer cannot be split into tp_size equal parts."""
    groups = cfg.qk_norm_groups
    for name, number in (("n_kv_heads", cfg.kv_heads), ("feed-forward width", cfg.ffn_dim)):
        if number % tp_size:
            raise UserError(f"parallel.tensor_parallel is {tp_size}, which must divide the model's {name}, {number}")
    if groups % tp_size and tp_size % groups:
        both = f"parallel.tensor_parallel is {tp_size} and model.qk_norm_groups {groups}"
        raise UserError(f"{both}: one must divide the other")


def apply_tensor_parallel(model: Chameleon, mesh: Mesh) -> None:
    """Split every layer's heads, feed-forward width and vocabulary over mesh.tp_size ranks, in place.

    Norms are replicated. The gradient of a block's norms is the same on each rank, because the backward pass of the
    branch after it ends with an all-reduce. The gradient of QK-norm is a partial sum, see TensorParallelQKNorm.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    check_tensor_parallel(model.cfg, mesh.tp_size)
    tp_mesh = mesh.device_mesh["tp"]
    plan: dict[str, Any] = {"tok_embeddings": RowwiseParallel(input_layouts=Replicate()), "output": ColwiseParallel()}
    # Megatron's split: the first matmul of a branch by columns (heads, ffn_dim), the last by rows, so that the only
    # all-reduce of a branch is at its end
    for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3"):
        plan[f"layers.*.{name}"] = ColwiseParallel()
    for name in ("attention.wo", "feed_forward.w2"):
        plan[f"layers.*.{name}"] = RowwiseParallel()
    parallelize_module(model, tp_mesh, plan, src_data_rank=None)
    for module in model.modules():
        # a new class on the same object keeps its parameters, their names and torch's hooks
        module.__class__ = SWAPS.get(type(module), type(module))
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not is_sharded(parameter):  # norms: a DTensor, too, since FSDP and optimizers want one mesh for all
                replicated = distribute_tensor(parameter.detach(), tp_mesh, [Replicate()], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(replicated))


def apply_fsdp(objective: Objective, mesh: Mesh) -> None:
    """FSDP2, in place: each rank holds a shard of every tensor and gathers a block's weights while the block runs.

    Weights are gathered in the type of the matmuls; gradients are summed in fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    matmul_dtype = torch.bfloat16 if objective.precision == "bf16" else None
    policy = MixedPrecisionPolicy(matmul_dtype, torch.float32, cast_forward_inputs=False)  # keep the residuals in fp32
    for block in objective.model.layers:
        fully_shard(block, mesh=mesh.device_mesh["dp"], mp_policy=policy)
    fully_shard(objective, mesh=mesh.device_mesh["dp"], mp_policy=policy)


def uses_fsdp(mesh: Mesh, parallel: ParallelConfig) -> bool:
    """Whether the model is sharded. Tensor parallelism implies FSDP over the ranks that split the batch."""
    return mesh.world_size > 1 and (parallel.data_parallel == "fsdp" or mesh.tp_size > 1)


def parallelize(objective: Objective, mesh: Mesh, parallel: ParallelConfig) -> None:
    """Shard the model in place if it is to be sharded. Its weights are on the meta device: no rank ever holds all."""
    if not uses_fsdp(mesh, parallel):
        return
    if mesh.tp_size > 1:
        apply_tensor_parallel(objective.model, mesh)
    apply_fsdp(objective, mesh)


@dataclass(frozen=True)
class ParallelModel:
    """The objective as a rank runs it."""

    wrapped: nn.Module  # what the training step calls: the objective itself, or DDP around it
    objective: Objective
    mesh: Mesh

    @property
    def model(self) -> Chameleon:
        return self.objective.model

    @contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        """Sum gradients over ranks in this micro-batch's backward pass, or leave that to a later one."""
        if hasattr(self.wrapped, "set_requires_gradient_sync"):  # FSDP2
            self.wrapped.set_requires_gradient_sync(enabled)
        with self.wrapped.no_sync() if not enabled and hasattr(self.wrapped, "no_sync") else nullcontext():  # DDP
            yield


def wrap(objective: Objective, mesh: Mesh, parallel: ParallelConfig) -> ParallelModel:
    """Compile and wrap an objective whose weights are set."""
    objective.model.activation_checkpointing = parallel.activation_checkpointing
    compile_blocks(objective.model.layers, parallel.compile, mesh.device, mesh.tp_size)
    if mesh.world_size == 1 or uses_fsdp(mesh, parallel):
        return ParallelModel(objective, objective, mesh)
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
    return ParallelModel(wrapped, objective, mesh)
