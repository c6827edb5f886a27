"""The log of a task: what was asked, what came out, and its score. It can be resumed after a kill.

    items, model -> answers -> lines -> OUT/TASK/items.jsonl

Lines are written a chunk at a time and synced. Chunks begin at fixed items, because a batch changes the last digits of
its answers. A run that resumes cuts off what is not a whole chunk and asks those items again, so the file ends with the
bytes of a run that was never stopped. Seconds differ between runs: OUT/TASK/seconds.jsonl has them, a line per chunk.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.records import get, load
from nanochameleon.evaluate.task import Answer, Item, Line, Task, digest
from nanochameleon.files import fsync, write_file

ITEMS, SECONDS = "items.jsonl", "seconds.jsonl"
KINDS = {  # of a line's fields; what was extracted may be anything
    "id": str, "group": str, "content": dict, "output": dict, "metrics": dict, "truncated": bool, "hashes": dict
}  # fmt: skip
PROBLEM = "problem"  # the key of the output of an item that could not be asked


def make_line(task: Task, item: Item, answer: Answer) -> Line:
    """Score an answer. What is scored went through JSON, as it does when it is scored again from the log."""
    content, output = as_json(item.content, task, item.id), as_json(answer.output, task, item.id)
    extracted, metrics = score(task, item.id, content, output)
    hashes = {"content": digest(content), "prompt": digest([int(token) for token in answer.prompt])}
    return Line(item.id, item.group, content, output, extracted, metrics, bool(answer.truncated), hashes)


def score(task: Task, name: str, content: dict, output: dict) -> tuple[Any, dict[str, float]]:
    """Return what was found in an output, and its metrics: none for an item that could not be asked."""
    if PROBLEM in output:
        return None, {}
    extracted, metrics = task.score(content, output)
    return as_json(extracted, task, name), {key: float(value) for key, value in metrics.items()}


def rescored(task: Task, line: Line) -> Line:
    """Score a line again. Raises UserError for one that lacks what the task scores now."""
    try:
        extracted, metrics = score(task, line.id, line.content, line.output)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        why = f"{task.name}: item {shown(line.id)!r} cannot be scored ({shown(repr(error))})"
        raise UserError(f"{why}: its line is of another version, or was edited; evaluate into another --out") from None
    return dataclasses.replace(line, extracted=extracted, metrics=metrics)


def as_json(value: Any, task: Task, name: str) -> Any:
    """Return the value as JSON gives it back: a tuple is a list. Raises UserError for a number that is not finite."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except ValueError:
        why = "a number that is not finite: check the weights, or choose another --dtype"
        raise UserError(f"{task.name}: the answer to item {shown(name)!r} holds {why}") from None


def to_bytes(lines: Sequence[Line]) -> bytes:
    # ASCII alone: a text of a model may hold half a character, which UTF-8 cannot
    rows = (json.dumps(vars(line), sort_keys=True, allow_nan=False) for line in lines)
    return "".join(f"{row}\n" for row in rows).encode()


def read_lines(path: Path) -> list[Line]:
    """Read the whole lines of a log; none where there is no log. A last line without its end is left out."""
    try:
        parts = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return [parse(part, f"{path}:{number}") for number, part in enumerate(parts, 1)]


def parse(text: bytes, place: str) -> Line:
    row = load(text, place)
    if not isinstance(row, dict) or set(row) != {"extracted", *KINDS}:
        raise UserError(f"{place} is not a line of an evaluation: delete the folder, or choose another --out")
    for name in row["metrics"] if isinstance(row["metrics"], dict) else ():
        get(row["metrics"], name, (int, float), place)
    return Line(**{name: get(row, name, kind, place) for name, kind in KINDS.items()}, extracted=row["extracted"])


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def read_seconds(path: Path) -> list[tuple[int, float]]:
    """Return (first item, seconds) of each chunk. A kill may have lost some of them."""
    rows = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    chunks = [(load(row, f"{path}:{number}"), f"{path}:{number}") for number, row in enumerate(rows, 1)]
    return [(get(row, "start", int, place), get(row, "seconds", (int, float), place)) for row, place in chunks]


def total_seconds(folder: Path) -> float:
    """Return the seconds that the answers of a log took."""
    return sum(seconds for _, seconds in read_seconds(folder / SECONDS))


class Log:
    """The log of one task, open for its next chunks. `lines` are the items that are done."""

    def __init__(self, folder: Path, items: Sequence[Item], chunk: int):
        """Read what is there, and cut off what is not a whole chunk. Raises UserError if it has other items."""
        self.items, self.seconds = folder / ITEMS, folder / SECONDS
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lines = read_lines(self.items)
        check_items(self.items, lines, items)
        whole = len(lines) == len(items)  # then the last chunk may be shorter
        self.lines = lines if whole else lines[: len(lines) // chunk * chunk]
        cut(self.items, len(self.lines))
        cut(self.seconds, sum(start < len(self.lines) for start, _ in read_seconds(self.seconds)))

    def append(self, lines: Sequence[Line], seconds: float) -> None:
        """Put a chunk on the disk."""
        row = {"start": len(self.lines), "items": len(lines), "seconds": round(seconds, 3)}
        append(self.items, to_bytes(lines))
        append(self.seconds, (json.dumps(row) + "\n").encode())
        self.lines += lines

    def replace(self, start: int, lines: Sequence[Line]) -> None:
        """Put a chunk in the place of the one that starts there. `save` puts it on the disk."""
        self.lines[start : start + len(lines)] = lines

    def save(self) -> None:
        """Write the whole file again."""
        with writing(self.items):
            write_file(self.items, to_bytes(self.lines))


def check_items(path: Path, lines: Sequence[Line], items: Sequence[Item]) -> None:
    """Raise UserError unless the lines are of the first of these items."""
    if len(lines) > len(items):
        which = f"{path} has {len(lines):,} items, of which this command wants {len(items):,}"
        raise UserError(f"{which}: give the --limit that it was made with, or choose another --out")
    for number, (line, item) in enumerate(zip(lines, items, strict=False), 1):
        content = json.loads(json.dumps(item.content))
        if (line.id, line.hashes.get("content")) != (item.id, digest(content)):
            which = f"{path}:{number} has item {shown(line.id)!r}, and the task's file has {shown(item.id)!r} there"
            if line.id == item.id:
                which = f"{path}:{number} has item {shown(line.id)!r} with another content than the task's file has now"
            raise UserError(f"{which}: choose another --out, or bring back the file that it was made from")


def cut(path: Path, n_rows: int) -> None:
    """Shorten a file to its first rows, if it has more."""
    if path.exists():
        rows = path.read_bytes().split(b"\n")
        os.truncate(path, sum(len(row) + 1 for row in rows[: min(n_rows, len(rows) - 1)]))


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file, and wait until that is on the disk. Raises UserError where the disk is full."""
    new = not path.exists()
    with writing(path):
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if new:
            fsync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise UserError for an OSError within, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        why = f"cannot write to {path} ({error.strerror})"
        raise UserError(f"{why}: free some space, and the same command resumes") from None
