"""Saves the transformer's training while it goes on: a copy in the host's memory, then files in the background.

    saver.save(state)  ->  copied; the next steps run while a thread writes, checks and renames (checkpoint.py)

A model that every rank has whole is written by the first one, a sharded one by torch.distributed.checkpoint, every rank
its shards, as safetensors without any pickle. What goes wrong is said at the next save, and the run goes on with the
checkpoints that it has: only the last one must succeed.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.errors import UserError, warn
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.training import checkpoint
from nanochameleon.transformer import Chameleon


class Saver:
    """Checkpoints of one model and its optimizer in `folder`, of which the last `keep` and the best stay."""

    def __init__(
        self, folder: Path, model: Chameleon, optimizer: torch.optim.Optimizer, mesh: Mesh, keep: int,
        background: bool, sharded: bool,
    ):  # fmt: skip
        self.folder, self.model, self.optimizer, self.mesh, self.keep = folder, model, optimizer, mesh, keep
        self.background, self.sharded = background, sharded
        self.pending: Future | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.group = None
        if sharded:
            import torch.distributed as dist

            self.group = dist.new_group(backend="gloo")  # of its own: the thread's messages must not meet the steps'

    def save(self, state: dict, last: bool = False) -> None:
        """state: {"step": ...} and what else JSON can hold. `last` waits for the files, and raises UserError where they
        cannot be written; any other save that fails is told by a warning at the next one."""
        self.finish()
        weights = self.model.state_dict()
        tensors = {"weights": weights, "optim": checkpoint.optimizer_tensors(self.optimizer, self.model)}
        if self.sharded:
            self.pending = self.start_sharded(tensors["weights"] | tensors["optim"], state)
        elif self.mesh.is_rank0:
            copied = {group: copies(content) for group, content in tensors.items()}
            self.pending = self.thread.submit(self.write, copied, state)
        if last or not self.background:
            self.finish(must=last)

    def finish(self, must: bool = False) -> None:
        """Waits for the files of the last save. Raises UserError where they failed and `must` is set, on every rank."""
        problem = None
        if self.pending is not None:
            problem = self.pending.exception()
            self.pending = None
        if isinstance(problem, Exception) and not isinstance(problem, UserError | OSError):
            raise problem
        problem = self.mesh.broadcast(problem and str(problem))
        if problem and must:
            raise UserError(problem)
        if problem and self.mesh.is_rank0:
            warn(f"{problem}; the run goes on without it")

    def write(self, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        checkpoint.save(self.folder, state["step"], tensors, state)
        checkpoint.keep_last(self.folder, self.keep)

    # -----------------------------------------------------------------------------------------------------------------
    # Sharded

    def start_sharded(self, tensors: dict[str, Tensor], state: dict) -> Future:
        """Copies are made before this returns."""
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

        aside = self.folder / self.mesh.broadcast(f".tmp-step-{state['step']:06d}-{os.getpid()}")
        self.mesh.run_on_rank0(lambda: self.make(aside))
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        written = async_save(tensors, storage_writer=writer, process_group=self.group)
        return self.thread.submit(self.commit, written, aside, state)

    def make(self, aside: Path) -> None:
        checkpoint.sweep_folders(self.folder)
        aside.mkdir(parents=True)

    def commit(self, written: Future, aside: Path, state: dict) -> None:
        """Behind the files of all ranks: each describes its own, the first one writes the manifest and renames."""
        try:
            self.agree(written.result)
            entries = self.agree(lambda: checkpoint.describe(aside.glob(f"shard-{self.mesh.rank + 1:05d}-*")))
            everything = {name: entry for part in entries for name, entry in part.items()}
            self.agree(lambda: self.finish_sharded(aside, state, everything) if self.mesh.is_rank0 else None)
        finally:
            if self.mesh.is_rank0:
                shutil.rmtree(aside, ignore_errors=True)

    def finish_sharded(self, aside: Path, state: dict, entries: dict[str, dict]) -> None:
        checkpoint.commit(aside, self.folder, state["step"], state, entries)
        checkpoint.keep_last(self.folder, self.keep)

    def agree(self, work: Callable[[], object]) -> list:
        """Every rank's result. Raises UserError on all of them where one failed."""
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
    """On the CPU, in memory of their own."""
    return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}


def latest_checkpoint(folder: Path, mesh: Mesh) -> Path | None:
    """The newest whole checkpoint, the same one for every rank; None where there is none at all. Raises UserError
    where there are some and none is whole."""
    return mesh.run_on_rank0(lambda: checkpoint.locate(folder) if checkpoint.checkpoints(folder) else None)
