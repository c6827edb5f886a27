"""curves.png: six panels with what the paper watches (figures 5 and 6), 1,000 pixels wide."""

import io
import math
from pathlib import Path
from statistics import mode

from nanochameleon.files import write_file
from nanochameleon.training.monitor import BY_LAYER

MAX_CURVES = 256  # more than any model has layers
TEXT, IMAGE, OTHER, FAINT = "#2a6fb0", "#d2622a", "#3d7d5a", "#8a8a8a"


def plot_curves(metrics: list[dict], path: Path) -> None:
    """Draw loss by modality, output norm, log Z, attention logits, gradient norms and learning rate into a PNG."""
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


def smooth(values: list[float], fraction: float = 0.03) -> list[float]:
    """Running mean over a window of a fraction of all values, centred and shorter at the ends: no lag."""
    reach = int(len(values) * fraction / 2)
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
    _plot_smooth(panel, metrics, "loss_image", IMAGE, "image tokens")
    _plot_smooth(panel, metrics, "loss_text", TEXT, "text")
    _label(panel, "Loss by modality", "nats a token")
    panel.legend(frameon=False)
    bits = panel.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits a token")


def _plot_layers(panel, metrics: list[dict]) -> None:
    """Plot a curve for each layer. Lines with another number of layers than most are left out."""
    lines = [(line["step"], line[BY_LAYER]) for line in metrics if isinstance(line.get(BY_LAYER), list)]
    n_layers = mode(len(values) for _, values in lines) if lines else 0
    for layer in range(min(n_layers, MAX_CURVES)):
        points = [(step, values[layer]) for step, values in lines if len(values) == n_layers]
        points = [(step, value) for step, value in points if value is not None]
        shade = 0.25 + 0.75 * (layer + 1) / n_layers
        panel.plot(*zip(*points, strict=True), color=OTHER, linewidth=1.2, alpha=shade)


def _plot_gradient(panel, metrics: list[dict]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    _plot_smooth(panel, metrics, "grad_norm", OTHER, "all weights")
    _plot_smooth(panel, metrics, "grad_norm_image", IMAGE, "rows of image tokens")
    _plot_smooth(panel, metrics, "grad_norm_text", TEXT, "rows of text")
    _label(panel, "Gradient norm", "before clipping")
    panel.legend(frameon=False)
    if any(value > 0 for value in _series(metrics, "grad_norm")[1]):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
