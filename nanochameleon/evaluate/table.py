"""Results as rows of text: for Markdown, for the terminal, and for the page (table_html.py).

{"header", "tasks": {name: {"figures", ...}}} -> rows {column: text} -> columns that no row fills are left out
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochameleon.errors import UserError, say
from nanochameleon.files import write_file

TITLE = "Evaluation"
COLUMNS = (
    "task", "figure", "value", "95% interval", "n", "chance", "baseline", "ceiling", "left out", "truncated", "note"
)  # fmt: skip
WORDS = ("task", "figure", "metric", "note")  # columns that are aligned to the left
MAX_FIGURES = 6  # of a task in the terminal: MMLU has 58
LEGEND = (
    "n: what the value is a mean of. Chance: what guessing gets. Baseline: what is right "
    "without a look at the image, or at the question. Ceiling: the judge's score of the correct answer. "
    "Left out: items that could not be asked. Truncated: prompts that lost their left end. "
    "Shares take Wilson's interval, or Clopper-Pearson's below 10 events; other means take a bootstrap."
)


def number(value: float | None, scale: float) -> str:
    """Print a figure by its scale: 100 means percent. (0.625, 100) -> '62.5%'; (1.2345, 1) -> '1.234'; None -> ''."""
    if value is None:
        return ""
    scaled = value * scale
    if scale != 100:
        return f"{scaled:.3f}" if abs(scaled) < 100 else f"{scaled:,.1f}"
    return f"{scaled:.1f}%" if abs(scaled) >= 1 or scaled == 0 else f"{scaled:.3f}%"


def duration(seconds: float) -> str:
    """90 -> '1:30 min', 5 -> '5 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def interval(figure: dict) -> str:
    if figure["low"] is None:
        return ""
    return f"{number(figure['low'], figure['scale'])} to {number(figure['high'], figure['scale'])}"


def rows_of(content: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each figure, and one for a task that has none."""
    return [row for name, result in content["tasks"].items() for row in rows_of_task(name, result)]


def rows_of_task(name: str, result: dict) -> list[dict[str, str]]:
    """Return the rows of one task. The first one says how many items were left out or truncated."""
    counts = {"left out": count(result["left_out"]), "truncated": count(result["truncated"])}
    figures = [row_of(figure) for figure in result["figures"]] or [{"note": "no item could be asked"}]
    if result["answered"] < result["items"]:
        stopped = f"only {result['answered']:,} of {result['items']:,} items were asked so far"
        figures[0]["note"] = "; ".join(filter(None, (stopped, figures[0]["note"])))
    figures[0] |= counts
    return [dict.fromkeys(COLUMNS, "") | {"task": name} | figure for figure in figures]


def row_of(figure: dict) -> dict[str, str]:
    unit = figure["unit"].removesuffix("s") if figure["n"] == 1 else figure["unit"]
    return {
        "figure": figure["name"],
        "value": number(figure["value"], figure["scale"]),
        "95% interval": interval(figure),
        "n": f"{figure['n']:,} {unit}",
        **{name: number(figure[name], figure["scale"]) for name in ("chance", "baseline", "ceiling")},
        "note": figure["note"],
    }


def count(n: int) -> str:
    return f"{n:,}" if n else ""


def filled(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the columns in which some row has a text."""
    return [column for column in COLUMNS if any(row[column] for row in rows)]


def facts(header: dict) -> dict[str, str]:
    """Return what the figures depend on, as lines for people."""
    model, options, last = header["model"], header["options"], header["sessions"][-1]
    changed = " with uncommitted changes" if last["uncommitted_changes"] else ""
    total = [session["seconds"] for session in header["sessions"]]
    seconds = duration(sum(total)) if None not in total else "unknown, since a session was stopped"
    return {
        "model": f"{model['path']}, {model['parameters']:,} parameters, {model['dtype']} on {model['device']}",
        "weights": f"{model['weights']}, image tokenizer {model['image_tokenizer']}, text {model['text_tokenizer']}",
        "options": ", ".join(f"{name} {'of the task' if v is None else v}" for name, v in options.items()),
        "code": f"commit {', '.join(dict.fromkeys(each['commit'] for each in header['sessions']))}{changed}",
        "versions": ", ".join(f"{name} {version}" for name, version in last["versions"].items()),
        "machine": last["machine"],
        "kernels": ", ".join(f"{op}: {name}" for op, name in last["kernels"].items()),
        "date": f"{last['date']}, session {len(header['sessions'])}",
        "wall time": seconds,
    }


def problems(content: dict[str, Any]) -> list[str]:
    """Return a line for each item that is known to have been left out, and one for those that are not listed."""
    found = []
    for name, result in content["tasks"].items():
        found += [f"{name}, item {each['id']}: {each['problem']}" for each in result["problems"]]
        if more := result["left_out"] - len(result["problems"]):
            found.append(f"{name}: and {more:,} more items")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Markdown and the terminal


def markdown(content: dict[str, Any]) -> str:
    rows = rows_of(content)
    parts = [f"# {TITLE}", markdown_table(filled(rows), rows), LEGEND]
    if left_out := problems(content):
        parts += ["## Left out", "\n".join(f"- {escape(line)}" for line in left_out)]
    parts += ["## How", "\n".join(f"- {name}: {escape(text)}" for name, text in facts(content["header"]).items())]
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[dict[str, str]]) -> str:
    line = "| " + " | ".join(columns) + " |"
    rule = "|" + "|".join(" --- " if column in WORDS else " ---: " for column in columns) + "|"
    return "\n".join([line, rule, *("| " + " | ".join(escape(row[c]) for c in columns) + " |" for row in rows)])


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def summary(content: dict[str, Any]) -> str:
    """Return a short table for the terminal: value, interval, n and chance of the first figures of each task."""
    lines = []
    for name, result in content["tasks"].items():
        rows = rows_of_task(name, result)
        lines += [
            (name, row["figure"] or row["note"], *(row[column] for column in ("value", "95% interval", "n")))
            for row in rows[:MAX_FIGURES]
        ]
        if len(rows) > MAX_FIGURES:
            lines.append(("", f"and {len(rows) - MAX_FIGURES} more", "", "", ""))
    return aligned(lines)


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Return columns of text: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ([f"{x:{'<' if i < 2 else '>'}{widths[i]}}" for i, x in enumerate(line)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def output(text: str, path: Path | None) -> None:
    """Write a file, or print."""
    if path is None:
        say(text, end="")
        return
    try:
        write_file(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another file with --to") from None
