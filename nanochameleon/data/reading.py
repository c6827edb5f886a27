"""Reading data from outside: items that may be bad, files of a folder, lines of a file.

Data that cannot be used is skipped, counted and listed with its place and reason; it never stops the rest. Every file,
row and tar member ends as a `RawItem` or as a `Bad`. Two things are left out without a line in the list: hidden files
(their name begins with a dot), and images that no row names.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from nanochameleon.documents import EndOfTurn, Text
from nanochameleon.errors import UserError
from nanochameleon.images.tokenizer import Fit, load_square

T = TypeVar("T")
TEXT_KEYS = ("text", "caption")  # of a JSON object or a table that holds a text
MAX_CAPTION = 1_000  # characters
MAX_LINE = 2**25  # bytes; a longer line is skipped
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
SKIPPED = "skipped.jsonl"  # next to the prepared data
NOT_READ = "files that are not read"


@dataclass(frozen=True)
class Bad:
    """Something that is not used: where it is, why (a class of reasons, to be counted), and a detail for its owner."""

    where: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, eq=False)
class ImageFile:
    """An image that is not decoded: a file, or bytes that were read from a place called `name`."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    fit: Fit = "crop"  # "pad" for an image in a prompt

    def pixels(self, resolution: int) -> np.ndarray:
        """uint8 (R, R, 3). Raises UserError, as load_image does."""
        return load_square(self.path or self.name, resolution, self.fit, self.data)


@dataclass(frozen=True, eq=False)
class RawItem:
    """A document whose images are not decoded yet."""

    where: str
    doc: list[Text | ImageFile | EndOfTurn]
    captioned: bool = False  # doc is a caption and its image
    cut: bool = False  # part of a text was left out
    mended: bool = False  # bytes that are not UTF-8 became U+FFFD


Item = RawItem | Bad


def captioned_item(where: str, caption: str, image: ImageFile) -> RawItem:
    """A caption, cut to MAX_CAPTION characters, and its image."""
    text = Text(caption[:MAX_CAPTION].rstrip())
    return RawItem(where, [text, image], captioned=True, cut=len(caption) > MAX_CAPTION)


# ---------------------------------------------------------------------------------------------------------------------
# What was skipped


def reasons(counts: Counter[str]) -> str:
    """'3 skipped: 2 missing images, 1 broken lines'."""
    return f"{counts.total():,} skipped: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common())


def first_few(skipped: Iterable[Bad]) -> str:
    """'a.csv:2 (without a caption: its fields are 'file')'; short enough to be a part of a sentence."""
    first = islice(sorted(skipped, key=lambda bad: bad.reason == NOT_READ), 2)
    return "; ".join(f"{bad.where[-60:]} ({bad.reason}{': ' * bool(bad.detail)}{bad.detail[:50]})" for bad in first)


def as_line(bad: Bad) -> bytes:
    """A line of skipped.jsonl."""
    return (json.dumps(asdict(bad)) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Files of a folder


def walk(folder: Path) -> tuple[list[Path], list[Bad]]:
    """All files of a folder and its subfolders in order, and what else is there that cannot be read.

    Hidden files and images are in neither list. Links to files and folders are followed; a folder that a link reaches a
    second time is not read again. Raises UserError where `folder` itself cannot be read.
    """
    files, unread, seen, todo = [], [], set(), deque([folder])
    while todo:
        place = todo.popleft()
        name, real = str(place.relative_to(folder)), os.path.realpath(place)
        if real in seen:
            unread.append(Bad(name, "links to folders that are read already"))
            continue
        seen.add(real)
        for entry in visible(place, name, unread):
            kind, path = kind_of(entry), place / entry.name
            if kind == "folder":
                (todo.append if entry.is_symlink() else todo.appendleft)(path)  # links come last
            elif not is_image(entry.name):
                files += [path] if kind == "file" else []
                unread += [Bad(str(path.relative_to(folder)), "neither files nor folders")] if not kind else []
    return sorted(files), sorted(unread, key=lambda bad: bad.where)


def visible(place: Path, name: str, unread: list[Bad]) -> list[os.DirEntry]:
    """The entries of a folder that are not hidden, by name. A folder without permission gives none and is noted."""
    try:
        with os.scandir(place) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        if name == "." or not isinstance(error, PermissionError):
            raise UserError(f"cannot read the folder {place}: {error.strerror}") from error
        unread.append(Bad(name, "folders that may not be read"))
        return []


def kind_of(entry: os.DirEntry) -> str:
    """ "folder", "file", or "" for anything else, such as a broken link."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:
        return ""


def size_of(path: Path) -> int:
    """Bytes of a file, -1 if that may not be known."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def is_image(name: str) -> bool:
    return name.lower().endswith(tuple(f".{ending}" for ending in IMAGE_ENDINGS))


def near(folder: Path, files: Iterable[Path]) -> list[Path]:
    """The files in the folder itself, then the files in each of its direct subfolders."""
    places = (path for path in files if folder in (path.parent, path.parent.parent))
    return sorted(places, key=lambda path: (path.parent, path))


# ---------------------------------------------------------------------------------------------------------------------
# Content of a file


class NotUTF8(Exception):
    """The first bytes of a file are those of another encoding."""


def accounted(found: Iterable[T], path: Path, name: str, whole: bool = True) -> Iterator[T | Bad]:
    """Yield what was found in a file. The file itself is bad if it may not be read, is in another encoding, or has
    nothing in it (if `found` covers the whole file).

    Raises UserError, which names the file, where the disk fails: a later try may read it.
    """
    empty = whole
    try:
        for item in found:
            empty = False
            yield item
    except PermissionError:
        yield Bad(name, "files that may not be read")
    except NotUTF8 as error:
        yield Bad(name, "files not in UTF-8", str(error))
    except OSError as error:
        why = f"cannot read {path}: {error.strerror or error}"
        raise UserError(f"{why}; once that is fixed, the same command resumes") from error
    else:
        if empty:
            yield Bad(name, "empty files")


@contextmanager
def open_utf8(path: Path) -> Iterator[BinaryIO]:
    """Open a text file as bytes. Raises NotUTF8 if its first bytes show another encoding."""
    with open(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
        if not encoding.startswith("utf-8"):
            raise NotUTF8(f"they look like {encoding}: save them as utf-8")
        file.seek(0)
        yield file


def text_lines(file: BinaryIO, start: int, end: float, longest: int = MAX_LINE) -> Iterator[tuple[int, bytes | None]]:
    r"""Yield (start, line with its end) of the lines that begin in bytes start .. end-1; None for a line of more than
    `longest` bytes. Lines end with \n, \r\n or \r."""
    file.seek(start)
    while (place := file.tell()) < end and (block := file.readline(longest)):
        lines = block.splitlines(keepends=True)
        if len(block) == longest and not block.endswith(b"\n"):
            if len(lines) == 1:
                skip_line(file, longest)
                lines = [None]
            else:  # the last line, after a \r, may be longer than the block
                file.seek(-len(lines.pop()), os.SEEK_CUR)
        for line in lines:
            yield place, line
            place += len(line or b"")


def skip_line(file: BinaryIO, longest: int) -> None:
    """Move to where the next line begins."""
    while rest := file.readline(longest):
        if (ending := rest.find(b"\r")) >= 0:
            file.seek(ending + 1 - len(rest), os.SEEK_CUR)
            return
        if rest.endswith(b"\n"):
            return


def is_blank(line: bytes | None) -> bool:
    """Whether a line holds white space alone, or a byte order mark."""
    return line is not None and not line.strip(b" \t\r\n\xef\xbb\xbf")


def json_row(line: bytes, errors: str = "surrogateescape") -> dict | None:
    """The JSON object of a line, None if it holds none."""
    try:
        row = json.loads(line.decode("utf-8-sig", errors))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def first_text(row: dict, keys: tuple[str, ...]) -> str:
    """The first non-blank text under one of the keys, stripped; '' if there is none."""
    values = (row.get(key) for key in keys)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")


def is_utf8(text: str) -> bool:
    """False for bytes that were not UTF-8 in the file, and for half a surrogate pair, which JSON may spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
