"""The stability dashboard: what the paper watches (section 2.3, figures 5 and 6), logged, shown and drawn.

Loss by modality, mean log Z of the output softmax and the norm of the last block's output: a norm that grows without
bound announces a divergence long before the loss does. One JSON line a logged step in metrics.jsonl, one progress bar,
one image. No account, no server; it computes no metric itself.
"""

import io
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import mode

from tqdm import tqdm

from nanochameleon.errors import UserError, warn
from nanochameleon.files import is_finite_number, write_file

METRICS = "metrics.jsonl"
FIELDS = {  # every line has "step" and what of these was given; null stands for what is not finite in fp32
    "loss": "nats a supervised token, the z-loss term included",
    "loss_text": "nats a text token",
    "loss_image": "nats an image code",
    "z_loss": "the z-loss term as added, nats",
    "log_z": "mean log Z of the output softmax, nats",
    "output_norm": "mean Euclidean norm of the last block's output over tokens",
    "attention_logits": "the largest attention logit of each layer, on the batch's first row",
    "grad_norm": "global gradient norm before clipping",
    "grad_norm_text": "the same, of the rows of embedding and output layer that belong to text",
    "grad_norm_image": "the same, of those that belong to image codes",
    "lr": "learning rate",
    "left_out": "updates so far that did not happen, since loss or gradient was not finite",
    "tokens": "supervised tokens since the first step, padding and each document's <s> left out",
    "ids": "ids of all rows since the first step, padding too",
    "tokens_per_second": "since the line before",
    "mfu": "share of the devices' peak rate that the model's own arithmetic takes, since the line before",
    "memory_gib": "most memory taken so far: of the first rank's GPU, else of its process",
    "seconds": "since the first step, with checkpoints and sample grids, without the time between a stop and a resume",
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

    Lines of steps from `start` on, left by a run that died after its last checkpoint, are dropped: each step is there
    once. `clock` returns seconds. mfu_per_token: by which ids a second are multiplied to give "mfu"; None is without.
    board: what open_tensorboard gives, None without.
    """

    def __init__(
        self, run_dir: Path, total_steps: int, start: int = 0, clock: Callable[[], float] = time.monotonic,
        mfu_per_token: float | None = None, board=None,
    ):  # fmt: skip
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        self.path, self.file, self.full = Path(run_dir) / METRICS, None, False
        self.total_steps, self.clock, self.mfu_per_token, self.board = total_steps, clock, mfu_per_token, board
        self.open_at(start)
        # Without a terminal each update is a line of its own in some log, so there are few.
        pause = 0.5 if sys.stderr.isatty() else 15.0
        self.bar = tqdm(
            total=total_steps, initial=start, desc="training", unit="step", mininterval=pause, smoothing=0.05,
            bar_format=BAR, dynamic_ncols=True, file=sys.stderr,
        )  # fmt: skip

    def open_at(self, start: int) -> None:
        """Goes on behind the lines of the steps before `start`."""
        self.close()
        lines, n_damaged = _read(self.path)
        if n_damaged:
            warn(f"{self.path}: {n_damaged} damaged lines are left out")
        kept = [line for line in lines if line["step"] < start]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        before = kept[-1] if kept else {}
        self.seconds, self.tokens = before.get("seconds") or 0.0, before.get("tokens") or 0
        self.ids = before.get("ids") or 0
        self.last = self.clock()
        self.file = self.path.open("a")

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step."""
        self.open_at(step)
        self.bar.n = step
        self.bar.refresh()

    def log(self, step: int, **values) -> dict:
        """Appends one line of numbers (or 0-d tensors) by the names of FIELDS, and returns it; more names are fine."""
        now = self.clock()
        elapsed, self.last = now - self.last, now
        self.seconds += elapsed
        line = {"step": step} | {name: _clean(value) for name, value in values.items()}
        line["seconds"] = round(self.seconds, 3)
        if "tokens" in values:
            line["tokens_per_second"] = round((values["tokens"] - self.tokens) / max(elapsed, 1e-9), 1)
            self.tokens = values["tokens"]
        if self.mfu_per_token and "ids" in values:
            line["mfu"] = round(self.mfu_per_token * (values["ids"] - self.ids) / max(elapsed, 1e-9), 4)
            self.ids = values["ids"]
        if self.board:
            self.write_tensorboard(line)
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk: the line stays in the file's buffer and is written with a later one
            if not self.full:
                warn(f"{self.path} cannot be written: {error}; the run goes on")
            self.full = True
        self.bar.set_postfix_str(summary(line), refresh=False)
        return line

    def write_tensorboard(self, line: dict) -> None:
        """The same numbers for TensorBoard, where each layer has a curve of its own."""
        for name, value in line.items():
            several = value if isinstance(value, list) else [value]
            for number, x in enumerate(several):
                if x is not None and name != "step":
                    label = f"{name}/{number:02d}" if isinstance(value, list) else name
                    self.board.add_scalar(label, x, line["step"])
        self.board.flush()

    def progress(self, step: int) -> None:
        """Moves the bar behind this step; it shows the time left and the figures of the last line."""
        self.bar.update(step + 1 - self.bar.n)

    def __enter__(self) -> "Monitor":
        return self

    def close(self) -> None:
        if self.file:
            with suppress(OSError):  # of lines that the disk did not take, as a warning has said
                self.file.close()

    def __exit__(self, *error) -> None:
        self.bar.close()
        self.close()
        if self.board:
            self.board.close()


def open_tensorboard(folder: Path):
    """Writes TensorBoard's files into `folder`. Raises UserError where the package is missing."""
    if not find_spec("tensorboard"):
        install = "pip install -c constraints.txt -e '.[tensorboard]'"
        raise UserError(f"train.tensorboard needs the package tensorboard: {install}, or leave the option out")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _clean(value):
    """A number, or several, as JSON can hold it, which has no NaN and no infinity."""
    if isinstance(value, list):
        return [_clean(x) for x in value]
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
    """The lines of a metrics.jsonl in its order, [] without one. Left out is what no Monitor writes, such as a line cut
    by a kill."""
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[list[dict], int]:
    """The lines, and how many others there are, the last one not counted where it was cut."""
    found = [_parsed(text) for text in path.read_text(errors="replace").split("\n")] if path.exists() else [None]
    return [line for line in found if line is not None], found[:-1].count(None)


def _parsed(text: str) -> dict | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 2**53:
        return None
    return line if all(_is_usual(name, value) for name, value in line.items()) else None


def _is_usual(name: str, value: object) -> bool:
    """Whether a field holds a number or null; several where there is one for each layer, and in fields of others."""
    several = isinstance(value, list) and (name == BY_LAYER or name not in FIELDS)
    return all(x is None or is_finite_number(x) for x in (value if several else [value]))


# ---------------------------------------------------------------------------------------------------------------------
# curves.png: six panels, 1,000 pixels wide

MOST_CURVES = 256  # more than any model has layers
TEXT, IMAGE, OTHER, FAINT = "#2a6fb0", "#d2622a", "#3d7d5a", "#8a8a8a"


def plot_curves(metrics: list[dict], path: Path) -> None:
    """Draws loss by modality, output norm, log Z, attention logits, gradient norms and learning rate into a PNG."""
    from matplotlib.figure import Figure  # a Figure of its own, not pyplot: no window, no global state

    figure = Figure(figsize=(10, 10), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    (loss, norm), (log_z, logits), (gradient, rate) = figure.subplots(3, 2)
    _plot_loss(loss, metrics)
    _plot_smooth(norm, metrics, "output_norm", OTHER)
    _label(norm, "Output norm of the last block", "mean Euclidean norm")
    _plot_smooth(log_z, metrics, "log_z", OTHER)
    _label(log_z, "Mean log Z of the output softmax", "nats")
    _plot_layers(logits, metrics)
    _label(logits, "Largest attention logit", "by layer, the last one darkest")
    _plot_gradient(gradient, metrics)
    rate.plot(*_series(metrics, "lr"), color=FAINT, linewidth=1.5)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.set_ylim(bottom=0)
    _label(rate, "Learning rate", "")
    for panel in (gradient, rate):
        panel.set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(Path(path), buffer.getvalue())


def smooth(values: list[float], share: float = 0.03) -> list[float]:
    """Running mean over a window of `share` of all values, centred and shorter at the ends: no lag."""
    reach = int(len(values) * share / 2)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _plot_smooth(panel, metrics: list[dict], name: str, colour: str, label: str | None = None) -> None:
    steps, values = _series(metrics, name)
    panel.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    panel.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label)


def _label(panel, title: str, unit: str) -> None:
    panel.set_title(title, loc="left", fontsize=12)
    panel.set_ylabel(unit)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _plot_loss(panel, metrics: list[dict]) -> None:
    _plot_smooth(panel, metrics, "loss_image", IMAGE, "image codes")
    _plot_smooth(panel, metrics, "loss_text", TEXT, "text")
    _label(panel, "Loss by modality", "nats a token")
    panel.legend(frameon=False)
    bits = panel.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits a token")


def _plot_layers(panel, metrics: list[dict]) -> None:
    """A curve for each layer, of the lines that have as many numbers as most of them."""
    lines = [(line["step"], line[BY_LAYER]) for line in metrics if isinstance(line.get(BY_LAYER), list)]
    n_layers = mode(len(values) for _, values in lines) if lines else 0
    for layer in range(min(n_layers, MOST_CURVES)):
        points = [(step, values[layer]) for step, values in lines if len(values) == n_layers]
        points = [(step, value) for step, value in points if value is not None]
        shade = 0.25 + 0.75 * (layer + 1) / n_layers
        panel.plot(*zip(*points, strict=True), color=OTHER, linewidth=1.2, alpha=shade)


def _plot_gradient(panel, metrics: list[dict]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    _plot_smooth(panel, metrics, "grad_norm", OTHER, "all weights")
    _plot_smooth(panel, metrics, "grad_norm_image", IMAGE, "rows of image codes")
    _plot_smooth(panel, metrics, "grad_norm_text", TEXT, "rows of text")
    _label(panel, "Gradient norm", "before clipping")
    panel.legend(frameon=False)
    if any(value > 0 for value in _series(metrics, "grad_norm")[1]):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
