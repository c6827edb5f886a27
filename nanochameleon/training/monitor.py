"""The log of a training run: metrics.jsonl, one progress bar, TensorBoard if asked for. No account, no server.

The paper watches loss by modality, log Z of the output softmax and the norm of the last block's output (section 2.3,
figures 5 and 6): a norm that grows without bound announces a divergence long before the loss does. This file neither
computes metrics (diagnostics.py) nor draws them (curves.py).
"""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from nanochameleon.config import TrainConfig
from nanochameleon.errors import UserError, warn
from nanochameleon.files import is_finite_number, write_file
from nanochameleon.training.sample_schedule import SampleSchedule
from nanochameleon.weights.old_names import with_new_names

METRICS = "metrics.jsonl"
FIELDS = {  # a line has "step" and some of these; null is a number that fp32 cannot hold
    "loss": "nats a supervised token, the z-loss term included",
    "loss_text": "nats a text token",
    "loss_image": "nats an image token",
    "z_loss": "the z-loss term as added, nats",
    "log_z": "mean log Z of the output softmax, nats",
    "output_norm": "mean Euclidean norm of the last block's output over tokens",
    "attention_logits": "the largest attention logit of each layer, on the batch's first sequence",
    "grad_norm": "global gradient norm before clipping",
    "grad_norm_text": "the same, of the rows of embedding and output layer that belong to text",
    "grad_norm_image": "the same, of those that belong to image tokens",
    "lr": "learning rate",
    "skipped_updates": "updates skipped so far, since loss or gradient was not finite",
    "tokens": "supervised tokens since the first step; padding and each document's <s> are not",
    "tokens_with_padding": "all tokens of all sequences since the first step",
    "tokens_per_second": "supervised tokens since the previous line",
    "mfu": "fraction of the devices' peak rate that the model's own arithmetic takes, since the previous line",
    "memory_gib": "most memory taken so far: of rank 0's GPU, else of its process",
    "seconds": "since the first step, checkpoints and sample grids included, the time between stop and resume left out",
}
BY_LAYER = "attention_logits"
BAR = "{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]{postfix}"


class Monitor:
    """Writes the log and shows the bar of one run, from step `start` on.

        with Monitor(run_dir, total_steps=1_000, start=0) as monitor:
            for step in range(0, 1_000):
                ...
                if step % 10 == 0:
                    monitor.log(step, loss=..., loss_text=..., lr=..., tokens=...)
                monitor.progress(step)

    A run that died after its last checkpoint leaves lines from `start` on. They are dropped: each step is there once.
    clock: returns seconds. mfu_per_token: the MFU of one token a second, None without. tensorboard: a SummaryWriter.
    samples: when a sheet of samples is due, for the loop.
    """

    def __init__(
        self, run_dir: Path, total_steps: int, start: int = 0, clock: Callable[[], float] = time.monotonic,
        mfu_per_token: float | None = None, tensorboard=None, samples: SampleSchedule | None = None,
    ):  # fmt: skip
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        self.path, self.file, self.full = Path(run_dir) / METRICS, None, False
        self.clock, self.mfu_per_token, self.tensorboard = clock, mfu_per_token, tensorboard
        self.samples = samples
        self.open_at(start)
        interval = 0.5 if sys.stderr.isatty() else 15.0  # in a log file each update is a line of its own
        self.bar = tqdm(
            total=total_steps, initial=start, desc="training", unit="step", mininterval=interval, smoothing=0.05,
            bar_format=BAR, dynamic_ncols=True, file=sys.stderr,
        )  # fmt: skip

    def open_at(self, start: int) -> None:
        """Drop the lines from step `start` on and open the log to append to it."""
        self.close()
        lines, n_damaged = _read(self.path)
        if n_damaged:
            warn(f"{self.path}: {n_damaged} damaged lines are left out")
        kept = [line for line in lines if line["step"] < start]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        last = kept[-1] if kept else {}
        self.seconds, self.tokens = last.get("seconds") or 0.0, last.get("tokens") or 0
        self.tokens_with_padding = last.get("tokens_with_padding") or 0
        self.last = self.clock()
        self.file = self.path.open("a")

    def rewind(self, step: int) -> None:
        """Continue from an earlier step, after a rollback."""
        self.open_at(step)
        self.bar.n = step
        self.bar.refresh()

    def log(self, step: int, **values) -> dict:
        """Append one line of numbers (or 0-d tensors) named as in FIELDS, and return it; other names are fine, too."""
        now = self.clock()
        elapsed, self.last = now - self.last, now
        self.seconds += elapsed
        line = {"step": step} | {name: _to_json(value) for name, value in values.items()}
        line["seconds"] = round(self.seconds, 3)
        if "tokens" in values:
            line["tokens_per_second"] = round((values["tokens"] - self.tokens) / max(elapsed, 1e-9), 1)
            self.tokens = values["tokens"]
        if self.mfu_per_token and "tokens_with_padding" in values:
            read = values["tokens_with_padding"] - self.tokens_with_padding
            line["mfu"] = round(self.mfu_per_token * read / max(elapsed, 1e-9), 4)
            self.tokens_with_padding = values["tokens_with_padding"]
        if self.tensorboard:
            self.write_tensorboard(line)
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk: the line stays in the file's buffer and is written with a later one
            if not self.full:
                warn(f"{self.path} cannot be written: {error}; training continues")
            self.full = True
        self.bar.set_postfix_str(summary(line), refresh=False)
        return line

    def write_tensorboard(self, line: dict) -> None:
        """Write the same numbers for TensorBoard, where each layer has its own curve."""
        for name, value in line.items():
            values = value if isinstance(value, list) else [value]
            for layer, x in enumerate(values):
                if x is not None and name != "step":
                    label = f"{name}/{layer:02d}" if isinstance(value, list) else name
                    self.tensorboard.add_scalar(label, x, line["step"])
        self.tensorboard.flush()

    def progress(self, step: int) -> None:
        """Move the bar past this step; it shows the time left and the numbers of the last line."""
        self.bar.update(step + 1 - self.bar.n)

    def __enter__(self) -> "Monitor":
        return self

    def close(self) -> None:
        if self.file:
            with suppress(OSError):  # lines that a full disk did not take; log() has warned of them
                self.file.close()

    def __exit__(self, *error) -> None:
        self.bar.close()
        self.close()
        if self.tensorboard:
            self.tensorboard.close()


def open_monitor(
    folder: Path, cfg: TrainConfig, start: int, mfu_per_token: float | None, samples: SampleSchedule
) -> Monitor:
    tensorboard = open_tensorboard(folder / "tensorboard") if cfg.tensorboard else None
    return Monitor(folder, cfg.steps, start, mfu_per_token=mfu_per_token, tensorboard=tensorboard, samples=samples)


def open_tensorboard(folder: Path):
    """Returns a SummaryWriter into the folder. Raises UserError where the package is missing."""
    if not find_spec("tensorboard"):
        install = "pip install -c constraints.txt -e '.[tensorboard]'"
        raise UserError(f"train.tensorboard needs the package tensorboard: {install}, or leave the option out")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _to_json(value):
    """A number or a list of them with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, list):
        return [_to_json(x) for x in value]
    number = value if isinstance(value, int) else float(value) if value is not None else math.nan
    return number if is_finite_number(number) else None


def summary(line: dict) -> str:
    """{"loss_text": 2.31, "lr": 1e-4, ...} -> 'text 2.310 image 3.120 lr 1.0e-04 16.2k tokens/s'."""
    forms = (("loss_text", "text {:.3f}"), ("loss_image", "image {:.3f}"), ("lr", "lr {:.1e}"))
    parts = [form.format(line[name]) for name, form in forms if line.get(name) is not None]
    if line.get("tokens_per_second") is not None:
        parts.append(f"{line['tokens_per_second'] / 1000:.1f}k tokens/s")
    if line.get("mfu") is not None:
        parts.append(f"mfu {line['mfu']:.0%}")
    if line.get("memory_gib") is not None:
        parts.append(f"{line['memory_gib']:.1f} GiB")
    return " ".join(parts)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl in order, [] without a file. Left out is what no Monitor writes, such as a line cut
    by a kill."""
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[list[dict], int]:
    """Returns the lines, and how many are damaged; a last line that was cut does not count."""
    found = [_parse(text) for text in path.read_text(errors="replace").split("\n")] if path.exists() else [None]
    return [line for line in found if line is not None], found[:-1].count(None)


def _parse(text: str) -> dict | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 2**53:
        return None
    line = with_new_names("metrics", line)
    return line if all(_is_valid(name, value) for name, value in line.items()) else None


def _is_valid(name: str, value: object) -> bool:
    """Whether a field holds a number or null; a list of them is fine in BY_LAYER and in fields that are not ours."""
    several = isinstance(value, list) and (name == BY_LAYER or name not in FIELDS)
    return all(x is None or is_finite_number(x) for x in (value if several else [value]))
