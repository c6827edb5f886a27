"""The processes that train together: who has which rows, how the model is spread over them, what they agree on.

    torchrun --nproc-per-node 8 train.py chameleon_7b ...

All of it is torch.distributed's own: DDP, FSDP2 (fully_shard), tensor parallelism by DTensor. One process alone is a
mesh of one, on which everything here is free. Results do not depend on the mesh, up to rounding: losses are sums over
the count of the whole batch, and every draw is a function of (seed, step, row).

A rank has a place in a grid of data_size x tensor: those of a row of the grid share every layer (heads, feed-forward
width, vocabulary), those of a column share the batch.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from nanochameleon.config import ModelConfig, ParallelConfig
from nanochameleon.errors import PeerLost, UserError
from nanochameleon.parallel.sharding import is_sharded
from nanochameleon.training.objective import Objective
from nanochameleon.transformer import Chameleon

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # of ranks that wait for what the first one does alone


@dataclass(frozen=True)
class Mesh:
    """This process among the others. `first` does what must be done once: files, printing."""

    device: torch.device
    rank: int = 0
    world: int = 1
    tensor: int = 1  # ranks that share every layer
    grid: Any = None  # DeviceMesh ("data", "tensor"), None for one process
    host: Any = None  # process groups of the CPU's: for each step, and for waiting as long as it takes
    patient: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """How many shares a batch is cut into."""
        return self.world // self.tensor

    @property
    def layer_ranks(self):
        """The process group that shares every layer, None where one rank has all of them."""
        return self.grid["tensor"].get_group() if self.tensor > 1 else None

    def rows(self, batch_size: int) -> slice:
        """This rank's rows of a batch."""
        each, which = batch_size // self.data_size, self.rank // self.tensor
        return slice(which * each, (which + 1) * each)

    # -----------------------------------------------------------------------------------------------------------------
    # Agreement

    def total(self, *numbers: float) -> list[float]:
        """Each number, summed over the shares of the batch."""
        return self._reduce(numbers, "SUM", 1 / self.tensor)

    def most(self, *numbers: float) -> list[float]:
        """The largest of each number over all ranks."""
        return self._reduce(numbers, "MAX", 1.0)

    def _reduce(self, numbers: tuple[float, ...], how: str, factor: float) -> list[float]:
        if self.world == 1:
            return list(numbers)
        import torch.distributed as dist

        x = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(x, getattr(dist.ReduceOp, how), group=self.host)
        return (x * factor).tolist()

    def tell(self, value: T) -> T:
        """What the first rank has, for all."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def once(self, work: Callable[[], T]) -> T:
        """The first rank does it, the others wait for the result. What it raises, UserError and Interrupted among
        them, is raised on every rank."""
        if self.world == 1:
            return work()
        result, error = None, None
        if self.first:
            try:
                with all_cores():
                    result = work()
            except (Exception, KeyboardInterrupt) as problem:  # the latter by Ctrl-C, of which the others must hear
                error = problem
        told = self.tell((result, error) if self.first else None)
        if told[1] is not None:
            raise error or told[1]
        return told[0]


# ---------------------------------------------------------------------------------------------------------------------
# InitFrom and end


def environment(name: str, default: int) -> int:
    """A number that torchrun gives its processes, sizes from 1 on. Raises UserError for what it would not set."""
    word = os.environ.get(name, str(default))
    if not (word.isdecimal() and word.isascii()) or ("SIZE" in name and int(word) < 1):
        raise UserError(f"{name} is {word!r} in the environment, not a number: start with torchrun, or unset it")
    return int(word)


def place() -> tuple[int, int]:
    """(rank, world) by the environment. Raises UserError for a rank that is not among so many."""
    rank, world = environment("RANK", 0), environment("WORLD_SIZE", 1)
    if rank >= world:
        of = f"WORLD_SIZE is {world}" if "WORLD_SIZE" in os.environ else "WORLD_SIZE is not set"
        raise UserError(f"RANK is {rank} in the environment, but {of}: start with torchrun, or unset RANK")
    return rank, world


def local_device(wish: str, pick: Callable[[str], torch.device]) -> torch.device:
    """pick(wish); of several GPUs the one with this process's number on its machine."""
    device = pick(wish)
    if device.type == "cuda" and device.index is None and environment("WORLD_SIZE", 1) > 1:
        number = environment("LOCAL_RANK", 0)
        if environment("LOCAL_WORLD_SIZE", 1) > torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs: give torchrun --nproc-per-node that")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device


@contextmanager
def start(parallel: ParallelConfig, batch_size: int, device: torch.device) -> Iterator[Mesh]:
    """The mesh of the processes that torchrun has started, or of this one alone. Raises UserError for sizes that do not
    divide one another."""
    rank, world = place()
    if world % parallel.tensor_parallel:
        raise UserError(
            f"parallel.tensor_parallel is {parallel.tensor_parallel}, which must divide the {world} processes"
        )
    if batch_size % (world // parallel.tensor_parallel):
        shares = world // parallel.tensor_parallel
        raise UserError(f"train.batch_size is {batch_size}, which {shares} ranks cannot share evenly: change one")
    if world == 1:
        yield Mesh(device)
        return
    import torch.distributed as dist

    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {world}, but {missing[0]} is not set: start with torchrun, or unset WORLD_SIZE")
    timeout = timedelta(seconds=parallel.timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    host, patient = (dist.new_group(backend="gloo", timeout=limit) for limit in (timeout, PATIENCE))
    sizes = (world // parallel.tensor_parallel, parallel.tensor_parallel)
    grid = dist.init_device_mesh(device.type, sizes, mesh_dim_names=("data", "tensor"))
    torch.set_num_threads(max(1, n_cores() // environment("LOCAL_WORLD_SIZE", 1)))  # torchrun gives each only one
    try:
        yield Mesh(device, rank, world, parallel.tensor_parallel, grid, host, patient)
        gc.collect()  # DDP's threads abort the process at its end if tensors are still theirs
        dist.barrier(group=patient)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            why = f"another rank has died, or has not answered for {parallel.timeout} s"
            raise PeerLost(f"rank {rank} of {world}: {why} ({str(error).splitlines()[0][:200]})") from error
        raise
    finally:
        dist.destroy_process_group()


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def all_cores() -> Iterator[None]:
    """For work that one rank does while the others wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, n_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Spreading the model


def check_tensor(cfg: ModelConfig, ranks: int) -> None:
    """Raises UserError where a layer cannot be cut into so many equal parts."""
    groups = cfg.qk_norm_groups
    for name, number in (("n_kv_heads", cfg.kv_heads), ("feed-forward width", cfg.ffn_dim)):
        if number % ranks:
            raise UserError(f"parallel.tensor_parallel is {ranks}, which must divide the model's {name}, {number}")
    if groups % ranks and ranks % groups:
        both = f"parallel.tensor_parallel is {ranks} and model.qk_norm_groups {groups}"
        raise UserError(f"{both}: one must divide the other")


def spread_layers(model: Chameleon, mesh: Mesh) -> None:
    """Tensor parallelism: every layer's heads, feed-forward width and vocabulary over mesh.tensor ranks, in place.

    Norms are held by all of them alike. The gradient of a block's norms is the same on each rank, since the branch that
    it comes from begins with an all-reduce; that of QK-norm is a part on each, see QKNorm.vectors.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    check_tensor(model.cfg, mesh.tensor)
    ranks, columns = mesh.grid["tensor"], ("wq", "wk", "wv", "w1", "w3")
    plan: dict[str, Any] = {"tok_embeddings": RowwiseParallel(input_layouts=Replicate()), "output": ColwiseParallel()}
    for i in range(model.cfg.n_layers):
        for branch, names in (("attention", ("wq", "wk", "wv", "wo")), ("feed_forward", ("w1", "w3", "w2"))):
            for name in names:
                plan[f"layers.{i}.{branch}.{name}"] = ColwiseParallel() if name in columns else RowwiseParallel()
    parallelize_module(model, ranks, plan, src_data_rank=None)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not is_sharded(parameter):
                whole = distribute_tensor(parameter.detach(), ranks, [Replicate()], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(whole))


def shard(objective: Objective, mesh: Mesh, parallel: ParallelConfig) -> None:
    """FSDP2, in place: a shard of every tensor on each rank, a block's weights gathered while it runs, in the type of
    the matrix products; sums of gradients in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = torch.bfloat16 if objective.precision == "bf16" else None
    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)  # the residual stream stays fp32
    for block in objective.model.layers:
        fully_shard(block, mesh=mesh.grid["data"], mp_policy=policy)
    fully_shard(objective, mesh=mesh.grid["data"], mp_policy=policy)


def shards(mesh: Mesh, parallel: ParallelConfig) -> bool:
    return mesh.world > 1 and (parallel.data_parallel == "fsdp" or mesh.tensor > 1)


@dataclass(frozen=True)
class ParallelModel:
    """The objective as the ranks run it."""

    run: nn.Module  # to be called; the objective itself, or DDP around it
    objective: Objective
    mesh: Mesh

    @property
    def model(self) -> Chameleon:
        return self.objective.model

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Gradients are summed over the ranks after the last micro-batch of a step alone."""
        if hasattr(self.run, "set_requires_gradient_sync"):
            self.run.set_requires_gradient_sync(last)
        with self.run.no_sync() if not last and hasattr(self.run, "no_sync") else nullcontext():
            yield


def spread(objective: Objective, mesh: Mesh, parallel: ParallelConfig) -> None:
    """Where the model is to be sharded: in place, while its weights have no content yet, so that no rank ever holds
    them all."""
    if not shards(mesh, parallel):
        return
    if mesh.tensor > 1:
        spread_layers(objective.model, mesh)
    shard(objective, mesh, parallel)


def wrap(objective: Objective, mesh: Mesh, parallel: ParallelConfig) -> ParallelModel:
    """With its weights set: ready to be run."""
    objective.model.recompute = parallel.activation_checkpointing
    if parallel.compile:
        for block in objective.model.layers:
            block.compile()
    if mesh.world == 1 or shards(mesh, parallel):
        return ParallelModel(objective, objective, mesh)
    from torch.nn.parallel import DistributedDataParallel

    run = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
    return ParallelModel(run, objective, mesh)
