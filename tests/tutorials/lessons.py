"""The rules of the lessons, each a function that lists what breaks it. test_lesson_rules.py shows that each can."""

import ast
import base64
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "tutorials"
SOURCES = sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))
KINDS = "Write", "Predict", "Break"  # of exercises; the heading of each has its word
SHOWN = re.compile(r"\[(?P<path>[^]]+)\]\([^)]*\)\n```python\n(?P<source>.*)\n```\s*", re.DOTALL)  # by show_source
Notebook = nbformat.NotebookNode


def read_source(path: Path) -> Notebook:
    return jupytext.read(path)


def read_built(path: Path) -> Notebook:
    return nbformat.read(path.with_suffix(".ipynb"), as_version=4)


def stem(path: Path) -> str:
    """01_words -> words."""
    return path.stem.partition("_")[2]


def texts(notebook: Notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def codes(notebook: Notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Notebook) -> Iterator[tuple[int, Notebook]]:
    """(number of the cell, output)."""
    for number, cell in enumerate(notebook.cells, start=1):
        yield from ((number, output) for output in cell.get("outputs", []))


def printed(notebook: Notebook) -> dict[int, str]:
    """Cell -> all that it printed, and the value that it ends in."""
    found: dict[int, str] = {}
    for number, output in outputs(notebook):
        text = output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
        found[number] = found.get(number, "") + text
    return found


def trees(notebook: Notebook) -> list[ast.Module]:
    return [ast.parse(re.sub(r"^\s*[%!].*", "", code, flags=re.MULTILINE)) for code in codes(notebook)]


def checked(notebook: Notebook) -> list[str]:
    """The names of the exercises that are checked: the first argument of each check()."""
    calls = (node for tree in trees(notebook) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call.args[0].value for call in calls if getattr(call.func, "id", "") == "check"]


def headings(notebook: Notebook) -> list[tuple[int, str]]:
    """(level, title) of each."""
    lines = (line for text in texts(notebook) for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines())
    found = (re.match(r"(#+) (.*)", line) for line in lines)
    return [(len(each[1]), each[2]) for each in found if each]


# ---------------------------------------------------------------------------------------------------------------------
# Rules of the source


def wrong_size(notebook: Notebook) -> list[str]:
    """A lesson is 20 to 30 minutes of reading."""
    wrong, cells, words = [], len(notebook.cells), sum(len(text.split()) for text in texts(notebook))
    if not 25 <= cells <= 40:
        wrong.append(f"{cells} cells, not 25 to 40")
    if not 800 <= words <= 1_200:
        wrong.append(f"{words} words, not 800 to 1,200")
    for number, cell in enumerate(notebook.cells, start=1):
        lines = len(cell.source.splitlines())
        words = sum(len(line.split()) for line in cell.source.splitlines() if not line.startswith("- "))
        if cell.cell_type == "code" and lines > 20:
            wrong.append(f"cell {number} has {lines} lines of code, more than 20")
        if cell.cell_type == "markdown" and words > 80:
            wrong.append(f"cell {number} has {words} words, more than 80")
    return wrong


def wrong_headings(notebook: Notebook) -> list[str]:
    """Screen readers walk by headings: one title, no level skipped."""
    levels = [level for level, _ in headings(notebook)]
    wrong = [f"{levels.count(1)} titles, not 1"] if levels.count(1) != 1 else []
    steps = zip(headings(notebook), headings(notebook)[1:], strict=False)
    return wrong + [f"{title!r} skips a level" for (before, _), (level, title) in steps if level > before + 1]


def wrong_opening(notebook: Notebook) -> list[str]:
    """The first cell has the title, how long it takes, and the list of sections."""
    opening = notebook.cells[0].source
    sections = [title for level, title in headings(notebook) if level == 2]
    missing = [title for title in sections if f"- {title}" not in opening]
    wrong = [] if opening.startswith("# ") else ["the first cell has no title"]
    wrong += [] if "minutes" in opening else ["the first cell does not say how many minutes it takes"]
    return wrong + [f"section {title!r} is not listed in the first cell" for title in missing]


def wrong_exercises(notebook: Notebook) -> list[str]:
    """At least three, and one of each kind."""
    names, titles = checked(notebook), " ".join(title for _, title in headings(notebook))
    wrong = [f"{len(names)} exercises, fewer than 3"] if len(set(names)) < 3 else []
    return wrong + [f"no heading says {kind}" for kind in KINDS if not re.search(rf"\b{kind}\b", titles)]


def wrong_statements(notebook: Notebook) -> list[str]:
    """A lesson states what it showed: at least three assertions."""
    n = sum(isinstance(node, ast.Assert) for tree in trees(notebook) for node in ast.walk(tree))
    return [f"{n} assertions, fewer than 3"] if n < 3 else []


# ---------------------------------------------------------------------------------------------------------------------
# Rules of the notebook that was built


def differs(built: Notebook, source: Notebook) -> list[str]:
    if len(built.cells) != len(source.cells):
        return [f"{len(built.cells)} cells are built, {len(source.cells)} are in the source"]
    pairs = enumerate(zip(built.cells, source.cells, strict=True), start=1)
    return [f"cell {i} differs" for i, (a, b) in pairs if (a.cell_type, a.source) != (b.cell_type, b.source)]


def wrong_order(built: Notebook) -> list[str]:
    counts = [cell.execution_count for cell in built.cells if cell.cell_type == "code"]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"cells ran in the order {counts}"]


def wrong_outputs(built: Notebook) -> list[str]:
    wrong = []
    for number, output in outputs(built):
        if output.output_type == "error":
            wrong.append(f"cell {number} raised {output.ename}")
        elif output.output_type == "stream" and output.name == "stderr":
            wrong.append(f"cell {number} has a warning or a progress bar: {output.text[:80]}")
    for number, text in printed(built).items():
        if len(text.splitlines()) >= 20:
            wrong.append(f"cell {number} prints {len(text.splitlines())} lines, not fewer than 20")
        if re.search(r"(?<![\w.:/])/(?:home|root|tmp|usr|work|Users)/", text):
            wrong.append(f"cell {number} prints a path of the machine that built it")
    return wrong


def wrong_figures(built: Notebook) -> list[str]:
    """Each figure has a description, and a size that a clone can bear."""
    wrong = []
    for number, output in outputs(built):
        if data := output.get("data", {}).get("image/png"):
            if not output.metadata.get("image/png", {}).get("alt"):
                wrong.append(f"the figure of cell {number} has no alt text: use show(fig, alt)")
            if (size := len(base64.b64decode(data))) > 60_000:
                wrong.append(f"the figure of cell {number} has {size:,} bytes, more than 60,000")
    return wrong


def stale_sources(built: Notebook) -> list[str]:
    """What show_source showed is still what the library has, but for the indentation of methods."""
    wrong = []
    for number, output in outputs(built):
        if shown := SHOWN.fullmatch(output.get("data", {}).get("text/markdown", "")):
            file = (ROOT / shown["path"]).read_text(encoding="utf-8")
            if stripped(shown["source"]) not in stripped(file):
                wrong.append(f"cell {number} shows another {shown['path']} than the library has: make notebooks")
    return wrong


def stripped(source: str) -> str:
    return "\n".join(line.strip() for line in source.splitlines())


def wrong_verdicts(built: Notebook) -> list[str]:
    """Nobody has answered yet."""
    said = "\n".join(printed(built).values())
    return [f"{name} is not said to be not done yet" for name in checked(built) if f"{name}: not done yet" not in said]


SOURCE_RULES = wrong_size, wrong_headings, wrong_opening, wrong_exercises, wrong_statements
BUILT_RULES = wrong_order, wrong_outputs, wrong_figures, stale_sources, wrong_verdicts


# ---------------------------------------------------------------------------------------------------------------------
# The table of docs/results/tutorials.md: .venv/bin/python tests/tutorials/lessons.py


def table() -> str:
    """One line a lesson, and their sum: cells, words, assertions, exercises, planted wrong answers."""
    rows = []
    for path in SOURCES:
        notebook, wrong = read_source(path), importlib.import_module(f"wrong.{stem(path)}").WRONG
        words = sum(len(text.split()) for text in texts(notebook))
        assertions = sum(isinstance(node, ast.Assert) for tree in trees(notebook) for node in ast.walk(tree))
        planted = sum(map(len, wrong.values()))
        rows.append((path.stem, len(notebook.cells), words, assertions, len(checked(notebook)), planted))
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    head = "| lesson | cells | words | assertions | exercises | wrong answers planted |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


if __name__ == "__main__":
    sys.path.insert(0, str(TUTORIALS))  # wrong answers may use what the lessons share
    print(table())
