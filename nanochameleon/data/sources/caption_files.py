"""Caption files: rows of a table or of JSON lines, each an image's file name and a caption.

    captions.jsonl or metadata.jsonl   {"file_name": "a/cat.png", "text": "a cat"}, or "image" and "caption"
    metadata.csv                       a header with file_name and text (or image and caption), then a row a caption

File names are relative to the caption file, or absolute and inside its folder. An image may have several captions.
"""

import csv
import io
import os
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from nanochameleon.data.reading import (
    MAX_LINE,
    TEXT_KEYS,
    Bad,
    ImageFile,
    Item,
    captioned_item,
    first_text,
    is_utf8,
    near,
    open_utf8,
)  # fmt: skip

CAPTION_FILES = "captions.jsonl", "metadata.jsonl", "metadata.csv"  # the first one found in a folder is read
FILE_KEYS = ("file_name", "image")
BROKEN_QUOTES = "broken quotes"

Row = dict | str  # the fields by name; or why the row cannot be read


def caption_files(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Of the files (reading.walk): the caption file of the folder and of each subfolder, in any letter case."""
    found: dict[Path, Path] = {}
    for path in near(folder, files):
        if path.name.lower() in CAPTION_FILES:
            found[path.parent] = min(found.get(path.parent, path), path, key=preference)
    return list(found.values())


def preference(path: Path) -> int:
    return CAPTION_FILES.index(path.name.lower())


def read_row(row: Row, where: str, folder: Path) -> Item:
    """The captioned image of a row, or why the row cannot be used; the image itself is not read."""
    if isinstance(row, str):
        return Bad(where, row)
    name, caption = first_text(row, FILE_KEYS), first_text(row, TEXT_KEYS)
    if not is_utf8(name + caption):
        return Bad(where, "not in UTF-8", ascii(name[:200]))
    if not name or not caption:
        return Bad(where, "without a caption" if name else "without a file name", fields_of(row))
    found = find_image(name, folder)
    if isinstance(found, str):
        return Bad(where, found, ascii(name[:200]))
    return captioned_item(where, caption, ImageFile(f"{where} {found.name!a}", found))


def fields_of(row: dict) -> str:
    return f"its fields are {', '.join(map(ascii, row))}"[:200]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


class Lines:
    """The lines of a table for csv.reader. The lines that a broken row swallowed can be given back."""

    def __init__(self, file: TextIO):
        self.file, self.number = file, 0
        self.taken: list[str] = []  # lines of the row that is being read
        self.again: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else self.file.readline(MAX_LINE)
        if not line:
            raise StopIteration
        self.taken.append(line)
        return line

    def next_row(self) -> int:
        """The number of the line at which the next row begins."""
        self.number += len(self.taken)
        self.taken.clear()
        return self.number + 1

    def give_back(self) -> None:
        """Return all lines of the row but its first."""
        self.again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def csv_rows(file: Path) -> Iterator[tuple[int, Row]]:
    """Yield (number of its first line, row). A row with a broken quote does not swallow the rows after it."""
    with open_utf8(file) as data:
        lines, header = Lines(io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline="")), None
        rows = csv.reader(lines, strict=True)
        while True:
            number = lines.next_row()
            try:
                fields = next(rows, None)
            except csv.Error as error:
                # a field over the limit: in one line the line is too long, in several a quote was left open
                too_long = "limit" in str(error) and len(lines.taken) == 1
                row, header = "broken lines" if too_long else BROKEN_QUOTES, header or []
            else:
                if fields is None:
                    return
                if not fields or header is None:  # an empty line, or the header
                    header = header or fields or None
                    continue
                row = table_row(fields, header, lines.taken, file.parent)
            if row == BROKEN_QUOTES:
                lines.give_back()
            yield number, row


def table_row(fields: list[str], header: list[str], lines: list[str], folder: Path) -> Row:
    """A row by the header's names. It has a broken quote if one of its later lines is a row of its own."""
    for line in lines[1:]:
        other = next(csv.reader([line]), [])
        name = first_text(dict(zip(header, other, strict=False)), FILE_KEYS)
        if len(other) >= len(header) and name and isinstance(find_image(name, folder), Path):
            return BROKEN_QUOTES
    more = any(fields[len(header) :])  # empty fields, from a comma at the end of every line, do no harm
    return "more fields than the header" if more else dict(zip(header, fields, strict=False))


# ---------------------------------------------------------------------------------------------------------------------
# Image files by name


def find_image(name: str, folder: Path) -> Path | str:
    """The file of that name inside the folder, or why there is none."""
    # Inside by spelling alone: links in the folder are the owner's, and may lead anywhere.
    base = os.path.join(os.path.abspath(folder), "")
    path = os.path.normpath(os.path.join(base, name))
    if not path.startswith(base):
        return "outside the folder"
    inside = Path(path[len(base) :])
    if os.path.isfile(folder / inside):
        return folder / inside
    return (None if name.isascii() else respelled(folder, inside.parts)) or "missing images"


def respelled(folder: Path, parts: tuple[str, ...]) -> Path | None:
    """The only file whose name differs just in how Unicode composes its letters: a Mac writes e and an accent."""
    for part in parts:
        try:
            alike = spellings(folder, os.stat(folder).st_mtime_ns).get(unicodedata.normalize("NFC", part), [])
        except OSError:
            return None
        if part not in alike and len(alike) != 1:
            return None
        folder /= part if part in alike else alike[0]
    return folder if os.path.isfile(folder) else None


@lru_cache(maxsize=64)
def spellings(folder: Path, changed: int) -> dict[str, list[str]]:
    """Names in a folder by their composed form. `changed`, the folder's time, makes a cached answer stale."""
    found: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        found.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return found
