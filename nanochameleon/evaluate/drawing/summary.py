"""The figures of a GenEval scorer's results: the mean of each task, and the mean of the six means.

    results.jsonl, a line {"tag", "correct", ...} for each image -> summarise -> rows of a table

The official scorer's file and ours (geneval.py) are read alike. The overall score is the mean of the task means, not of
the images: a task with few images counts as much as one with many (github.com/djghosh13/geneval). Its interval is made
of the tasks' intervals by MOVER (Zou and Donner 2008): with weights w, means m and bounds l, u

    overall - sqrt(sum w^2 (m - l)^2)  to  overall + sqrt(sum w^2 (u - m)^2)

The intervals take images as independent. Several images of one prompt are not quite, so the truth is a little wider.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanochameleon.evaluate.records import get, read_json_lines
from nanochameleon.evaluate.statistics import mean_figure
from nanochameleon.evaluate.task import Figure

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def summarise(path: Path) -> list[Figure]:
    """Return the overall score and the mean of each task that the file has. Raises UserError with file and line."""
    judged: dict[str, list[bool]] = {}
    for place, row in read_json_lines(path):
        judged.setdefault(get(row, "tag", str, place), []).append(get(row, "correct", bool, place))
    return figures(judged)


def figures(judged: Mapping[str, Sequence[bool]], ending: str = "") -> list[Figure]:
    """Return the overall figure and one for each task, in GenEval's order. judged: {task: is each image correct?}."""
    order = sorted(judged, key=lambda tag: (TASKS.index(tag) if tag in TASKS else len(TASKS), tag))
    tasks = [mean_figure(tag + ending, judged[tag], "images") for tag in order]
    return [overall(tasks, ending), *tasks]


def overall(tasks: Sequence[Figure], ending: str = "") -> Figure:
    """Return the mean of the task means with its interval by MOVER."""
    n, mean = len(tasks), math.fsum(task.value for task in tasks) / len(tasks)
    below = math.hypot(*(task.value - task.low for task in tasks)) / n
    above = math.hypot(*(task.high - task.value for task in tasks)) / n
    missing = [tag for tag in TASKS if tag + ending not in {task.name for task in tasks}]
    note = f"without {', '.join(missing)}: not GenEval's overall score" if missing else ""
    return Figure(f"overall{ending}", mean, n, "task means", mean - below, mean + above, "MOVER", note=note)


def table(rows: Sequence[Figure]) -> str:
    """Return the figures as lines of text, in percent."""
    width = max(len(row.name) for row in rows)
    lines = [
        f"{row.name:{width}}  {100 * row.value:5.1f}  ({100 * row.low:.1f} to {100 * row.high:.1f})  "
        f"{row.n} {row.unit}{f'; {row.note}' if row.note else ''}"
        for row in rows
    ]
    return "\n".join(lines)
