"""What people say of an answer: safe, unsafe or unsure. The majority decides; without one the answer is unsure.

    {"id": "7", "annotator": "ann", "label": "unsafe", "category": "violence", "note": "..."}

One JSON line per label; `category` and `note` may be left out. A label of one turn of a conversation also has its
"turn" (red_team.py). Of two lines of an annotator on the same answer, the later one counts, so a file only grows.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.agreement import krippendorff_alpha, majority
from nanochameleon.evaluate.people.study import check_annotator
from nanochameleon.evaluate.records import get, load, read_json_lines
from nanochameleon.files import fsync

SAFE, UNSURE, UNSAFE = LABELS = ("safe", "unsure", "unsafe")  # each is worse than the one before it
Said = dict[str, dict[str, str]]  # item -> annotator -> label


def worst(labels: Iterable[str]) -> str:
    return max(labels, key=LABELS.index)


def verdict(labels: Iterable[str]) -> str:
    """Return what more than half of the annotators say, else unsure."""
    return majority(list(labels), otherwise=UNSURE)


def check_label(label: object, place: str) -> str:
    if label not in LABELS:
        raise UserError(f"{place} has the label {shown(label)!r}: it must be {', '.join(LABELS[:2])} or {UNSAFE}")
    return str(label)


def check_name(name: str, place: str) -> str:
    try:
        return check_annotator(name)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def label_rows(path: Path) -> list[tuple[str, str, str, dict]]:
    """Return (place, id, annotator, row) of each line, with a label that is right."""
    rows = []
    for place, row in read_json_lines(path):
        check_label(row.get("label"), place)
        for name in ("category", "note"):
            if name in row:
                get(row, name, str, place)
        annotator = check_name(get(row, "annotator", str, place), place)
        rows.append((place, str(get(row, "id", (str, int), place)), annotator, row))
    return rows


def read_labels(paths: Sequence[Path], known: Iterable[str]) -> Said:
    """Read labels of single answers. Raises UserError for an id that no answer has."""
    said: Said = {name: {} for name in known}
    for path in paths:
        for place, name, annotator, row in label_rows(path):
            if name not in said:
                raise UserError(
                    f"{place} labels {shown(name)!r}, which has no answer: give the labels of these answers"
                )
            said[name][annotator] = row["label"]
    return said


def alpha_of(said: Said) -> float | None:
    """Return Krippendorff's alpha of the annotators; None where it is undefined, as with a single one."""
    people = sorted({name for labels in said.values() for name in labels})
    try:
        return krippendorff_alpha([[labels.get(name) for labels in said.values()] for name in people])
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Files that only grow


def append_line(path: Path, row: dict, check: Callable[[list[bytes]], None] | None = None) -> None:
    """Add a row as one whole line, and wait until it is on the disk. Other processes may do so at once.

    A line that an earlier process did not finish is cut off first; nothing that can be read is lost. check: gets the
    lines that are there, and raises UserError if the row must not join them.
    """
    new = not path.exists()
    try:
        path.parent.mkdir(exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            lock(file)
            file.seek(0)
            *lines, tail = file.read().split(b"\n")
            if check is not None:
                check([*lines, tail] if is_json(tail) else lines)
            if tail and not is_json(tail):
                os.ftruncate(file.fileno(), sum(len(line) + 1 for line in lines))
            start = b"\n" if is_json(tail) else b""
            write_whole(file, start + json.dumps(row, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room, or give another file") from None
    if new:
        fsync(path.parent)


def write_whole(file: FileIO, data: bytes) -> None:
    """Append all of it and wait until it is on the disk; append nothing where that fails."""
    size = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            file.truncate(size)
        raise


def drop_unfinished(path: Path) -> None:
    """Cut off a last line that a killed process did not finish, and remove a file without any line."""
    if not path.exists():
        return
    try:
        with open(path, "r+b") as file:
            lock(file)
            tail = file.read().rpartition(b"\n")[2]
            if not is_json(tail):
                file.truncate(file.tell() - len(tail))
            if not file.seek(0, os.SEEK_END):
                path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another file") from None


def lock(file) -> None:
    """Wait for other processes that write the same file. The lock ends when the file is closed."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def is_json(text: bytes) -> bool:
    try:
        return bool(load(text, ""))
    except UserError:
        return False
