"""Saves the transformer's training while it continues: a copy in the host's memory, then files in the background.

    saver.save(state)  ->  copied; the next steps run while a thread writes, checks and renames (checkpoint.py)

Rank 0 writes a model that every rank has whole. A sharded model is written by torch.distributed.checkpoint, each rank
its shards, as safetensors without any pickle. A failed save is reported at the next save and the run continues with its
older checkpoints; only the last save must succeed.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.config import ParallelConfig
from nanochameleon.errors import UserError, warn
from nanochameleon.parallel.apply import uses_fsdp
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.training import checkpoint
from nanochameleon.training.restore import optimizer_tensors
from nanochameleon.transformer import Chameleon


class Saver:
    """Writes checkpoints of a model and its optimizer into `folder`; the last `keep` and the best one stay."""

    def __init__(
        self, folder: Path, model: Chameleon, optimizer: torch.optim.Optimizer, mesh: Mesh, parallel: ParallelConfig,
        keep: int,
    ):  # fmt: skip
        self.folder, self.model, self.optimizer, self.mesh, self.keep = folder, model, optimizer, mesh, keep
        self.background, self.sharded = parallel.save_in_background, uses_fsdp(mesh, parallel)
        self.pending: Future | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.group = None
        if self.sharded:
            import torch.distributed as dist

            self.group = dist.new_group(backend="gloo")  # its own, or the thread's messages would meet the steps'

    def save(self, state: dict, last: bool = False) -> None:
        """Save the tensors and `state`: {"step": ...} and what else JSON can hold.

        `last` waits for the files and raises UserError if they cannot be written. A failure of any other save is a
        warning at the next save.
        """
        self.finish()
        weights, optim = self.model.state_dict(), optimizer_tensors(self.optimizer, self.model)
        if self.sharded:
            self.pending = self.start_sharded(weights | optim, state)
        elif self.mesh.is_rank0:
            self.pending = self.thread.submit(self.write, {"weights": copies(weights), "optim": copies(optim)}, state)
        if last or not self.background:
            self.finish(must_succeed=last)

    def finish(self, must_succeed: bool = False) -> None:
        """Wait for the files of the last save. Raises UserError on every rank if they failed and had to succeed."""
        problem = None
        if self.pending is not None:
            problem = self.pending.exception()
            self.pending = None
        if isinstance(problem, Exception) and not isinstance(problem, UserError | OSError):
            raise problem
        problem = self.mesh.broadcast(problem and str(problem))
        if problem and must_succeed:
            raise UserError(problem)
        if problem and self.mesh.is_rank0:
            warn(f"{problem}; training continues without it")

    def write(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        checkpoint.save(self.folder, state["step"], tensors, state)
        checkpoint.keep_last(self.folder, self.keep)

    # -----------------------------------------------------------------------------------------------------------------
    # Sharded

    def start_sharded(self, tensors: dict[str, Tensor], state: dict) -> Future:
        """Start to write; the tensors are copied before this returns."""
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

        aside = self.folder / self.mesh.broadcast(checkpoint.temporary_name(state["step"]))
        self.mesh.run_on_rank0(lambda: self.make(aside))
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        written = async_save(tensors, storage_writer=writer, process_group=self.group)
        return self.thread.submit(self.commit, written, aside, state)

    def make(self, aside: Path) -> None:
        checkpoint.sweep_folders(self.folder)
        aside.mkdir(parents=True)

    def commit(self, written: Future, aside: Path, state: dict) -> None:
        """Wait for the files of all ranks. Each rank describes its own; rank 0 writes the manifest and renames."""
        try:
            self.gather(written.result)
            entries = self.gather(lambda: checkpoint.describe(aside.glob(f"shard-{self.mesh.rank + 1:05d}-*")))
            manifest = {name: entry for part in entries for name, entry in part.items()}
            self.gather(lambda: self.finish_sharded(aside, state, manifest) if self.mesh.is_rank0 else None)
        finally:
            if self.mesh.is_rank0:
                shutil.rmtree(aside, ignore_errors=True)

    def finish_sharded(self, aside: Path, state: dict, entries: dict[str, dict]) -> None:
        checkpoint.commit(aside, self.folder, state["step"], state, entries)
        checkpoint.keep_last(self.folder, self.keep)

    def gather(self, work: Callable[[], object]) -> list:
        """Run work() on every rank and return all results. Raises UserError on all ranks if one failed."""
        import torch.distributed as dist

        try:
            mine = work(), None
        except Exception as error:
            mine = None, f"{error}"
        everybody: list = [None] * self.mesh.world_size
        dist.all_gather_object(everybody, mine, group=self.group)
        for _, problem in everybody:
            if problem is not None:
                why = problem.strip().splitlines()[-1]
                raise UserError(f"cannot save a checkpoint in {self.folder}: {why}; older checkpoints are untouched")
        return [result for result, _ in everybody]

    def __enter__(self) -> "Saver":
        if self.mesh.is_rank0:
            checkpoint.sweep(self.folder)
        return self

    def __exit__(self, *error) -> None:
        self.thread.shutdown(wait=True)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy to the CPU, into memory of their own."""
    return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}


def latest_checkpoint(folder: Path, mesh: Mesh) -> Path | None:
    """The newest whole checkpoint, the same one on every rank; None where there is no checkpoint at all.

    Raises UserError where there are some and none is whole.
    """
    return mesh.run_on_rank0(lambda: checkpoint.locate(folder) if checkpoint.checkpoints(folder) else None)
