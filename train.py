"""Train nanochameleon: one script from raw captions and images to a model that writes and draws, and its report.

    python train.py toy                                   the shapes world, minutes on two CPU cores
    python train.py toy_long                              the same scenes, six layers and three times as many steps
    python train.py emoji                                 real emoji from PyPI, with .[data] installed (docs/install.md)
    python train.py folder --data.path=images             your own images with captions.jsonl or metadata.csv
    python train.py stability                             the paper's ablations at a small size: a table and a plot
    python train.py folder --init-from chameleon-7b       start from a run or a model in any layout: its sizes,
                                                          tokenizers and weights
    python train.py toy --train.steps=3000 --seed=1       any field can be overridden: python train.py toy --help
    torchrun --nproc-per-node 2 train.py toy              two processes share each batch; the same on GPUs:
    torchrun --nproc-per-node 8 train.py 1b --data.path=prepared --parallel.data-parallel fsdp
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 8 --nproc-per-node 8 --max-restarts 3 \\
        --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        train.py chameleon_34b --data.path=prepared --parallel.tensor-parallel 8 --parallel.activation-checkpointing

The stages are: text tokenizer, image tokenizer, tokens, transformer, report. A stage whose result is in the run's
folder is skipped. Ctrl-C and SIGTERM save and end with code 130 and 143; the same command resumes, on any number of
processes. config.py documents every number. The variable above lets restarted ranks meet again (pytorch #167288).

This file holds the loop and the order of the stages. Left out: recovery from bad losses (training/recovery.py),
checkpoints (training/saver.py), the tokenizers' training (training/train_tokenizers.py), parallelism (parallel/).
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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from nanochameleon.config import RunConfig
from nanochameleon.data import Loader
from nanochameleon.data.build import check_sources, mixture, open_loader, open_sources, store_images, write_tokens
from nanochameleon.errors import Interrupted, OwnError, UserError, exit_on_user_error, say, say_above, warn
from nanochameleon.evaluate.report import make_report
from nanochameleon.evaluate.samples import write_reconstructions, write_sample_sheet
from nanochameleon.images.tokenizer import NO_DECODER
from nanochameleon.kernels.block.dropout import fold_in
from nanochameleon.kernels.cpu.malloc import tune_malloc
from nanochameleon.optim import MAX_NONFINITE_STEPS, clip_gradients, learning_rate, make_optimizer
from nanochameleon.packing import IGNORE, Batch
from nanochameleon.parallel.apply import ParallelModel, check_tensor_parallel, parallelize, uses_fsdp, wrap
from nanochameleon.parallel.mesh import Mesh, env_int, init_mesh, local_device
from nanochameleon.training.curves import plot_curves
from nanochameleon.training.diagnostics import compute_metrics, gradient_norms, max_attention_logits, memory_gib
from nanochameleon.training.image_targets import corrupt_image_tokens, mask_targets, noise_fraction
from nanochameleon.training.init_from import InitFrom, resolve_init
from nanochameleon.training.modes import make_deterministic
from nanochameleon.training.monitor import METRICS, Monitor, open_monitor, read_metrics
from nanochameleon.training.objective import Objective, Sums
from nanochameleon.training.precision import autocast, precision_dtype
from nanochameleon.training.recovery import Progress, Recovery, oom_message
from nanochameleon.training.rehearsal import rehearse, worth
from nanochameleon.training.run import TEXT_TOKENIZER, Run, pick_device
from nanochameleon.training.run_folder import claim, decide_precision, same_command, start_folder
from nanochameleon.training.sample_schedule import SampleSchedule, spell
from nanochameleon.training.saver import Saver, latest_checkpoint
from nanochameleon.training.signals import GracefulShutdown, StageTimer
from nanochameleon.training.stability import run_ablations
from nanochameleon.training.startup import init_or_load_weights, log_setup, mfu_per_token, use_agreed_proofs
from nanochameleon.training.train_tokenizers import open_image_tokenizer, train_image_tokenizer, train_text_tokenizer
from nanochameleon.transformer import Chameleon
from nanochameleon.weights.model_folder import open_model
from nanochameleon.weights.tokenizer_json import load_text_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# One step


def forward_backward(
    model: ParallelModel, batch: Batch, dropout_seeds: Tensor, z_loss: float, micro_batch: int | None
) -> tuple[Sums, float]:
    """Add this rank's gradients of the batch, which is on the CPU, to p.grad, one micro-batch at a time.

    Returns sums over this rank's sequences, and the number of supervised tokens in the whole batch.
    """
    mesh, n_sequences, total = model.mesh, len(batch.tokens), None
    # The loss is a mean over the whole batch, so its divisor must be known before the first micro-batch runs.
    (n_supervised,) = mesh.all_reduce_sum(float((batch.targets != IGNORE).sum()))  # on the CPU: no wait for a GPU
    normalizer = max(n_supervised, 1.0) / mesh.dp_size  # cancels the average over ranks that DDP and FSDP take
    size = micro_batch or n_sequences
    for first in range(0, n_sequences, size):
        part = slice(first, first + size)
        with model.gradient_sync(first + size >= n_sequences):  # ranks sum their gradients once, after the last part
            sums = model.wrapped(batch[part].to(mesh.device), dropout_seeds[part], z_loss, normalizer)
            sums.next_token.loss.backward()
        sums = tree_map(torch.Tensor.detach, sums)  # frees the graph
        total = sums if total is None else tree_map(torch.add, total, sums)
    return total, n_supervised


def optimizer_step(optimizer: Optimizer, lr: float, precision: str, device: torch.device) -> None:
    """Update the weights. Weights and moments are fp32; only Muon has matmuls, which run in `precision`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with autocast(precision, device):
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train_loop(
    cfg: RunConfig, run: Run, model: ParallelModel, optimizer: Optimizer, loader: Loader, saver: Saver,
    progress: Progress, monitor: Monitor | None, stopped: Callable[[], bool],
) -> None:  # fmt: skip
    """Run the updates from progress.step up to cfg.train.steps. Raises Interrupted once a stop is saved.

    All ranks run the same steps; only rank 0 has a monitor. Every random draw is a pure function of the seed and of the
    indices of the batch's samples. So there is no generator state to save.
    """
    t, mesh, n_codes = cfg.train, model.mesh, cfg.vqgan.codes_per_image
    rows = mesh.batch_slice(t.batch_size)  # this rank's slice of every batch
    recovery = Recovery(saver, cfg.optim.lr)
    losses: list[float] = []  # logged since the last checkpoint
    save_pending = False  # a checkpoint was due while losses were non-finite: save once they recover
    while progress.step < t.steps:
        step = progress.step
        # 0. A sheet of samples, before the step: a run stopped here that draws by steps draws when it resumes.
        if monitor and step and monitor.samples.due(step):
            draw_samples(run, saver, step, monitor.samples.elapsed)

        # 1. The batch. After a rollback, the batches that made the loss diverge are skipped.
        number = step + progress.skipped_batches
        sample_indices = torch.arange(t.batch_size)[rows] + number * t.batch_size  # (B,), counted over the whole run
        batch = mask_targets(loader.batch(number, rows), t.image_loss, n_codes, run.vocab)
        batch = corrupt_image_tokens(batch, noise_fraction(step, t), n_codes, run.vocab, cfg.seed, sample_indices)
        dropout_seeds = fold_in(sample_indices, cfg.seed).to(mesh.device, non_blocking=True)  # (B,)

        # 2. Forward and backward over micro-batches; gradients add up in p.grad.
        model.model.train()  # draw_samples leaves it in eval mode
        optimizer.zero_grad()
        sums, n_supervised = forward_backward(model, batch, dropout_seeds, t.z_loss, cfg.parallel.micro_batch)

        # 3. Clip the gradient's global norm. The log gets the norms before clipping.
        log_due = step % t.log_every == 0 or step == t.steps - 1
        norms = gradient_norms(model.model, run.vocab) if log_due else {}
        norms["grad_norm"] = clip_gradients(model.model.parameters(), cfg.optim.grad_clip)

        # 4. Check. If a number is not finite on any rank, all ranks skip the update; a signal to one rank stops all.
        finite = math.isfinite(norms["grad_norm"]) and math.isfinite(float(sums.next_token.loss))
        bad, stop = mesh.all_reduce_max(float(not finite), float(stopped()))

        # 5. Update, unless a number was not finite.
        lr = learning_rate(step, t.steps, cfg.optim)
        if bad:
            recovery.dump_batch(batch, number, step)
        else:
            optimizer_step(optimizer, lr, t.precision, mesh.device)
        progress.count(bool(bad), int(n_supervised))

        # 6. Log. Every rank computes the metrics, since they are sums over ranks.
        if log_due:
            metrics = compute_metrics(sums, mesh, t.z_loss) | norms | {"lr": lr, "tokens": progress.tokens}
            metrics["attention_logits"] = max_attention_logits(model, batch, dropout_seeds)
            metrics |= {"skipped_updates": progress.skipped_updates, "memory_gib": memory_gib(mesh.device)}
            metrics["tokens_with_padding"] = progress.step * t.batch_size * t.seq_len
            losses.append(metrics["loss"])
            if monitor:
                monitor.log(step, **metrics)

        # 7. Save. If losses do not recover, restore the last checkpoint instead and read later batches.
        if progress.nonfinite_streak == MAX_NONFINITE_STEPS:
            progress, losses, save_pending = recovery.roll_back(progress), [], False
            if monitor:
                monitor.rewind(progress.step)
            continue
        if monitor:
            monitor.progress(step)
        done = progress.step == t.steps
        save_pending |= progress.step % t.save_every == 0
        if done or stop or (save_pending and not progress.nonfinite_streak):  # in a streak the weights may be bad
            saver.save(asdict(progress.with_loss(losses)), last=bool(done or stop))
            losses, save_pending = [], False
        if stop and not done:
            raise Interrupted


def draw_samples(run: Run, saver: Saver, step: int, elapsed: Callable[[], float]) -> None:
    """Plot the curves so far and draw images for a few captions. A failure to write them does not stop the run."""
    sheet = saver.folder / "samples" / f"step-{step:06d}.png"
    try:
        plot_curves(read_metrics(saver.folder / METRICS), saver.folder / "curves.png")
        if run.image_tokenizer.can_draw and not saver.sharded:  # no rank has the whole of a sharded model
            run.model.eval()
            if write_sample_sheet(run, sheet):
                say_above(f"{sheet}, after {spell(elapsed())}")
    except OSError as error:
        warn(f"curves and samples of step {step} cannot be written: {error}; training continues")


def train_transformer(
    cfg: RunConfig, run: Run, init: InitFrom, loader: Loader, folder: Path, mesh: Mesh, timer: StageTimer,
    stopped: Callable[[], bool],
) -> None:  # fmt: skip
    """Train run.model, which is still on the meta device. Raises Interrupted once a stop is saved.

    It starts from the newest checkpoint, else from init's weights, else from random ones.
    """
    t, model, path = cfg.train, run.model, latest_checkpoint(folder, mesh)
    objective = Objective(model, run.vocab, t.precision, mesh.tp_group, t.fused_output)
    parallelize(objective, mesh, cfg.parallel)  # before there are weights, so that no rank ever holds all of them
    model.to_empty(device=mesh.device)
    if path is None:
        init_or_load_weights(model, init.model, cfg.seed)
    optimizer = make_optimizer(model, cfg.optim)
    progress = Progress.restore(path, model, optimizer) if path else Progress()
    log_setup(model, loader, mesh, t.precision, cfg.parallel)
    with Saver(folder, model, optimizer, mesh, cfg.parallel, t.keep_checkpoints) as saver, ExitStack() as stack:
        if progress.step < t.steps:
            monitor = None
            if mesh.is_rank0:
                rate, samples = mfu_per_token(cfg.model, t, mesh), SampleSchedule(t, timer.elapsed)
                monitor = stack.enter_context(open_monitor(folder, t, progress.step, rate, samples))
            parallel_model = wrap(objective, mesh, cfg.parallel)
            train_loop(cfg, run, parallel_model, optimizer, loader, saver, progress, monitor, stopped)


# ---------------------------------------------------------------------------------------------------------------------
# All stages


def main(cfg: RunConfig, with_report: bool = True) -> Path:
    """Run every stage that is not done yet; returns the run's folder.

    Raises UserError for what the user can fix, and Interrupted after a stop, once the command to resume is printed.
    """
    cfg, device = complete(cfg), local_device(cfg.device, pick_device)
    check_kernels(device)
    make_deterministic(cfg.parallel, device)
    if env_int("TORCHELASTIC_RESTART_COUNT", 0):  # the folder holds this run already: resume it
        cfg = replace(cfg, overwrite=False)
    with init_mesh(cfg.parallel, cfg.train.batch_size, device) as mesh, ExitStack() as held:
        mesh.run_on_rank0(lambda: held.enter_context(claim(cfg.folder)))
        held.enter_context(use_agreed_proofs(mesh))
        cfg, init = resolve_init(cfg)
        check_room(cfg)
        if mesh.tp_size > 1:
            check_tensor_parallel(cfg.model, mesh.tp_size)
        cfg = mesh.run_on_rank0(lambda: decide_precision(cfg, mesh.device))
        check_kernels(device, precision_dtype(cfg.train.precision))  # now, not after the image tokenizer's hours
        folder = mesh.run_on_rank0(lambda: start_folder(cfg))
        stop = run_all(cfg, init, folder, mesh, with_report)
    if stop:  # raised out here, so that all ranks end together
        raise stop
    return folder


def run_all(cfg: RunConfig, init: InitFrom, folder: Path, mesh: Mesh, with_report: bool) -> Interrupted | None:
    """Run all stages and the report. Returns the Interrupted of a stop, else None."""
    timer, stop = StageTimer(folder), Interrupted()
    with GracefulShutdown() as stopped:
        try:
            if with_report and worth(cfg, folder, mesh):
                check_sources(cfg)
                stopped.at_once = True  # a rehearsal has nothing to save
                announce(cfg, init, folder, mesh, timer)
                stopped.at_once = False
            run = run_stages(cfg, init, folder, mesh, timer, stopped)
            stopped.at_once = True  # the report has nothing to save
            if with_report:
                mesh.run_on_rank0(lambda: report(run, folder, mesh, timer))
            return None
        except (Interrupted, KeyboardInterrupt):  # the latter in a rehearsal or the report, or by a second Ctrl-C
            if mesh.is_rank0:
                timer.add("interrupted")
                say(f"stopped and saved in {folder}; to resume: {same_command()}")
            stop.number = stopped.asked or stop.number
            return stop
        except OSError as error:  # a full disk, a folder that may not be written
            why = f"cannot continue in {folder}: {error}"
            raise UserError(f"{why}; once that is fixed, the same command without --overwrite resumes") from error


def announce(cfg: RunConfig, init: InitFrom, folder: Path, mesh: Mesh, timer: StageTimer) -> None:
    """Print how long the run will take, from a rehearsal. A rehearsal that fails does not stop the run."""

    def train(few: RunConfig, run: Run, loader: Loader, place: Path, stopped: Callable[[], bool]) -> None:
        train_transformer(few, run, InitFrom(), loader, place, mesh, StageTimer(place), stopped)

    say("measuring a few steps; the first time on a machine, kernels are compiled for it, which takes a minute")
    try:
        forecast = rehearse(cfg, init, folder, mesh.device, train)
    except (OSError, UserError) as error:
        return warn(f"the time that the run will take is not known: {error}")
    timer.add("rehearsal")
    first = cfg.train.sample_minutes and 60 * cfg.train.sample_minutes - timer.elapsed()
    say(forecast.sentence(first, folder / "samples"))


def run_stages(
    cfg: RunConfig, init: InitFrom, folder: Path, mesh: Mesh, timer: StageTimer, stopped: GracefulShutdown
) -> Run:
    """Run the stages before the report. Raises Interrupted once a stop is saved."""
    mesh.run_on_rank0(lambda: prepare(cfg, init, folder, mesh.device, timer, stopped))
    tokenizer = init.text(cfg) if init.tokenizers else load_text_tokenizer(folder / TEXT_TOKENIZER)
    image_tokenizer = open_image_tokenizer(folder, cfg.vqgan, mesh.device)
    loader = open_loader(cfg, image_tokenizer, tokenizer, folder)
    with torch.device("meta"):
        run = Run(cfg, tokenizer.vocab, tokenizer, image_tokenizer, Chameleon(cfg.model))
    try:
        train_transformer(cfg, run, init, loader, folder, mesh, timer, stopped)
    except torch.OutOfMemoryError as error:
        raise OwnError(oom_message(cfg.train, cfg.parallel, mesh)) from error
    if mesh.is_rank0:
        timer.add("transformer")
    if mesh.all_reduce_max(float(stopped()))[0]:  # in the last step, after which nothing is left to save
        raise Interrupted
    run.model.eval()
    return run


def prepare(
    cfg: RunConfig, init: InitFrom, folder: Path, device: torch.device, timer: StageTimer, stopped: GracefulShutdown
) -> None:
    """Run the stages before the transformer, on rank 0 alone. Raises Interrupted once a stop is saved."""
    # 1. The text tokenizer. If init has tokenizers, both are copied and neither is trained.
    store_images(cfg, folder)
    if init.tokenizers:
        tokenizer = init.store_tokenizers(cfg, folder)
    else:
        tokenizer = train_text_tokenizer(cfg.tokenizers, cfg.vqgan.n_codes, mixture(cfg, folder), folder)
    timer.add("text_tokenizer")
    # 2. The image tokenizer.
    if not init.tokenizers:
        pairs = open_sources(cfg, folder)("pairs")
        if not train_image_tokenizer(cfg, pairs, folder, device, stopped):
            raise Interrupted
    image_tokenizer = open_image_tokenizer(folder, cfg.vqgan, device)
    if not init.tokenizers and not (sheet := folder / "samples" / "reconstructions.png").exists():
        try:
            write_reconstructions(cfg, image_tokenizer, folder, sheet)
            say(f"{sheet}: images above their reconstructions, after {spell(timer.elapsed())}")
        except OSError as error:
            warn(f"{sheet} cannot be written: {error}; training continues")
    timer.add("image_tokenizer")
    # 3. Documents become tokens, packed into sequences.
    if not cfg.data.tokenize_on_the_fly:
        write_tokens(cfg, image_tokenizer, tokenizer, folder, stopped)
        open_loader(cfg, image_tokenizer, tokenizer, folder)  # packs once, for all ranks
    timer.add("data")


def report(run: Run, folder: Path, mesh: Mesh, timer: StageTimer) -> None:
    """Write the report. Runs on rank 0; a sharded model is first reloaded from its last checkpoint."""
    if not run.image_tokenizer.can_draw:
        say(f"done: {folder}, without samples and a report, since {NO_DECODER}")
        return
    try:
        run = open_model(folder, str(mesh.device)) if uses_fsdp(mesh, run.cfg.parallel) else run
        make_report(run, folder, timer.seconds)
        say(f"done: {folder}/samples.png, curves.png, report.json, report.html")
    except torch.OutOfMemoryError:
        say(f"done: {folder}, without samples and a report, since {mesh.device} does not hold the whole model")


if __name__ == "__main__":
    tune_malloc()  # not in main, which others import: it changes the whole process
    if CONFIG.name == "stability":
        exit_on_user_error(lambda: run_ablations(CONFIG, lambda cfg: main(cfg, with_report=False)))
    else:
        exit_on_user_error(lambda: main(CONFIG))
