"""What happens once before the first step of the transformer: weights are set, sizes and kernels printed."""

from contextlib import AbstractContextManager, nullcontext

import torch

from nanochameleon.config import ModelConfig, ParallelConfig, TrainConfig
from nanochameleon.data import Loader
from nanochameleon.errors import say
from nanochameleon.kernels.dispatch import explain, use_proofs
from nanochameleon.kernels.gpu import proof
from nanochameleon.parallel.compile import choose_compile
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.parallel.sharding import shard_like
from nanochameleon.training.flops import flops_per_token, peak_flops
from nanochameleon.training.precision import matmul_flops, precision_dtype
from nanochameleon.transformer import Chameleon
from nanochameleon.weights.read_layouts import ModelFiles


def init_or_load_weights(model: Chameleon, loaded: ModelFiles | None, seed: int) -> None:
    """Set all weights to those of another model, or to random ones. Each rank sets the part it holds."""
    with torch.no_grad():
        for name, target in model.state_dict().items():
            full = loaded.weights.get(name) if loaded else model.init_tensor(name, target.shape, seed, target.device)
            target.copy_(shard_like(full, target))


def use_agreed_proofs(mesh: Mesh) -> AbstractContextManager[None]:
    """Inside, this rank takes CUDA kernels by the same proofs as every other rank. For the thread that trains."""
    on_gpu = mesh.device.type == "cuda" and mesh.world_size > 1
    return use_proofs(agree(mesh, proof.load(mesh.device))) if on_gpu else nullcontext()


def agree(mesh: Mesh, mine: proof.Proofs) -> proof.Proofs:
    """Return rank 0's proofs; none at all if a rank has another GPU or other versions, for which they say nothing."""
    rank0 = mesh.broadcast(mine)
    (differ,) = mesh.all_reduce_max(float(mine.identity != rank0.identity))
    return proof.Proofs(absent="the ranks differ in their GPUs or versions") if differ else rank0


def log_setup(model: Chameleon, loader: Loader, mesh: Mesh, precision: str, parallel: ParallelConfig) -> None:
    """Print the sizes of the model and the mesh, which kernels run, and whether blocks are compiled."""
    if not mesh.is_rank0:
        return
    for name, source in loader.sources.items():
        if source.n_too_long:
            say(f"{source.n_too_long:,} documents of {name} are longer than {loader.seq_len} tokens and left out")
    grid = f"{mesh.dp_size} x {mesh.tp_size}, {parallel.data_parallel}"
    ranks = f", {mesh.world_size} ranks ({grid})" if mesh.world_size > 1 else ""
    size = sum(p.numel() for p in model.parameters())
    say(f"transformer: {size:,} parameters, {precision} on {mesh.device}{ranks}")
    say(explain(mesh.device, precision_dtype(precision), model.cfg.head_dim))
    compiled, why = choose_compile(parallel.compile, mesh.device, mesh.tp_size)
    say(f"{'torch.compile':27} {'on' if compiled else 'off':10} {why}")


def mfu_per_token(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> float | None:
    """The fraction of all devices' peak rate that one token a second takes; None where the peak is unknown.

    The peak of a CPU is what a plain matmul reaches, measured now.
    """
    dtype = precision_dtype(train.precision)
    if mesh.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(mesh.device)) if dtype == torch.bfloat16 else None
    else:
        peak = matmul_flops(model.dim, dtype, mesh.device)
    return flops_per_token(model, train.seq_len) / (peak * mesh.world_size) if peak else None
