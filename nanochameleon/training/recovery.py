"""What keeps a long run going: counters that are saved, rollback when losses do not recover, what to do without memory.

An update whose loss or gradient is not finite is skipped and its batch is kept in bad/. After MAX_NONFINITE_STEPS of
them in a row the run returns to its newest checkpoint and reads later batches (PaLM, arXiv 2204.02311 section 5.1).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nanochameleon.config import ParallelConfig, TrainConfig
from nanochameleon.errors import GaveUp, UserError, warn
from nanochameleon.optim import MAX_NONFINITE_STEPS
from nanochameleon.packing import Batch
from nanochameleon.parallel.apply import uses_fsdp
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.training import checkpoint
from nanochameleon.training.restore import restore
from nanochameleon.training.run import build
from nanochameleon.training.saver import Saver, latest_checkpoint
from nanochameleon.transformer import Chameleon

MAX_ROLLBACKS = 3  # to one checkpoint before a run gives up


@dataclass
class Progress:
    """The counters of a run, saved with every checkpoint."""

    step: int = 0  # updates, skipped ones included
    tokens: int = 0  # supervised tokens
    skipped_batches: int = 0  # by rollbacks: step + skipped_batches is the number of the next batch
    skipped_updates: int = 0  # whose loss or gradient was not finite
    loss: float | None = None  # mean of what was logged since the previous checkpoint
    nonfinite_streak: int = 0  # steps in a row without a finite loss and gradient

    @staticmethod
    def read(state: dict, path: Path) -> "Progress":
        """Parse a checkpoint's state. Raises UserError for a checkpoint of another stage or version."""
        try:
            checkpoint.steps_done(state)
            return build(Progress, state, "state")
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is of another stage or version of training: {error}") from None

    @staticmethod
    def restore(path: Path, model: Chameleon, optimizer: torch.optim.Optimizer) -> "Progress":
        """Load a checkpoint into the model and the optimizer; returns its counters."""
        return Progress.read(restore(path, model, optimizer), path)

    def count(self, skipped: bool, n_supervised: int) -> None:
        """Count one step over so many supervised tokens."""
        self.step += 1
        self.tokens += n_supervised
        self.skipped_updates += skipped
        self.nonfinite_streak = self.nonfinite_streak + 1 if skipped else 0

    def with_loss(self, losses: list[float]) -> "Progress":
        finite = [loss for loss in losses if math.isfinite(loss)]
        return replace(self, loss=sum(finite) / len(finite) if finite else None)


class Recovery:
    """Handles the steps of one run whose loss or gradient is not finite. lr: the peak rate, which an error names."""

    def __init__(self, saver: Saver, lr: float):
        self.saver, self.lr = saver, lr
        self.rolled_back: list[Path] = []  # the checkpoint of each rollback

    def dump_batch(self, batch: Batch, number: int, step: int) -> None:
        """Keep a batch that gave a non-finite loss or gradient, as bad/step-NNNNNN-rank-N.safetensors."""
        mesh = self.saver.mesh
        path = self.saver.folder / "bad" / f"step-{number:06d}-rank-{mesh.rank}.safetensors"
        where = f"its batch is in {path.parent}"
        try:
            path.parent.mkdir(exist_ok=True)
            save_file({name: x for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}, path)
        except (SafetensorError, OSError) as error:  # safetensors reports a full disk by its own error
            where = f"its batch could not be kept: {error}"
        if mesh.is_rank0:
            warn(f"loss or gradient of step {step} is not finite: the update is skipped, {where}")

    def roll_back(self, progress: Progress) -> Progress:
        """Restore the newest checkpoint and skip the batches since then. Returns the new counters.

        Raises GaveUp if there is no checkpoint, or if going back to this one was tried MAX_ROLLBACKS times.
        """
        saver = self.saver
        saver.finish()
        path = latest_checkpoint(saver.folder, saver.mesh)
        if path is None or self.rolled_back.count(path) == MAX_ROLLBACKS:
            lower = f"start again with --overwrite and less than --optim.lr {self.lr}"
            raise GaveUp(f"{progress.nonfinite_streak} steps in a row had no finite loss: {lower}")
        self.rolled_back.append(path)
        if saver.mesh.is_rank0:
            warn(f"{MAX_NONFINITE_STEPS} steps in a row had no finite loss: back to {path}, with later batches")
        restored = Progress.restore(path, saver.model, saver.optimizer)
        next_batch = progress.step + progress.skipped_batches
        restored.skipped_batches = next_batch - restored.step
        restored.skipped_updates = progress.skipped_updates
        restored.nonfinite_streak = 0
        return restored


def oom_message(train: TrainConfig, parallel: ParallelConfig, mesh: Mesh) -> str:
    """The sentence for a GPU whose memory is full. Every option it names may change when the run resumes."""
    own = train.batch_size // mesh.dp_size
    size = min(parallel.micro_batch or own, own)
    options = [f"--parallel.micro-batch {size // 2}"] if size > 1 else []
    options += [] if parallel.activation_checkpointing else ["--parallel.activation-checkpointing"]
    options += [] if uses_fsdp(mesh, parallel) else ["--parallel.data-parallel fsdp on more GPUs"]
    why = f"the memory of {mesh.device} (rank {mesh.rank}) does not hold {size} sequences of {train.seq_len} tokens"
    return f"{why}: resume with {' or '.join(options) or 'more GPUs'}"
