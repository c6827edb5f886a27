"""Trains nanochameleon: one script, from raw captions and pictures to a model that writes and draws, and its report.

    python train.py toy                                   the shapes world, minutes on two CPU cores
    python train.py toy_long                              the same scenes with an hour
    python train.py emoji                                 real emoji from PyPI, with .[data] installed (README)
    python train.py folder --data.path=pictures           your own pictures with captions.jsonl or metadata.csv
    python train.py folder --init-from chameleon-7b       goes on from a run or a model in any layout: its sizes,
                                                          tokenizers and weights
    python train.py toy --train.steps=3000 --seed=1       any field can be overridden: python train.py toy --help

The stages, each skipped where its result lies in the run's folder: text tokenizer, image tokenizer, tokens,
transformer, report. Ctrl-C saves; the same command goes on. One process on one device; config.py says what the numbers
are.
"""

import sys
from importlib.util import find_spec

if __name__ == "__main__" and (missing := [name for name in ("tyro", "torch", "regex") if not find_spec(name)]):
    print(f"error: {missing[0]} is missing: run make demo, or pip install -c constraints.txt -e .", file=sys.stderr)
    raise SystemExit(2)

from nanochameleon.cli import check_kernels, check_room, complete, parse_run

if __name__ == "__main__":
    CONFIG = parse_run()  # before torch is imported, so that --help and a wrong option answer at once

import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from nanochameleon import checkpoint
from nanochameleon.beginning import Beginning, begin
from nanochameleon.config import RunConfig
from nanochameleon.data import Loader
from nanochameleon.errors import Interrupted, UserError, exit_on_user_error
from nanochameleon.evaluate.report import make_report, sample_grid
from nanochameleon.files import write_file
from nanochameleon.image_tokenizer import NO_DECODER
from nanochameleon.kernels.dispatch import explain
from nanochameleon.losses import LossParts, next_token_loss
from nanochameleon.model_folder import Parts, copy_weights
from nanochameleon.monitor import Monitor
from nanochameleon.optim import TOO_MANY, clip, learning_rate, make_optimizer
from nanochameleon.packing import Batch
from nanochameleon.prepare import mixture, open_loader, open_sources, store_pictures, write_tokens
from nanochameleon.run import Run, command, open_image_tokenizer, pick_device, start_folder
from nanochameleon.train_tokenizers import train_image_tokenizer, train_text_tokenizer
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

# ---------------------------------------------------------------------------------------------------------------------
# Stopping


class Stopper:
    """Turns the first Ctrl-C or SIGTERM into `asked`, which loops look at between steps; a second one stops at once."""

    def __init__(self):
        self.asked = False
        self.before: dict[int, object] = {}

    def __call__(self) -> bool:
        return self.asked

    def _note(self, number: int, frame: object) -> None:
        self.asked = True
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # a signal may come within a print
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __enter__(self) -> "Stopper":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread, as in a notebook's server
                break
        return self

    def __exit__(self, *error) -> None:
        self._restore()


# ---------------------------------------------------------------------------------------------------------------------
# One step


def pick_precision(wish: str, dim: int, device: torch.device) -> str:
    """'auto' is bf16 where a matrix product of the model's width is clearly faster in it than in fp32."""
    if wish != "auto":
        return wish

    def seconds(dtype: torch.dtype) -> float:
        a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((2_048, dim), (dim, 4 * dim)))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            float((a @ b)[0, 0])
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return "bf16" if seconds(torch.bfloat16) < 0.7 * seconds(torch.float32) else "fp32"


def matrix_products(precision: str, device: torch.device) -> AbstractContextManager:
    """Where matrix products run in `precision`; weights, sums and norms stay in fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def forward(model: Chameleon, batch: Batch, vocab: Vocab, precision: str) -> tuple[LossParts, torch.Tensor]:
    """-> the loss's parts, and the last block's output norm, averaged over tokens (paper figure 5a)."""
    with matrix_products(precision, batch.tokens.device):
        residual = model.residual(batch.tokens, batch.positions, batch.doc_ids)
        logits = model.logits(model.norm(residual).flatten(0, 1))
    return next_token_loss(logits, batch.targets.flatten(), vocab), residual.detach().float().norm(dim=-1).mean()


def update(
    model: Chameleon, optimizer: torch.optim.Optimizer, parts: LossParts, cfg: RunConfig, lr: float, precision: str
) -> float:
    """One step of the optimizer; returns the gradient's norm. If that or the loss is not finite, nothing moves."""
    optimizer.zero_grad()
    loss = parts.total(cfg.train.z_loss, parts.count)
    loss.backward()
    norm = clip(model.parameters(), cfg.optim.clip)
    if not math.isfinite(float(loss.detach())):  # an infinite loss can have a finite gradient
        norm = math.nan
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        with matrix_products(precision, loss.device):  # Muon's iteration is a fifth of a toy's step in fp32
            optimizer.step()
    return norm


def figures(parts: LossParts, output_norm: torch.Tensor, grad_norm: float, lr: float, cfg: RunConfig) -> dict:
    """What the monitor logs: means per token of each kind."""
    text_sum, text_count = parts.cross_entropy - parts.image_cross_entropy, parts.count - parts.image_count
    return {
        "loss": float(parts.total(cfg.train.z_loss, parts.count).detach()),
        "loss_text": float((text_sum / text_count).detach()),
        "loss_image": float(parts.image_cross_entropy / parts.image_count),
        "z_loss": float((cfg.train.z_loss * parts.z / parts.count).detach()),
        "log_z": float(parts.log_z / parts.count),
        "output_norm": float(output_norm),
        "grad_norm": grad_norm,
        "lr": lr,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The transformer's training


def save(folder: Path, model: Chameleon, optimizer, state: dict, cfg: RunConfig) -> None:
    """state: step, tokens and precision, which may not change on the way where it was chosen by the clock."""
    tensors = {"weights": model.state_dict(), "optim": checkpoint.optimizer_tensors(optimizer, model)}
    checkpoint.save(folder, state["step"], tensors, state)
    checkpoint.keep_last(folder, cfg.train.keep)


def resume(folder: Path, model: Chameleon, optimizer) -> dict:
    """Takes up the newest whole checkpoint, if there is one; returns the state that was saved with it.

    Raises UserError where there are some and none is whole.
    """
    if not checkpoint.checkpoints(folder):
        return {"step": 0, "tokens": 0}
    tensors, state = checkpoint.load(folder)
    model.load_state_dict(tensors["weights"])
    checkpoint.load_optimizer(optimizer, model, tensors["optim"])
    return state


def train_transformer(cfg: RunConfig, run: Run, loader: Loader, folder: Path, stopped: Callable[[], bool]) -> None:
    """Runs cfg.train.steps updates, from the newest checkpoint on. Raises Interrupted once a stop is saved."""
    t, model, vocab = cfg.train, run.model, run.vocab
    optimizer = make_optimizer(model, cfg.optim)
    state = resume(folder, model, optimizer)
    start, tokens = state["step"], state["tokens"]
    if start == t.steps:
        return
    for name, rows in loader.rows.items():
        if rows.n_too_long:
            print(f"{rows.n_too_long:,} documents of {name} are longer than {t.seq_len} ids and left out")
    wish = state.get("precision", "auto") if t.precision == "auto" else t.precision
    precision, failed = pick_precision(wish, cfg.model.dim, run.device), 0
    print(f"transformer: {sum(p.numel() for p in model.parameters()):,} parameters, {precision} on {run.device}")
    print(explain(run.device, torch.float32 if precision == "fp32" else torch.bfloat16))
    with Monitor(folder, t.steps, t.log_every, start) as monitor:
        for step in range(start, t.steps):
            torch.manual_seed(cfg.seed * t.steps + step)  # dropout depends on the step alone: resuming is exact
            batch = loader.batch(step).to(run.device)
            model.train()
            parts, output_norm = forward(model, batch, vocab, precision)
            lr = learning_rate(step, t.steps, cfg.optim)
            grad_norm = update(model, optimizer, parts, cfg, lr, precision)
            tokens += int(parts.count)
            failed = 0 if math.isfinite(grad_norm) else failed + 1
            if failed == TOO_MANY:
                lower = f"start anew with --overwrite and less than --optim.lr {cfg.optim.lr}"
                raise UserError(f"{failed} steps in a row had no finite loss: {lower}")
            if monitor.due(step):
                monitor.log(step, tokens=tokens, **figures(parts, output_norm, grad_norm, lr, cfg))
            monitor.progress(step)
            done, stop = step + 1, stopped()  # asked once: a signal after this is seen in the next step
            if done % t.save_every == 0 or done == t.steps or stop:
                save(folder, model, optimizer, {"step": done, "tokens": tokens, "precision": precision}, cfg)
            if stop and done < t.steps:
                raise Interrupted
            if done % t.sample_every == 0 and done < t.steps and run.images.can_draw:
                model.eval()
                sample_grid(run, folder / "samples" / f"step-{done:06d}.png")


# ---------------------------------------------------------------------------------------------------------------------
# All stages


class Laps:
    """Seconds of each stage, kept in the run's folder so that they add up over interruptions."""

    def __init__(self, folder: Path):
        self.path, self.last = folder / "seconds.json", time.perf_counter()
        self.seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now
        write_file(self.path, json.dumps(self.seconds).encode())


def main(cfg: RunConfig) -> Path:
    """Runs every stage that is not done yet; returns the run's folder. Raises UserError for what the user can mend."""
    cfg, device = complete(cfg), pick_device(cfg.device)
    check_kernels(device)
    cfg, begun = begin(cfg)
    check_room(cfg)
    folder = start_folder(cfg)
    laps = Laps(folder)
    try:
        with Stopper() as stopped:
            run = stages(cfg, begun, folder, device, laps, stopped)
        if run.images.can_draw:
            make_report(run, folder, laps.seconds)
            print(f"done: {folder}/samples.png, curves.png, report.json, report.html")
        else:
            print(f"done: {folder}, without samples and a report, since {NO_DECODER}")
    except (Interrupted, KeyboardInterrupt):  # the latter in the report, or by a second Ctrl-C
        laps.add("interrupted")
        again = command("train.py", *(word for word in sys.argv[1:] if word != "--overwrite"))
        print(f"stopped and saved in {folder}; this goes on: {again}")
    except OSError as error:  # a full disk, a folder that may not be written
        why = f"cannot go on in {folder}: {error}"
        raise UserError(f"{why}; once that is mended, the same command without --overwrite goes on") from error
    return folder


def start_model(cfg: RunConfig, parts: Parts | None, folder: Path, device: torch.device) -> Chameleon:
    """In fp32 on the device: with random weights, or with those of `parts` unless a checkpoint will replace them."""
    if not parts:
        return Chameleon(cfg.model).to(device)
    with torch.device("meta"):
        model = Chameleon(cfg.model)
    model.to_empty(device=device)
    if not checkpoint.checkpoints(folder):
        copy_weights(parts, model)
    return model


def stages(
    cfg: RunConfig, begun: Beginning, folder: Path, device: torch.device, laps: Laps, stopped: Callable[[], bool]
) -> Run:
    """The stages before the report. Raises Interrupted once a stop is saved."""
    store_pictures(cfg, folder)
    ours = begun.tokenizers is None
    tokenizer = train_text_tokenizer(cfg, mixture(cfg, folder), folder) if ours else begun.store_tokenizers(cfg, folder)
    laps.add("text_tokenizer")
    if ours and not train_image_tokenizer(cfg, open_sources(cfg, folder)("pairs"), folder, device, stopped):
        raise Interrupted
    images = open_image_tokenizer(folder, cfg, device)
    laps.add("image_tokenizer")
    if not cfg.data.live:
        write_tokens(cfg, images, tokenizer, folder, stopped)
    loader = open_loader(cfg, images, tokenizer, folder)
    laps.add("data")
    torch.manual_seed(cfg.seed)
    run = Run(cfg, tokenizer.vocab, tokenizer, images, start_model(cfg, begun.parts, folder, device))
    train_transformer(cfg, run, loader, folder, stopped)
    laps.add("transformer")
    if stopped():  # in the last step, which has nothing left to save
        raise Interrupted
    run.model.eval()
    return run


if __name__ == "__main__":
    exit_on_user_error(lambda: main(CONFIG))
