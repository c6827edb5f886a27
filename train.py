"""Trains nanochameleon: one script, from raw captions and images to a model that writes and draws, and its report.

    python train.py toy                                   the shapes world, minutes on two CPU cores
    python train.py toy_long                              the same scenes with an hour
    python train.py emoji                                 real emoji from PyPI, with .[data] installed (README)
    python train.py folder --data.path=images           your own images with captions.jsonl or metadata.csv
    python train.py stability                             the paper's ablations at a small size, into a table and a plot
    python train.py folder --init-from chameleon-7b       goes on from a run or a model in any layout: its sizes,
                                                          tokenizers and weights
    python train.py toy --train.steps=3000 --seed=1       any field can be overridden: python train.py toy --help
    torchrun --nproc-per-node 2 train.py toy              two processes share each batch; the same on GPUs:
    torchrun --nproc-per-node 8 train.py 1b --data.path=tokens --parallel.data-parallel fsdp --parallel.compile
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 8 --nproc-per-node 8 --max-restarts 3 \\
        --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        train.py chameleon_34b --data.path=tokens --parallel.data-parallel fsdp --parallel.tensor-parallel 8 \\
        --parallel.activation-checkpointing

The stages, each skipped where its result lies in the run's folder: text tokenizer, image tokenizer, tokens,
transformer, report. Ctrl-C and SIGTERM save and end with code 130 and 143; the same command goes on, on as many
processes as you like. config.py says what the numbers are. The variable above lets torchrun's restarts after a dead
rank meet (pytorch issue 167288).
"""

import sys
from importlib.util import find_spec

if __name__ == "__main__" and (missing := [name for name in ("tyro", "torch", "regex") if not find_spec(name)]):
    print(f"error: {missing[0]} is missing: run make demo, or pip install -c constraints.txt -e .", file=sys.stderr)
    raise SystemExit(2)

from nanochameleon.cli import check_kernels, check_room, complete, parse_run

if __name__ == "__main__":
    CONFIG = parse_run()  # before torch is imported, so that --help and a wrong option answer at once

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from nanochameleon.config import RunConfig
from nanochameleon.data import Loader
from nanochameleon.data.build import mixture, open_loader, open_sources, store_images, write_tokens
from nanochameleon.errors import GaveUp, Interrupted, OwnError, UserError, exit_on_user_error, say, warn
from nanochameleon.evaluate.report import make_report, peak_memory_gib, sample_grid
from nanochameleon.images.tokenizer import NO_DECODER
from nanochameleon.kernels.block.dropout import fold_in
from nanochameleon.kernels.cpu.malloc import tune_malloc
from nanochameleon.kernels.dispatch import VARIABLE, explain
from nanochameleon.kernels.zloss.cross_entropy import Expected
from nanochameleon.optim import MAX_NONFINITE_STEPS, clip_gradients, learning_rate, make_optimizer
from nanochameleon.packing import IGNORE, Batch
from nanochameleon.parallel.apply import ParallelModel, check_tensor_parallel, parallelize, uses_fsdp, wrap
from nanochameleon.parallel.mesh import Mesh, env_int, init_mesh, local_device
from nanochameleon.parallel.sharding import shard_like
from nanochameleon.training import checkpoint, stability
from nanochameleon.training.diagnostics import gradient_norms, max_attention_logits
from nanochameleon.training.flops import flops_per_token, peak_flops
from nanochameleon.training.image_targets import corrupt_image_tokens, mask_targets
from nanochameleon.training.init_from import InitFrom, begin
from nanochameleon.training.monitor import METRICS, Monitor, open_tensorboard, plot_curves, read_metrics
from nanochameleon.training.objective import Objective, Sums, autocast, matmul_flops
from nanochameleon.training.run import (
    TEXT_TOKENIZER,
    Run,
    build,
    claim,
    decide_precision,
    open_image_tokenizer,
    pick_device,
    same_command,
    start_folder,
)
from nanochameleon.training.saver import Saver, latest_checkpoint
from nanochameleon.training.signals import GracefulShutdown, StageTimer
from nanochameleon.training.train_tokenizers import train_image_tokenizer, train_text_tokenizer
from nanochameleon.transformer import Chameleon
from nanochameleon.weights.model_folder import open_model
from nanochameleon.weights.read_layouts import ModelFiles
from nanochameleon.weights.tokenizer_json import load_text_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# One step


def forward_backward(trainee: ParallelModel, batch: Batch, keys: Tensor, cfg: RunConfig) -> tuple[Sums, float]:
    """Adds the gradients of this rank's rows of a batch, a micro-batch at a time; keys (B,) are for their dropout.

    -> the sums over these rows, and the supervised tokens of the whole batch, by which all ranks divide.
    """
    mesh, n_rows, total = trainee.mesh, len(batch.tokens), None
    (count,) = mesh.all_reduce_sum(float((batch.targets != IGNORE).sum()))
    size = cfg.parallel.micro_batch or n_rows
    expected = Expected(cfg.train.z_loss, mesh.dp_size / max(count, 1.0))
    for first in range(0, n_rows, size):
        rows = slice(first, first + size)
        with trainee.gradient_sync(first + size >= n_rows):
            sums = trainee.wrapped(batch[rows], keys[rows], expected)
            loss = sums.parts.total(cfg.train.z_loss, max(count, 1.0))
            (loss * mesh.dp_size).backward()  # DDP and FSDP take the mean over ranks, and sums are wanted
        sums = tree_map(torch.Tensor.detach, sums)
        total = sums if total is None else tree_map(torch.add, total, sums)
    return total, count


def figures(sums: Sums, mesh: Mesh, cfg: RunConfig) -> dict[str, float]:
    """What the monitor logs: means per token of each kind, over the whole batch."""
    cross_entropy, z, log_z, n, of_images, n_images = mesh.all_reduce_sum(*map(float, sums.parts))
    output_norm, n_tokens = mesh.all_reduce_sum(float(sums.output_norm), float(sums.n_tokens))
    z_loss, n_text = cfg.train.z_loss * z / max(n, 1.0), n - n_images
    return {
        "loss": cross_entropy / max(n, 1.0) + z_loss,
        "loss_text": (cross_entropy - of_images) / n_text if n_text else math.nan,
        "loss_image": of_images / n_images if n_images else math.nan,
        "z_loss": z_loss,
        "log_z": log_z / max(n, 1.0),
        "output_norm": output_norm / n_tokens,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The transformer's training


def peaks(trainee: ParallelModel, batch: Batch, keys: Tensor) -> list[float]:
    """Each layer's largest attention logit on the first row of the whole batch, whoever has it."""
    mesh, found = trainee.mesh, max_attention_logits(trainee.objective, batch[:1], keys[:1])
    return mesh.all_reduce_max(
        *(found if mesh.batch_slice(len(batch.tokens) * mesh.dp_size).start == 0 else [-math.inf] * len(found))
    )


def memory_gib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return peak_memory_gib()


def mfu_per_token(cfg: RunConfig, mesh: Mesh) -> float | None:
    """The share of all devices' peak that one id a second takes; a CPU's peak is what a plain product reaches."""
    dtype = torch.float32 if cfg.train.precision == "fp32" else torch.bfloat16
    if mesh.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(mesh.device)) if dtype == torch.bfloat16 else None
    else:
        peak = matmul_flops(cfg.model.dim, dtype, mesh.device)
    return flops_per_token(cfg.model, cfg.train.seq_len) / (peak * mesh.world_size) if peak else None


@dataclass
class Progress:
    """What a checkpoint holds beside tensors."""

    step: int = 0  # updates done
    tokens: int = 0  # supervised ones
    passed: int = 0  # batches passed over by rolling back
    left_out: int = 0  # updates that did not happen, since loss or gradient was not finite
    loss: float | None = None  # mean of what was logged since the checkpoint before
    failed: int = 0  # steps in a row without a finite loss

    @staticmethod
    def read(state: dict, path: Path) -> "Progress":
        """Of a checkpoint's state. Raises UserError for one of another stage or version."""
        try:
            checkpoint.steps_done(state)
            return build(Progress, {name: x for name, x in state.items() if name != "precision"}, "state")  # older ones
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is of another stage or version of training: {error}") from None


MAX_ROLLBACKS = 3  # to one checkpoint before a run gives up


@dataclass
class Training:
    """A transformer under training; every rank has one, and all run the same steps."""

    cfg: RunConfig
    trainee: ParallelModel
    optimizer: torch.optim.Optimizer
    loader: Loader
    folder: Path
    saver: Saver
    progress: Progress
    losses: list[float] = field(default_factory=list)  # logged since the last checkpoint
    rolled_back: list[Path] = field(default_factory=list)  # to which checkpoints
    owed: bool = False  # a save that fell into a streak of failures, to be made up for behind it

    def step(self, monitor: Monitor | None, stopped: Callable[[], bool]) -> bool:
        """One update, logged and saved when due; -> whether a stop was asked for on any rank. If loss or gradient are
        not finite anywhere, nothing moves."""
        cfg, t, p, mesh = self.cfg, self.cfg.train, self.progress, self.trainee.mesh
        number, rows = p.step + p.passed, mesh.batch_slice(t.batch_size)
        vocab = self.trainee.objective.vocab
        places = torch.arange(number * t.batch_size, (number + 1) * t.batch_size, device=mesh.device)
        batch = mask_targets(self.loader.batch(number, rows), cfg, vocab)
        if t.image_token_noise:
            batch = corrupt_image_tokens(
                batch, cfg.vqgan.codes_per_image, vocab, t.image_token_noise, cfg.seed, places[rows]
            )
        batch = batch.to(mesh.device)
        self.trainee.model.train()
        self.optimizer.zero_grad()
        keys = fold_in(places[rows], cfg.seed)
        sums, count = forward_backward(self.trainee, batch, keys, cfg)
        due = p.step % t.log_every == 0 or p.step == t.steps - 1
        norms = gradient_norms(self.trainee.model, vocab) if due else {}
        norm = clip_gradients(self.trainee.model.parameters(), cfg.optim.grad_clip)
        finite = math.isfinite(norm) and math.isfinite(float(sums.parts.total(t.z_loss, 1.0)))
        bad, stop = mesh.all_reduce_max(float(not finite), float(stopped()))
        lr = learning_rate(p.step, t.steps, cfg.optim)
        if bad:
            p.left_out += 1
            self.set_aside(batch, number)
        else:
            self.move(lr)
        p.failed = p.failed + 1 if bad else 0
        p.tokens += int(count)
        if due:
            line = figures(sums, mesh, cfg) | norms | {"grad_norm": norm, "lr": lr, "tokens": p.tokens}
            line["attention_logits"] = peaks(self.trainee, batch, keys)
            line |= {"left_out": p.left_out, "memory_gib": memory_gib(mesh.device)}
            line["ids"] = (p.step + 1) * t.batch_size * t.seq_len
            self.losses.append(line["loss"])
            if monitor:
                monitor.log(p.step, **line)
        p.step += 1
        return bool(stop)

    def move(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(self.cfg.train.precision, self.trainee.mesh.device):  # Muon has some
            self.optimizer.step()

    def set_aside(self, batch: Batch, number: int) -> None:
        """Keeps a batch whose loss or gradient was not finite: bad/step-NNNNNN-rank-N.safetensors."""
        path = self.folder / "bad" / f"step-{number:06d}-rank-{self.trainee.mesh.rank}.safetensors"
        where = f"its batch is in {path.parent}"
        try:
            path.parent.mkdir(exist_ok=True)
            save_file({name: x.cpu() for name, x in vars(batch).items()}, path)
        except (SafetensorError, OSError) as error:  # the first is how a full disk shows here
            where = f"its batch could not be kept: {error}"
        if self.trainee.mesh.is_rank0:
            warn(f"loss or gradient of step {self.progress.step} is not finite: left out, {where}")

    def save(self, last: bool) -> None:
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        self.progress.loss = sum(finite) / len(finite) if finite else None
        self.losses = []
        self.saver.save(asdict(self.progress), last)

    def roll_back(self) -> int:
        """To the newest checkpoint, to go on with the batches after those that failed; -> its step. Raises GaveUp
        where there is none, or it did not help often enough."""
        lower = f"start anew with --overwrite and less than --optim.lr {self.cfg.optim.lr}"
        self.saver.finish()
        path, before = latest_checkpoint(self.folder, self.trainee.mesh), self.progress
        if path is None or self.rolled_back.count(path) == MAX_ROLLBACKS:
            raise GaveUp(f"{before.failed} steps in a row had no finite loss: {lower}")
        self.progress = Progress.read(checkpoint.restore(path, self.trainee.model, self.optimizer), path)
        self.progress.passed = before.step + before.passed - self.progress.step
        self.progress.left_out, self.progress.failed = before.left_out, 0
        self.losses, self.owed, self.rolled_back = [], False, [*self.rolled_back, path]
        if self.trainee.mesh.is_rank0:
            warn(f"{MAX_NONFINITE_STEPS} steps in a row had no finite loss: back to {path}, with later batches")
        return self.progress.step

    def run(self, monitor: Monitor | None, run: Run, stopped: Callable[[], bool]) -> None:
        """To the end. Raises Interrupted once a stop is saved."""
        t, p = self.cfg.train, self.progress
        while p.step < t.steps:
            if monitor and p.step and p.step % t.sample_every == 0:  # here, so that a run stopped at this step has it
                self.look(run)
            stop = self.step(monitor, stopped)
            if p.failed == MAX_NONFINITE_STEPS:
                start_again = self.roll_back()
                p = self.progress
                if monitor:
                    monitor.rewind(start_again)
                continue
            if monitor:
                monitor.progress(p.step - 1)
            done = p.step == t.steps
            self.owed |= p.step % t.save_every == 0
            if done or stop or (self.owed and not p.failed):  # in a streak, it would be what has led there
                self.save(last=done or stop)
                self.owed = False
            if stop and not done:
                raise Interrupted

    def look(self, run: Run) -> None:
        """Draws the curves so far, and some captions. What cannot be written stops no run."""
        try:
            plot_curves(read_metrics(self.folder / METRICS), self.folder / "curves.png")
            if run.image_tokenizer.can_draw and not self.saver.sharded:  # one rank has no whole model
                self.trainee.model.eval()
                sample_grid(run, self.folder / "samples" / f"step-{self.progress.step:06d}.png")
        except OSError as error:
            warn(f"curves and samples of step {self.progress.step} cannot be written: {error}; the run goes on")


def train_transformer(
    cfg: RunConfig,
    run: Run,
    parts: ModelFiles | None,
    loader: Loader,
    folder: Path,
    mesh: Mesh,
    stopped: Callable[[], bool],
) -> None:
    """Runs cfg.train.steps updates of run.model, which has no weights yet, from the newest checkpoint on, or from those
    of `parts`, or from random ones. Raises Interrupted once a stop is saved."""
    t, model, path = cfg.train, run.model, latest_checkpoint(folder, mesh)
    objective = Objective(model, run.vocab, t.precision, mesh.tp_group)
    parallelize(objective, mesh, cfg.parallel)
    model.to_empty(device=mesh.device)
    if path is None:
        fill(model, parts, cfg.seed)
    optimizer = make_optimizer(model, cfg.optim)
    progress = Progress.read(checkpoint.restore(path, model, optimizer), path) if path else Progress()
    chosen = kernels_of(mesh.device, t.precision)
    if mesh.is_rank0:
        announce(model, loader, mesh, cfg)
        say(chosen)
    keep = t.keep_checkpoints, cfg.parallel.save_in_background, uses_fsdp(mesh, cfg.parallel)
    with Saver(folder, model, optimizer, mesh, *keep) as saver, ExitStack() as stack:
        training = Training(cfg, wrap(objective, mesh, cfg.parallel), optimizer, loader, folder, saver, progress)
        if progress.step < t.steps:
            monitor = None
            if mesh.is_rank0:
                board = open_tensorboard(folder / "tensorboard") if t.tensorboard else None
                rate = mfu_per_token(cfg, mesh)
                monitor = stack.enter_context(Monitor(folder, t.steps, progress.step, mfu_per_token=rate, board=board))
            training.run(monitor, run, stopped)


def fill(model: Chameleon, parts: ModelFiles | None, seed: int) -> None:
    """Sets all weights: those of `parts`, or random ones; of each tensor the part that this rank holds."""
    with torch.no_grad():
        for name, target in model.state_dict().items():
            whole = parts.weights.get(name) if parts else model.init_tensor(name, target.shape, seed, target.device)
            target.copy_(shard_like(whole, target))


def announce(model: Chameleon, loader: Loader, mesh: Mesh, cfg: RunConfig) -> None:
    for name, rows in loader.rows.items():
        if rows.n_too_long:
            say(f"{rows.n_too_long:,} documents of {name} are longer than {loader.seq_len} ids and left out")
    ranks = (
        f", {mesh.world_size} ranks ({mesh.dp_size} x {mesh.tp_size}, {cfg.parallel.data_parallel})"
        if mesh.world_size > 1
        else ""
    )
    size = sum(p.numel() for p in model.parameters())
    say(f"transformer: {size:,} parameters, {cfg.train.precision} on {mesh.device}{ranks}")


def kernels_of(device: torch.device, precision: str) -> str:
    """What runs, to print. Raises UserError, on every rank, for a wish that this precision has no kernels for."""
    try:
        return explain(device, torch.float32 if precision == "fp32" else torch.bfloat16)
    except ValueError as error:
        raise UserError(f"{VARIABLE}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# All stages


def main(cfg: RunConfig, with_report: bool = True) -> Path:
    """Runs every stage that is not done yet; returns the run's folder. Raises UserError for what the user can mend, and
    Interrupted after a stop, when it has said how to go on."""
    cfg, device = complete(cfg), local_device(cfg.device, pick_device)
    check_kernels(device)
    if env_int("TORCHELASTIC_RESTART_COUNT", 0):  # what torchrun's restart finds there is this run's own
        cfg = replace(cfg, overwrite=False)
    with init_mesh(cfg.parallel, cfg.train.batch_size, device) as mesh, ExitStack() as held:
        mesh.run_on_rank0(lambda: held.enter_context(claim(cfg.folder)))
        cfg, begun = begin(cfg)
        check_room(cfg)
        if mesh.tp_size > 1:
            check_tensor_parallel(cfg.model, mesh.tp_size)
        cfg = mesh.run_on_rank0(lambda: decide_precision(cfg, mesh.device))
        folder = mesh.run_on_rank0(lambda: start_folder(cfg))
        stop = work(cfg, begun, folder, mesh, with_report)
    if stop:
        raise stop
    return folder


def work(cfg: RunConfig, begun: InitFrom, folder: Path, mesh: Mesh, with_report: bool) -> Interrupted | None:
    """All stages and the report. Returns what stopped them, so that all ranks end together."""
    laps, stop = StageTimer(folder), Interrupted()
    with GracefulShutdown() as stopped:
        try:
            run = stages(cfg, begun, folder, mesh, laps, stopped)
            stopped.at_once = True  # the report has nothing to save
            if with_report:
                mesh.run_on_rank0(lambda: report(run, folder, mesh, laps))
            return None
        except (Interrupted, KeyboardInterrupt):  # the latter in the report, or by a second Ctrl-C
            if mesh.is_rank0:
                laps.add("interrupted")
                say(f"stopped and saved in {folder}; this goes on: {same_command()}")
            stop.number = stopped.asked or stop.number
            return stop
        except OSError as error:  # a full disk, a folder that may not be written
            why = f"cannot go on in {folder}: {error}"
            raise UserError(f"{why}; once that is mended, the same command without --overwrite goes on") from error


def no_room(cfg: RunConfig, mesh: Mesh) -> str:
    """The sentence for a GPU whose memory is full; what it names may change while a run goes on."""
    own, p = cfg.train.batch_size // mesh.dp_size, cfg.parallel
    rows = min(p.micro_batch or own, own)
    ways = [f"--parallel.micro-batch {rows // 2}"] if rows > 1 else []
    ways += [] if p.activation_checkpointing else ["--parallel.activation-checkpointing"]
    ways += [] if uses_fsdp(mesh, p) else ["--parallel.data-parallel fsdp on more GPUs"]
    which = f"{mesh.device} (rank {mesh.rank})"
    why = f"the memory of {which} does not hold {rows} rows of {cfg.train.seq_len} ids at a time"
    return f"{why}: go on with {' or '.join(ways) or 'more GPUs'}"


def report(run: Run, folder: Path, mesh: Mesh, laps: StageTimer) -> None:
    """By one rank, with the whole model: of a sharded one as it was saved."""
    if not run.image_tokenizer.can_draw:
        say(f"done: {folder}, without samples and a report, since {NO_DECODER}")
        return
    try:
        run = open_model(folder, str(mesh.device)) if uses_fsdp(mesh, run.cfg.parallel) else run
        make_report(run, folder, laps.seconds)
        say(f"done: {folder}/samples.png, curves.png, report.json, report.html")
    except torch.OutOfMemoryError:
        say(f"done: {folder}, without samples and a report, since {mesh.device} does not hold the whole model")


def prepare(cfg: RunConfig, begun: InitFrom, folder: Path, device: torch.device, laps: StageTimer, stopped) -> None:
    """The stages before the transformer, which one rank does for all. Raises Interrupted once a stop is saved."""
    store_images(cfg, folder)
    own = begun.tokenizers is None
    tokenizer = train_text_tokenizer(cfg, mixture(cfg, folder), folder) if own else begun.store_tokenizers(cfg, folder)
    laps.add("text_tokenizer")
    if own and not train_image_tokenizer(cfg, open_sources(cfg, folder)("pairs"), folder, device, stopped):
        raise Interrupted
    image_tokenizer = open_image_tokenizer(folder, cfg, device)
    laps.add("image_tokenizer")
    if not cfg.data.tokenize_on_the_fly:
        write_tokens(cfg, image_tokenizer, tokenizer, folder, stopped)
        open_loader(cfg, image_tokenizer, tokenizer, folder)  # packs the rows once, for all
    laps.add("data")


def stages(
    cfg: RunConfig, begun: InitFrom, folder: Path, mesh: Mesh, laps: StageTimer, stopped: Callable[[], bool]
) -> Run:
    """The stages before the report. Raises Interrupted once a stop is saved."""
    mesh.run_on_rank0(lambda: prepare(cfg, begun, folder, mesh.device, laps, stopped))
    tokenizer = begun.text(cfg) if begun.tokenizers else load_text_tokenizer(folder / TEXT_TOKENIZER)
    image_tokenizer = open_image_tokenizer(folder, cfg, mesh.device)
    loader = open_loader(cfg, image_tokenizer, tokenizer, folder)
    with torch.device("meta"):
        run = Run(cfg, tokenizer.vocab, tokenizer, image_tokenizer, Chameleon(cfg.model))
    try:
        train_transformer(cfg, run, begun.parts, loader, folder, mesh, stopped)
    except torch.OutOfMemoryError as error:
        raise OwnError(no_room(cfg, mesh)) from error
    if mesh.is_rank0:
        laps.add("transformer")
    if mesh.all_reduce_max(float(stopped()))[0]:  # in the last step, which has nothing left to save
        raise Interrupted
    run.model.eval()
    return run


def study(cfg: RunConfig) -> Path:
    """Many small runs, each leaving a part of the recipe out: see stability.py."""
    return stability.run(cfg, lambda one: main(one, with_report=False))


if __name__ == "__main__":
    tune_malloc()  # of the program's own process, hence not in main
    exit_on_user_error(lambda: (study if CONFIG.name == "stability" else main)(CONFIG))
