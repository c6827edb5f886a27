"""The processes that train together: their ranks, their mesh and what they agree on.

    torchrun --nproc-per-node 8 train.py chameleon_7b ...

The ranks form a grid of dp_size x tp_size. Ranks of one row of the grid share every layer (tensor parallelism), ranks
of one column share the batch (data parallelism). A process alone is a mesh of one, on which every collective is free.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from nanochameleon.config import ParallelConfig
from nanochameleon.errors import PeerLost, UserError

T = TypeVar("T")
WAIT_TIMEOUT = timedelta(days=7)  # of ranks that wait while rank 0 works alone


@dataclass(frozen=True)
class Mesh:
    """This process among the others. Rank 0 does what must be done once: it writes files and prints."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    tp_size: int = 1  # ranks that share every layer
    device_mesh: Any = None  # torch's DeviceMesh ("dp", "tp"); None for one process
    step_group: Any = None  # gloo group for numbers that every step exchanges, with the timeout of a step
    wait_group: Any = None  # gloo group for waiting on rank 0, with WAIT_TIMEOUT

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """The number of equal parts that a batch is split into."""
        return self.world_size // self.tp_size

    @property
    def tp_group(self):
        """The process group of the ranks that share every layer; None without tensor parallelism."""
        return self.device_mesh["tp"].get_group() if self.tp_size > 1 else None

    def batch_slice(self, batch_size: int) -> slice:
        """This rank's sequences of a batch. Ranks that share layers read the same ones."""
        size, dp_rank = batch_size // self.dp_size, self.rank // self.tp_size
        return slice(dp_rank * size, (dp_rank + 1) * size)

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Sum each number over the parts of the batch."""
        # all tp_size ranks of one part hold the same number, so the sum over all ranks counts it tp_size times
        return self._all_reduce(numbers, "SUM", 1 / self.tp_size)

    def all_reduce_max(self, *numbers: float) -> list[float]:
        """The largest of each number over all ranks."""
        return self._all_reduce(numbers, "MAX", 1.0)

    def _all_reduce(self, numbers: tuple[float, ...], op: str, factor: float) -> list[float]:
        if self.world_size == 1:
            return list(numbers)
        import torch.distributed as dist

        x = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(x, getattr(dist.ReduceOp, op), group=self.step_group)
        return (x * factor).tolist()

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.wait_group)
        return box[0]

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """Run work() on rank 0 and return its result on every rank. What it raises is raised on every rank, including
        UserError and Interrupted."""
        if self.world_size == 1:
            return work()
        result, error = None, None
        if self.is_rank0:
            try:
                with all_cores():  # the others wait
                    result = work()
            except (Exception, KeyboardInterrupt) as problem:  # Ctrl-C must reach the other ranks, too
                error = problem
        result, remote_error = self.broadcast((result, error))
        if remote_error is not None:
            raise error or remote_error  # rank 0 raises its own, which has a traceback
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Start and end


def env_int(name: str, default: int) -> int:
    """Read a number that torchrun sets for its processes. Raises UserError for what torchrun would not set."""
    text = os.environ.get(name, str(default))
    if not (text.isdecimal() and text.isascii()) or ("SIZE" in name and int(text) < 1):
        raise UserError(f"{name} is {text!r} in the environment, not a number: start with torchrun, or unset it")
    return int(text)


def rank_and_world_size() -> tuple[int, int]:
    """Read both from the environment. Raises UserError for a rank outside the world."""
    rank, world_size = env_int("RANK", 0), env_int("WORLD_SIZE", 1)
    if rank >= world_size:
        size = f"WORLD_SIZE is {world_size}" if "WORLD_SIZE" in os.environ else "WORLD_SIZE is not set"
        raise UserError(f"RANK is {rank} in the environment, but {size}: start with torchrun, or unset RANK")
    return rank, world_size


def local_device(requested: str, pick_device: Callable[[str], torch.device]) -> torch.device:
    """pick_device(requested); of several GPUs the one with this process's local rank."""
    device = pick_device(requested)
    if device.type == "cuda" and device.index is None and env_int("WORLD_SIZE", 1) > 1:
        local_rank, n_gpus = env_int("LOCAL_RANK", 0), torch.cuda.device_count()
        if env_int("LOCAL_WORLD_SIZE", 1) > n_gpus:
            raise UserError(f"this machine has {n_gpus} GPUs: give torchrun --nproc-per-node {n_gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return device


@contextmanager
def init_mesh(parallel: ParallelConfig, batch_size: int, device: torch.device) -> Iterator[Mesh]:
    """The mesh of the processes that torchrun started, or of this one alone. Raises UserError for sizes that do not
    divide, and PeerLost when another rank dies."""
    rank, world_size = rank_and_world_size()
    tp_size = parallel.tensor_parallel
    if world_size % tp_size:
        raise UserError(f"parallel.tensor_parallel is {tp_size}, which must divide the {world_size} processes")
    dp_size = world_size // tp_size
    if batch_size % dp_size:
        raise UserError(f"train.batch_size is {batch_size}, which {dp_size} ranks cannot share evenly: change one")
    if world_size == 1:
        yield Mesh(device)
        return
    import torch.distributed as dist

    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        problem = f"WORLD_SIZE is {world_size}, but {missing[0]} is not set"
        raise UserError(f"{problem}: start with torchrun, or unset WORLD_SIZE")
    timeout = timedelta(seconds=parallel.timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    step_group, wait_group = (dist.new_group(backend="gloo", timeout=limit) for limit in (timeout, WAIT_TIMEOUT))
    device_mesh = dist.init_device_mesh(device.type, (dp_size, tp_size), mesh_dim_names=("dp", "tp"))
    torch.set_num_threads(max(1, n_cores() // env_int("LOCAL_WORLD_SIZE", 1)))  # torchrun gives each process only one
    try:
        yield Mesh(device, rank, world_size, tp_size, device_mesh, step_group, wait_group)
        gc.collect()  # DDP's threads abort the process at its end if they still own tensors
        dist.barrier(group=wait_group)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            why = f"another rank has died, or has not answered for {parallel.timeout} s"
            detail = str(error).splitlines()[0][:200]
            raise PeerLost(f"rank {rank} of {world_size}: {why} ({detail})") from error
        raise
    finally:
        dist.destroy_process_group()


def n_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def all_cores() -> Iterator[None]:
    """Let torch use all cores, for work that one rank does while the others wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, n_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
