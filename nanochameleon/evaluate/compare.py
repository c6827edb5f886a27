"""Compare two evaluations item by item, as Markdown.

    python -m nanochameleon.evaluate compare runs/a/evaluation runs/b/evaluation
    python -m nanochameleon.evaluate compare runs/a/evaluation runs/b/evaluation --tasks boolq

Both runs find the same items hard, so the difference of each item says more than two separate intervals. It takes a
paired bootstrap. Where a metric is 0 or 1, McNemar's exact test gives p: how often a difference at least as large would
come from two models that are equally good. Items that only one run has, or could ask, are counted and left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path

import tyro

from nanochameleon.cli import parse
from nanochameleon.errors import UserError, say, shown
from nanochameleon.evaluate.header import read_header
from nanochameleon.evaluate.log import ITEMS, PROBLEM, read_lines
from nanochameleon.evaluate.statistics import mcnemar, paired_interval
from nanochameleon.evaluate.table import facts, markdown_table, number
from nanochameleon.evaluate.task import Line
from nanochameleon.evaluate.tasks import TASKS

SHOWN = 5  # items that are named


@dataclass(frozen=True)
class Args:
    """Compare two evaluations item by item, as Markdown."""

    a: tyro.conf.Positional[Path]
    """The --out of an evaluation."""
    b: tyro.conf.Positional[Path]
    """The --out of another one over the same items."""
    tasks: str = ""
    """Names of tasks, joined by commas; without them all that both have."""


def main(args: Args) -> None:
    names = shared_tasks(args.a, args.b, [name.strip() for name in args.tasks.split(",") if name.strip()])
    pairs = {name: [read_lines(out / name / ITEMS) for out in (args.a, args.b)] for name in names}
    rows = [row for name, (a, b) in pairs.items() for row in compare_task(name, a, b)]
    if not rows:
        raise UserError(f"{', '.join(names)}: a and b have no metric in common, as after different --samples")
    say(f"- a: {described(args.a)}\n- b: {described(args.b)}\n\n{markdown_table(list(rows[0]), rows)}")


def described(out: Path) -> str:
    """Return what tells two evaluations apart: the model, and how it was asked."""
    how = facts(read_header(out))
    return f"{out}: {how['model']}; {how['options']}"


def shared_tasks(a: Path, b: Path, names: Sequence[str]) -> list[str]:
    """Return the tasks that both folders have. Raises UserError if there are none, or if one lacks any of `names`."""
    found = []
    for out in (a, b):
        found.append({path.parent.name for path in out.glob(f"*/{ITEMS}")})
        if not found[-1]:
            raise UserError(f"{out} holds no evaluation: give the --out of one")
        if lacking := [name for name in names if name not in found[-1]]:
            raise UserError(f"{out} has no {shown(lacking[0])}: it has {', '.join(sorted(found[-1]))}")
    if not (both := found[0] & found[1]):
        raise UserError(f"{a} and {b} have no task in common: {a} has {', '.join(sorted(found[0]))}")
    return list(names) or sorted(both)


def compare_task(name: str, a: Sequence[Line], b: Sequence[Line]) -> list[dict[str, str]]:
    """Return a row for each metric, over the items that were asked in both logs."""
    first, second = ({line.id: line for line in lines} for lines in (a, b))
    check_same_items(name, first, second)
    asked = [{key for key, line in lines.items() if PROBLEM not in line.output} for lines in (first, second)]
    keys = [key for key in first if key in asked[0] & asked[1]]
    if not keys:
        raise UserError(f"{name}: no item was asked in both evaluations, so there is nothing to compare")
    pairs = list(zip(*(metrics(name, [lines[key] for key in keys]) for lines in (first, second)), strict=True))
    only = {"only in a": f"{len(asked[0] - asked[1]):,}", "only in b": f"{len(asked[1] - asked[0]):,}"}
    rows = []
    for metric in sorted({metric for x, y in pairs for metric in x.keys() & y.keys()}):
        values = [(x[metric], y[metric]) for x, y in pairs if metric in x and metric in y]
        rows.append({"task": name, "metric": metric} | compare_metric(*zip(*values, strict=True)) | only)
    return rows


def metrics(name: str, lines: Sequence[Line]) -> list[dict[str, float]]:
    """Return the metrics of each line, and those that the task gives to a line among all lines."""
    task = next((task for task in TASKS if task.name == name), None)
    more = task.score_set(lines) if task and task.score_set else [{}] * len(lines)
    return [line.metrics | each for line, each in zip(lines, more, strict=True)]


def check_same_items(name: str, a: dict[str, Line], b: dict[str, Line]) -> None:
    """Raise UserError, naming the items, if an id has one content in a and another in b."""
    differ = [key for key in a if key in b and a[key].content != b[key].content]
    if differ:
        more = f" and {len(differ) - SHOWN:,} more" if len(differ) > SHOWN else ""
        which = f"{', '.join(shown(key) for key in differ[:SHOWN])}{more}"
        raise UserError(
            f"{name}: items {which} are not the same in a and b: evaluate both with the same files, shots and seed"
        )


def compare_metric(a: Sequence[float], b: Sequence[float]) -> dict[str, str]:
    """Return the means, their difference with its interval, and p where every value is 0 or 1."""
    values, n = {*a, *b}, len(a)
    share, scale = values <= {0.0, 1.0}, 100 if 0 <= min(values) <= max(values) <= 1 else 1  # percent, as in the tables
    means = fsum(a) / n, fsum(b) / n
    low, high = paired_interval(a, b)
    wins = [sum(x > y for x, y in zip(a, b, strict=True)), sum(x < y for x, y in zip(a, b, strict=True))]
    return {
        "n": f"{n:,}",
        "a": number(means[0], scale),
        "b": number(means[1], scale),
        "b - a": number(means[1] - means[0], scale),
        "95% interval": f"{number(low, scale)} to {number(high, scale)}",
        "better in a": f"{wins[0]:,}",
        "better in b": f"{wins[1]:,}",
        "McNemar's p": f"{mcnemar(*wins):.2g}" if share else "",
    }


def cli(arguments: Sequence[str]) -> None:
    main(parse(Args, arguments, description=__doc__, prog="python -m nanochameleon.evaluate compare"))
