"""The results of an evaluation: OUT/results.json holds all figures, next to it are a Markdown table and a page.

lines of a task -> task_result -> results.json -> table.py, table_html.py
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochameleon.evaluate.log import PROBLEM, writing
from nanochameleon.evaluate.statistics import default_figures
from nanochameleon.evaluate.table import markdown
from nanochameleon.evaluate.table_html import page
from nanochameleon.evaluate.task import Line, Task
from nanochameleon.files import read_json, write_file

RESULTS, MARKDOWN, HTML = "results.json", "table.md", "table.html"
MAX_PROBLEMS = 10  # that are listed for a task


def task_result(task: Task, lines: Sequence[Line], n_items: int, seconds: float) -> dict[str, Any]:
    """Return the figures of a task over the items that could be asked, and how many could not."""
    asked = [line for line in lines if PROBLEM not in line.output]
    problems = [{"id": line.id, "problem": line.output[PROBLEM]} for line in lines if PROBLEM in line.output]
    figures = (task.figures or default_figures)(asked) if asked else []
    return {
        "title": task.title,
        "items": n_items,
        "answered": len(lines),
        "left_out": len(problems),
        "problems": problems[:MAX_PROBLEMS],
        "truncated": sum(line.truncated for line in asked),
        "seconds": round(seconds, 1),
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }


def write_results(out: Path, header: dict, results: dict[str, dict]) -> dict[str, Any]:
    """Write the three files. Tasks that an earlier session ran keep their results. Returns what results.json holds."""
    earlier = read_json(out / RESULTS).get("tasks", {}) if (out / RESULTS).exists() else {}
    content = {"header": header, "tasks": earlier | results}
    whole = json.dumps(content, indent=1, allow_nan=False) + "\n"
    for name, text in ((RESULTS, whole), (MARKDOWN, markdown(content)), (HTML, page(content))):
        with writing(out / name):  # names of groups and of files may hold half a character
            write_file(out / name, text.encode(errors="backslashreplace"))
    return content
