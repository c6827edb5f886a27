"""One figure of rows: how much of the limit each program reaches, a panel for each op, a line for each shape.

    rows -> panels, {op: {shape: {program: share of the limit}}} -> PNG, 800 pixels wide on a page

The axis is logarithmic, so the same distance is the same ratio: between two programs, and from ours to the limit. Each
program has one colour and one form in all figures, in colours that colour-blind people can tell apart. Rows without a
share are left out. Of forward alone and both passes the latter counts, and of our variants the best.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanochameleon.bench.rows import Row
from nanochameleon.errors import UserError
from nanochameleon.files import write_file


class Look(NamedTuple):
    label: str
    colour: str
    marker: str
    size: float


LOOKS = {
    "ours": Look("ours", "#0072B2", "o", 8.0),
    "compile": Look("torch.compile", "#D55E00", "s", 5.5),
    "eager": Look("eager", "#555555", "v", 6.0),
    "transformers": Look("transformers", "#AA4499", "D", 5.0),
    "copy": Look("a copy", "#888888", "|", 9.0),
    "limit": Look("limit", "black", "", 0.0),
}
OURS = "numba", "bf16", "cuda", "in place", "auto", "nano"
TITLES = {
    "attention": "QK-norm, rotation and attention",
    "zloss": "cross-entropy with z-loss",
    "linear_zloss": "output layer and loss",
    "decode": "attention of a decode step",
    "train": "training step",
    "step": "training step without and with our kernels",
    "engine": "generation",
}
Line = dict[str, float]  # {program: its share}


@dataclass(frozen=True)
class Panel:
    lines: dict[str, Line]
    devices: dict[str, None]  # as a set that keeps its order


# ---------------------------------------------------------------------------------------------------------------------
# Rows -> panels


def program(variant: str) -> str | None:
    """Who runs a variant, by name. None for parts of an op, and for what does something else than the others."""
    name = variant.removesuffix(" generate dynamic").removesuffix(" generate static")
    words = name.split()
    if words[0] in ("nano", "transformers") and {*words[1:]} <= {"eager", "compile", "fp32", "bf16", "weights"}:
        return {"nano": "ours"}.get(words[0], words[0])
    return "ours" if name in OURS else {"reference": "eager"}.get(name, name if name in LOOKS else None)


def place(row: Row) -> tuple[str, str] | None:
    """The panel and the line of a row; None where its figure is drawn by another row."""
    if row.bench == "engine":
        return "engine", row.case
    if row.bench == "train":
        precision = {"fp32": "fp32", "bf16": "bf16", "weights": "bf16"}
        found = [precision[word] for word in row.variant.split() if word in precision]
        return ("train", f"{row.case.removesuffix(', each')}, {found[0]}") if found else None
    op, _, shape = row.case.partition(" ")
    return op, shape


def panels(rows: Sequence[Row]) -> dict[str, Panel]:
    """The panels that have lines, in the order of TITLES. A program's share is its best one."""
    found = {op: Panel({}, {}) for op in TITLES}
    for row in rows:
        where, who = place(row), program(row.variant)
        if row.of_limit is None or where is None or who is None:
            continue
        panel = found[where[0]]
        line = panel.lines.setdefault(where[1], {})
        line[who] = max(row.of_limit, line.get(who, 0.0))
        panel.devices[row.device] = None
    return {op: Panel(both_passes(panel.lines), panel.devices) for op, panel in found.items() if panel.lines}


def both_passes(lines: dict[str, Line]) -> dict[str, Line]:
    """Leave out forward alone where a line for both passes is there."""
    kept = {name: line for name, line in lines.items() if not (name.endswith(" f") and f"{name}+b" in lines)}
    return {name.removesuffix(" f+b"): line for name, line in kept.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Panels -> figure. Lengths are in inches.

WIDTH, LEFT, RIGHT = 8.0, 2.2, 1.5  # the page; the names of the lines; how many times as fast ours is
LINE, HEAD, FOOT = 0.23, 0.62, 0.62  # height of a line, above the lines of a panel, below all panels
MOST = 1.12  # where the axis ends; it begins at 0.8 of the smallest share
TICKS = 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0
LETTER = 0.078  # the width of one, on average


def spread(places: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Move sorted places apart, as little as needed, until texts of these widths do not overlap."""
    moved = list(places)
    for _ in range(200):
        for i in range(len(moved) - 1):
            missing = (widths[i] + widths[i + 1]) / 2 - (moved[i + 1] - moved[i])
            if missing > 1e-9:
                moved[i] -= missing / 2
                moved[i + 1] += missing / 2
    return moved


def ratio(line: Line) -> str:
    """How many times as fast ours is as the best of the others, as text; nothing where there is none."""
    others = [name for name in line if name not in ("ours", "copy")]
    if not others or "ours" not in line:
        return ""
    best = max(others, key=line.__getitem__)
    return f"{line['ours'] / line[best]:.1f} x {LOOKS[best].label}"


def draw_lines(axes, lines: dict[str, Line]) -> None:
    at_right = axes.get_yaxis_transform()
    for y, line in enumerate(lines.values()):
        axes.plot([min(line.values()), 1.0], [y, y], color="#d0d0d0", linewidth=1.0, zorder=1)
        for name in sorted(line, key=list(LOOKS).index):  # ours is the largest dot, so the others come on top
            look = LOOKS[name]
            axes.plot(
                line[name], y, look.marker, color=look.colour, markersize=look.size, markeredgewidth=1.5, zorder=2
            )
        axes.text(1.03, y, ratio(line), color=LOOKS["ours"].colour, va="center", fontsize=9, transform=at_right)


def name_programs(axes, line: Line) -> None:
    """Write the names above the dots of the first line, and that of the limit."""
    line = line | {"limit": 1.0}
    names = sorted(line, key=line.__getitem__)
    inches = axes.get_position().width * WIDTH
    least, most = axes.get_xlim()
    places = [inches * math.log(line[name] / least) / math.log(most / least) for name in names]
    widths = [LETTER * (len(LOOKS[name].label) + 2) for name in names]
    for name, place in zip(names, spread(places, widths), strict=True):
        look = LOOKS[name]
        axes.annotate(
            look.label, (line[name], 0), (place * 72, axes.bbox.height * 72 / axes.figure.dpi + 1),
            textcoords="axes points", color=look.colour, fontsize=9, weight="bold", ha="center", va="bottom",
        )  # fmt: skip


def draw_panel(axes, title: str, panel: Panel, least: float) -> None:
    ticks = [tick for tick in TICKS if tick >= least]
    axes.set_xscale("log")
    axes.set_xlim(least, MOST)
    axes.set_ylim(len(panel.lines) - 0.5, -0.7)
    axes.set_yticks(range(len(panel.lines)), list(panel.lines), fontsize=9)
    axes.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks], fontsize=9)
    axes.minorticks_off()
    axes.tick_params(length=0)
    axes.grid(axis="x", color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.axvline(1.0, color="black", linewidth=1.5, zorder=1)
    axes.spines[:].set_visible(False)
    draw_lines(axes, panel.lines)
    name_programs(axes, next(iter(panel.lines.values())))
    top = axes.get_position().y1 + 0.24 / axes.figure.get_figheight()
    axes.figure.text(0.012, top, title, fontsize=10, weight="bold", va="bottom")
    axes.figure.text(0.988, top, "; ".join(panel.devices), fontsize=8, color="#777777", ha="right", va="bottom")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Raises UserError where no row has a share of its limit."""
    from matplotlib.figure import Figure  # a Figure of its own, not pyplot: no window, no global state

    found = panels(rows)
    if not found:
        raise UserError("no row has a share of a limit: draw those of the benches kernels, train and engine")
    least = 0.8 * min(min(line.values()) for panel in found.values() for line in panel.lines.values())
    heights = {op: HEAD + LINE * len(panel.lines) for op, panel in found.items()}
    height = top = FOOT + sum(heights.values())
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout="none")
    for op, panel in found.items():
        top -= heights[op]
        size = (WIDTH - LEFT - RIGHT) / WIDTH, (heights[op] - HEAD) / height
        axes = figure.add_axes((LEFT / WIDTH, top / height, *size))
        draw_panel(axes, TITLES[op], panel, least)
        axes.tick_params(labelbottom=op == list(found)[-1])
    axes.set_xlabel("speed: the share of what this machine's matmuls and memory allow", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())
