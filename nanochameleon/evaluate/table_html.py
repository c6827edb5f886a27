"""The results as one page that needs nothing else: a plot of the intervals, the table, what it depends on.

It has no script, no link and no image from elsewhere; every text is escaped. The plot is SVG whose x positions are in
percent of its width, so it fits any screen while its text keeps its size. Next to the plot, the table says the same.
"""

import html
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from nanochameleon.evaluate.report_html import PAGE, STYLE
from nanochameleon.evaluate.table import LEGEND, TITLE, facts, filled, interval, number, problems, rows_of_task

ROW = 38  # pixels from one figure of the plot to the next
TICKS = 4  # steps of an axis
MERGED = ("task", "left out", "truncated", "note")  # columns whose texts are in headings, or under a figure's name


def page(content: dict[str, Any]) -> str:
    """Return the whole page."""
    legend = f"<p class=note>{html.escape(LEGEND)}</p>"
    sections = [section("Figures", table(content) + legend)]
    if plots := [plot(figures, scale) for scale, figures in by_scale(content["tasks"])]:
        key = "<p class=note>Dot: value. Bar: 95% interval. Upright line: chance.</p>"
        sections.insert(0, section("Intervals", "".join(plots) + key))
    if left_out := problems(content):
        points = "".join(f"<li>{html.escape(each)}</li>" for each in left_out)
        sections.append(section("Left out", f"<ul>{points}</ul>"))
    pairs = "".join(f"<dt>{n}</dt><dd>{html.escape(text)}</dd>" for n, text in facts(content["header"]).items())
    sections.append(section("How", f"<dl>{pairs}</dl>"))
    title = html.escape(f"{TITLE} of {content['header']['model']['path']}")
    return PAGE.format(title=title, style=STYLE + MORE_STYLE, body="\n".join(sections))


def section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>{body}</section>"


# ---------------------------------------------------------------------------------------------------------------------
# The table: it scrolls within the page where the screen is narrow


def table(content: dict[str, Any]) -> str:
    tasks, shots = content["tasks"], content["header"]["options"].get("shots")
    rows = {name: rows_of_task(name, result) for name, result in tasks.items()}
    columns = [column for column in filled([row for each in rows.values() for row in each]) if column not in MERGED]
    head = "".join(f"<th scope=col>{column}</th>" for column in columns)
    body = "".join(task_rows(name, tasks[name], rows[name], columns, shots) for name in rows)
    return (
        '<div class=wide tabindex=0 role=region aria-label="all figures"><table class=figures>'
        f"<thead><tr>{head}</tr></thead>{body}</table></div>"
    )


def task_rows(
    name: str, result: dict, rows: Sequence[dict[str, str]], columns: Sequence[str], shots: int | None
) -> str:
    """Return a heading with the task's name and counts, then its figures, each with its note under its name."""
    counts = [f"{result['items']:,} items"]
    counts += [] if shots is None else [f"--shots {shots}"]  # the title has the task's own number
    counts += [f"{result[key]:,} {key.replace('_', ' ')}" for key in ("left_out", "truncated") if result[key]]
    about = f"<small>{html.escape(result['title'])} · {', '.join(counts)}</small>"
    heading = f"<tr><th colspan={len(columns)} scope=rowgroup><div>{html.escape(name)} {about}</div></th></tr>"
    lines = "".join(f"<tr>{''.join(cell(row, column) for column in columns)}</tr>" for row in rows)
    return f"<tbody>{heading}{lines}</tbody>"


def cell(row: dict[str, str], column: str) -> str:
    note = f" <small>{html.escape(row['note'])}</small>" if column == "figure" and row["note"] else ""
    return f"<td>{html.escape(row[column])}{note}</td>"


# ---------------------------------------------------------------------------------------------------------------------
# The plot


def by_scale(tasks: dict[str, dict]) -> list[tuple[float, list[tuple[str, dict]]]]:
    """Return [(scale, [(label, figure)])] of the figures with an interval. Shares have an axis of their own.

    The first one of a task has the task's name in its label: a narrow screen has no room for it in each.
    """
    found: dict[float, list] = {}
    for task, result in tasks.items():
        for scale in {figure["scale"] for figure in result["figures"]}:
            drawn = [f for f in result["figures"] if f["scale"] == scale and f["low"] is not None]
            labels = [f["name"] if i else f"{task} · {f['name']}" for i, f in enumerate(drawn)]
            found.setdefault(scale, []).extend(zip(labels, drawn, strict=True))
    found = {scale: drawn for scale, drawn in found.items() if drawn}
    return sorted(found.items(), reverse=True)


def plot(figures: Sequence[tuple[str, dict]], scale: float) -> str:
    """Return one row per figure: a dot in its interval, and a tick where guessing is."""
    low, high = axis(figures, scale)

    def x(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    height = ROW * len(figures) + 22
    ticks = [low + (high - low) * i / TICKS for i in range(TICKS + 1)]
    percent = "%" if scale == 100 else ""
    anchors = ["start", *["middle"] * (TICKS - 1), "end"]
    grid = "".join(
        f'<line class=grid x1="{x(t)}" x2="{x(t)}" y1=0 y2={height - 18} />'
        f'<text class=axis x="{x(t)}" y={height - 4} text-anchor={anchor}>{t * scale:g}{percent}</text>'
        for t, anchor in zip(ticks, anchors, strict=True)
    )
    rows = "".join(plot_row(label, figure, ROW * i, x) for i, (label, figure) in enumerate(figures))
    said = "; ".join(f"{label} {number(f['value'], scale)}, {interval(f)}" for label, f in figures)
    name = html.escape(f"95% intervals: {said}")
    return f'<svg role=img aria-label="{name}" height={height}>{grid}{rows}</svg>'


def axis(figures: Sequence[tuple[str, dict]], scale: float) -> tuple[float, float]:
    """Return the ends of the axis: 0 to 100% for shares, else round numbers around all that is drawn."""
    numbers = [figure[key] for _, figure in figures for key in ("low", "high", "value", "chance")]
    drawn = [0.0, 1.0 if scale == 100 else 0.0, *(each for each in numbers if each is not None)]
    return -round_up(-min(drawn)), round_up(max(drawn)) or 1.0


def round_up(value: float) -> float:
    """Return the next of 1, 2, 4 and 8 times a power of ten: 0.863 -> 1, 23 -> 40, 0 and below -> 0."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if value <= step * power * (1 + 1e-12))


def plot_row(label: str, figure: dict, top: int, x: Callable[[float], str]) -> str:
    """Return a label and the value, and under them the interval."""
    y, chance, value = top + 27, figure["chance"], number(figure["value"], figure["scale"])
    tick = "" if chance is None else f'<line class=chance x1="{x(chance)}" x2="{x(chance)}" y1={y - 7} y2={y + 7} />'
    return (
        f"<text y={top + 15}>{html.escape(label)}</text>"
        f'<rect x="100%" y={top} width=70 height=18 transform="translate(-64)" />'  # where a long label ends
        f'<text class=value x="100%" y={top + 15}>{value}</text>'
        f'<line class=bar x1="{x(figure["low"])}" x2="{x(figure["high"])}" y1={y} y2={y} />{tick}'
        f'<circle cx="{x(figure["value"])}" cy={y} r=4.5 />'
    )


MORE_STYLE = textwrap.dedent("""
    svg { display: block; width: 100%; margin-bottom: 1rem; overflow: clip; overflow-clip-margin: 6px;
      font: 14px/1 ui-sans-serif, system-ui, "DejaVu Sans", sans-serif }
    svg text { fill: var(--ink); stroke: var(--paper); stroke-width: 4; paint-order: stroke }
    svg rect { fill: var(--paper) }
    svg .value { font-weight: 600; text-anchor: end }
    svg .axis { fill: var(--soft); font-size: 12px }
    svg .grid { stroke: var(--rule); stroke-width: 1 }
    svg .bar { stroke: var(--soft); stroke-width: 5; stroke-linecap: round }
    svg .chance { stroke: var(--ink); stroke-width: 2 }
    svg circle { fill: var(--ink); stroke: var(--paper); stroke-width: 1.5 }
    .wide { overflow-x: auto }
    .wide:focus-visible { outline: 2px solid var(--soft); outline-offset: 2px }
    .figures { max-width: none }
    .figures thead th { padding: 0 0 .3rem 1rem; text-align: right; color: var(--soft); white-space: nowrap }
    .figures tbody th { padding: 1.1rem 0 .2rem }
    .figures tbody th div { max-width: min(100%, 100vw - 3rem) }
    .figures td { vertical-align: top }
    .figures td:first-child, .figures th:first-child { padding-left: 0; text-align: left; white-space: normal }
    small { color: var(--soft); font-weight: 400 }
    td small { display: block; min-width: 9rem; max-width: 24rem }
    .note { color: var(--soft); font-size: .9rem }
    dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0 }
    dt { color: var(--soft) }
    dd { margin: 0; overflow-wrap: anywhere }
    h1, li { overflow-wrap: anywhere }
""").rstrip()
