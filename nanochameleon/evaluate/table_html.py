"""The results as one page that needs nothing else: a plot of the intervals, the table, what it depends on.

It has no script, no link and no image from elsewhere; every text is escaped. The plot is SVG whose x positions are in
percent of its width, so it fits any screen while its text keeps its size. Next to the plot, the table says the same.
"""

import html
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from nanochameleon.evaluate.report_html import PAGE, STYLE
from nanochameleon.evaluate.table import LEGEND, NUMBERS, TITLE, facts, filled, interval, number, problems, rows_of

ROW = 38  # pixels from one figure of the plot to the next
TICKS = 4  # steps of an axis


def page(content: dict[str, Any]) -> str:
    """Return the whole page."""
    rows, model = rows_of(content), content["header"]["model"]["path"]
    sections = [
        *(plot(figures, scale) for scale, figures in by_scale(content)),
        section("Figures", table(filled(rows), rows) + f"<p class=note>{html.escape(LEGEND)}</p>"),
    ]
    if left_out := problems(content):
        sections.append(
            section("Left out", f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in left_out)}</ul>")
        )
    pairs = "".join(f"<dt>{n}</dt><dd>{html.escape(text)}</dd>" for n, text in facts(content["header"]).items())
    sections.append(section("How", f"<dl>{pairs}</dl>"))
    title = html.escape(f"{TITLE} of {model}")
    return PAGE.format(title=title, style=STYLE + MORE_STYLE, body="\n".join(sections))


def section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>{body}</section>"


def table(columns: Sequence[str], rows: Sequence[dict[str, str]]) -> str:
    """Return a table that scrolls within the page where the screen is narrow."""
    sides = {column: " class=number" if column in NUMBERS else "" for column in columns}
    head = "".join(f"<th scope=col{sides[column]}>{column}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td{sides[column]}>{html.escape(row[column])}</td>' for column in columns)}</tr>"
        for row in rows
    )
    return (
        '<div class=wide tabindex=0 role=region aria-label="all figures"><table class=figures>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The plot


def by_scale(content: dict[str, Any]) -> list[tuple[float, list[tuple[str, dict]]]]:
    """Return [(scale, [(label, figure)])] of the figures with an interval. Shares have an axis of their own."""
    found: dict[float, list] = {}
    for task, result in content["tasks"].items():
        for figure in result["figures"]:
            if figure["low"] is not None:
                found.setdefault(figure["scale"], []).append((f"{task} · {figure['name']}", figure))
    return sorted(found.items(), reverse=True)


def plot(figures: Sequence[tuple[str, dict]], scale: float) -> str:
    """Return a section with one row a figure: a dot in its interval, and a tick where guessing is."""
    low, high = axis(figures, scale)

    def x(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    height = ROW * len(figures) + 22
    ticks = [low + (high - low) * i / TICKS for i in range(TICKS + 1)]
    anchors = ["start", *["middle"] * (TICKS - 1), "end"]
    grid = "".join(
        f'<line class=grid x1="{x(t)}" x2="{x(t)}" y1=0 y2={height - 18} />'
        f'<text class=axis x="{x(t)}" y={height - 4} text-anchor={anchor}>{number(t, scale)}</text>'
        for t, anchor in zip(ticks, anchors, strict=True)
    )
    rows = "".join(plot_row(label, figure, ROW * i, x) for i, (label, figure) in enumerate(figures))
    said = "; ".join(f"{label} {number(f['value'], scale)}, {interval(f)}" for label, f in figures)
    name = html.escape(f"95% intervals: {said}")
    drawn = f'<svg role=img aria-label="{name}" width="100%" height={height}>{grid}{rows}</svg>'
    note = "<p class=note>Dot: value. Bar: 95% interval. Upright line: chance.</p>"
    return section("Intervals", drawn + note)


def axis(figures: Sequence[tuple[str, dict]], scale: float) -> tuple[float, float]:
    """Return the ends of the axis: 0 to 100% for shares, else 0 to the largest number."""
    numbers = [figure[key] for _, figure in figures for key in ("low", "high", "value", "chance")]
    low, high = (min([0.0, *filter(None, numbers)]), max([0.0, *filter(None, numbers)]))
    return (min(low, 0.0), max(high, 1.0)) if scale == 100 else (low, high if high > low else low + 1)


def plot_row(label: str, figure: dict, top: int, x: Callable[[float], str]) -> str:
    """Return a label, and under it the interval."""
    y, chance, value = top + 26, figure["chance"], number(figure["value"], figure["scale"])
    tick = "" if chance is None else f'<line class=chance x1="{x(chance)}" x2="{x(chance)}" y1={y - 7} y2={y + 7} />'
    return (
        f"<text y={top + 14}>{html.escape(label)} <tspan class=value>{value}</tspan></text>"
        f'<line class=bar x1="{x(figure["low"])}" x2="{x(figure["high"])}" y1={y} y2={y} />{tick}'
        f'<circle cx="{x(figure["value"])}" cy={y} r=4.5 />'
    )


MORE_STYLE = textwrap.dedent("""
    svg { display: block; overflow: visible; font: 14px/1 ui-sans-serif, system-ui, "DejaVu Sans", sans-serif }
    svg text { fill: var(--ink) }
    svg .value { font-weight: 600 }
    svg .axis { fill: var(--soft); font-size: 12px }
    svg .grid { stroke: var(--rule); stroke-width: 1 }
    svg .bar { stroke: var(--soft); stroke-width: 5; stroke-linecap: round }
    svg .chance { stroke: var(--ink); stroke-width: 2 }
    svg circle { fill: var(--ink); stroke: var(--paper); stroke-width: 1.5 }
    .wide { overflow-x: auto }
    .wide:focus-visible { outline: 2px solid var(--soft); outline-offset: 2px }
    table.figures { max-width: none; font-size: .92rem }
    .figures th { padding: .2rem .9rem .4rem 0; white-space: nowrap; color: var(--soft) }
    .figures td { padding: .25rem .9rem .25rem 0; text-align: left; white-space: normal; vertical-align: top }
    .figures .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
    .note { color: var(--soft); font-size: .9rem }
    dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0 }
    dt { color: var(--soft) }
    dd { margin: 0; overflow-wrap: anywhere }
    h1 { overflow-wrap: anywhere }
""").rstrip()
