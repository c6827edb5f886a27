"""The paper's stability ablations (section 2.3, figures 5 and 6) in minutes: `python train.py stability`.

Each variant leaves one part of the recipe out. All share tokenizers and data, and run at two learning rates with
several seeds. What diverges in a 7B model after a trillion tokens shows in a small one at a higher learning rate
(Wortsman et al., arXiv 2309.14322). This file trains nothing itself: `train` is train.py's main.
"""

import dataclasses
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from nanochameleon.config import EvalConfig, RunConfig
from nanochameleon.errors import GaveUp, UserError, say
from nanochameleon.files import write_file
from nanochameleon.training.monitor import METRICS, read_metrics
from nanochameleon.training.run import CONFIG, DATA, IMAGE_TOKENIZER, TEXT_TOKENIZER, config_to_json
from nanochameleon.training.run_folder import claim

SEEDS = 3
RATES = {"plain": 1.0, "hot": 10.0}  # times optim.lr


@dataclass(frozen=True)
class Variant:
    """A recipe, and which of the paper's figures it reproduces."""

    name: str
    figure: str
    model: dict
    train: dict = dataclasses.field(default_factory=dict)

    def config(self, base: RunConfig, rate: str, seed: int) -> RunConfig:
        return dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, **self.model),
            train=dataclasses.replace(base.train, **self.train),
            optim=dataclasses.replace(base.optim, lr=base.optim.lr * RATES[rate]),
            out=base.folder / f"{self.name.replace(' ', '-').replace(',', '')}-{rate}-{seed}",
            seed=seed,
        )


PRE, POST = {"norm_order": "pre"}, {"norm_order": "post"}
VARIANTS = (
    Variant("7B recipe", "5a 5b 5c 6a", PRE | {"dropout": 0.1}),
    Variant("without dropout", "5a 5c", PRE),
    Variant("without QK-norm", "5b", PRE | {"dropout": 0.1, "qk_norm": False}),
    Variant("without both", "5a", PRE | {"qk_norm": False}),
    Variant("without z-loss", "-", PRE | {"dropout": 0.1}, {"z_loss": 0.0}),
    Variant("34B recipe", "6a 6c", POST),
    Variant("34B, dropout", "6c", POST | {"dropout": 0.1}),
    Variant("34B, without QK-norm", "-", POST | {"qk_norm": False}),
    Variant("without both, no drawing", "6b", PRE | {"qk_norm": False}, {"image_loss": "none"}),
)


# ---------------------------------------------------------------------------------------------------------------------
# Running


def run_ablations(cfg: RunConfig, train: Callable[[RunConfig], Path]) -> Path:
    """Train every variant that is not finished, write stability.json, .md and .png, and return the folder.

    Raises UserError under torchrun.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("the ablations are small runs of one process each: start them without torchrun")
    with claim(cfg.folder):
        return run_all(dataclasses.replace(cfg, evaluation=EvalConfig(1, 1, 1)), train)


def run_all(base: RunConfig, train: Callable[[RunConfig], Path]) -> Path:
    todo = [(v, rate, seed) for seed in range(SEEDS) for rate in RATES for v in VARIANTS]
    curves: dict[tuple[str, str], list[list[dict]]] = {}
    for number, (variant, rate, seed) in enumerate(todo, 1):
        say(f"stability {number}/{len(todo)}: {variant.name}, {rate} rate, seed {seed}")
        one = variant.config(base, rate, seed)
        copy_prepared(base.folder, one)
        try:
            train(one)
        except GaveUp as error:  # a divergence is a result, too
            say(error)
        else:
            keep_prepared(base.folder, one)
        curves.setdefault((variant.name, rate), []).append(read_metrics(one.folder / METRICS))
    write(base.folder, curves)
    return base.folder


def copy_prepared(folder: Path, cfg: RunConfig) -> None:
    """Copy the tokenizers and the data of the first run into a run that has not started."""
    if (cfg.folder / CONFIG).exists() or not (folder / "beginning").exists():
        return
    aside = folder / f".{cfg.folder.name}"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(folder / "beginning", aside)
    (aside / CONFIG).write_text(config_to_json(cfg))
    aside.rename(cfg.folder)


def keep_prepared(folder: Path, cfg: RunConfig) -> None:
    """Keep a copy of a run's tokenizers and data for the runs after it."""
    if not (folder / "beginning").exists():
        aside = folder / ".beginning"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        shutil.copy(cfg.folder / TEXT_TOKENIZER, aside)
        for name in (IMAGE_TOKENIZER, DATA):
            shutil.copytree(cfg.folder / name, aside / name)
        aside.rename(folder / "beginning")


# ---------------------------------------------------------------------------------------------------------------------
# Results


def summarize(metrics: list[dict]) -> dict[str, float | bool]:
    """Summarize one run's log: the paper's signs of an unstable training, and whether it diverged.

    loss, output_norm: means over the last tenth. diverged: that loss is not finite, or half a nat above the best tenth.
    worst_spike: nats above the best loss so far. attention_logit, log_z: the largest, log Z after the first fifth.
    """
    tenth = max(1, len(metrics) // 10)
    losses, norms, logits, log_z = (
        [math.inf if (x := largest(line[name])) is None else abs(x) for line in metrics]
        for name in ("loss", "output_norm", "attention_logits", "log_z")
    )
    end = sum(losses[-tenth:]) / tenth
    best = min(sum(losses[i : i + tenth]) / tenth for i in range(len(losses) - tenth + 1))
    return {
        "loss": end,
        "diverged": not end < best + 0.5,
        "worst_spike": max(x - low for x, low in zip(losses, accumulate(losses, min), strict=True)),
        "output_norm": sum(norms[-tenth:]) / tenth,
        "attention_logit": max(logits),
        "log_z": max(log_z[len(metrics) // 5 :]),
    }


def table(curves: dict[tuple[str, str], list[list[dict]]]) -> str:
    """Markdown with a row for each variant and rate: the median over seeds."""
    head = ["recipe", "paper's figure", "rate", "diverged", "loss", "worst spike"]
    head += ["output norm", "attention logit", "log Z"]
    lines = [" | ".join(("", *head, "")).strip(), "|" + "---|" * len(head)]
    for variant in VARIANTS:
        for rate in RATES:
            seen = [summarize(metrics) for metrics in curves.get((variant.name, rate), []) if metrics]
            if not seen:
                continue
            middle = {key: sorted(x[key] for x in seen)[len(seen) // 2] for key in seen[0] if key != "diverged"}
            numbers = (f"{value:.3g}" for value in middle.values())
            diverged = f"{sum(x['diverged'] for x in seen)} of {len(seen)}"
            lines.append("| " + " | ".join((variant.name, variant.figure, rate, diverged, *numbers)) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, curves: dict[tuple[str, str], list[list[dict]]]) -> None:
    text = table(curves)
    say(text)
    rows = [
        {"recipe": name, "rate": rate, "seeds": [summarize(metrics) for metrics in several if metrics]}
        for (name, rate), several in curves.items()
    ]
    write_file(folder / "stability.json", (json.dumps(rows, indent=1).replace("Infinity", "null") + "\n").encode())
    write_file(folder / "stability.md", text.encode())
    plot(folder / "stability.png", curves)


PANELS = (  # title, what, which variants
    ("5a: output norm", "output_norm", ("7B recipe", "without dropout", "without both")),
    ("5b: loss, QK-norm", "loss", ("7B recipe", "without QK-norm")),
    ("5c: loss, dropout", "loss", ("7B recipe", "without dropout")),
    ("6a: loss, both recipes", "loss", ("7B recipe", "34B recipe")),
    ("6b: output norm without drawing", "output_norm", ("without both", "without both, no drawing")),
    ("6c: loss, dropout and norm order", "loss", ("34B recipe", "34B, dropout")),
    ("largest attention logit, QK-norm", "attention_logits", ("7B recipe", "without QK-norm", "34B, without QK-norm")),
    ("log Z, z-loss", "log_z", ("7B recipe", "without z-loss")),
)


def plot(path: Path, curves: dict[tuple[str, str], list[list[dict]]]) -> None:
    """Plot the counterparts of the paper's figures, and two more, at the hot rate; a thin line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 14), dpi=100, layout="constrained")
    for panel, (title, what, names) in zip(figure.subplots(4, 2).flat, PANELS, strict=True):
        for colour, name in enumerate(names):
            for number, metrics in enumerate(curves.get((name, "hot"), [])):
                points = [(line["step"], largest(line[what])) for line in metrics if largest(line[what]) is not None]
                label = name if number == 0 else None
                panel.plot(*zip(*points, strict=True), color=f"C{colour}", linewidth=0.9, alpha=0.8, label=label)
        panel.set_title(title, loc="left", fontsize=11)
        if what != "loss":
            panel.set_yscale("log")
        panel.grid(alpha=0.25)
        if panel.lines:
            panel.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())


def largest(value) -> float | None:
    """The largest of a line's number, or of its numbers by layer; None for what was not finite."""
    if not isinstance(value, list):
        return value
    return max(value) if all(x is not None for x in value) else None
