"""Items read from outside: captioned images that may be bad, rules for captions, and the count of what was skipped.

What cannot be used is skipped, counted and listed with its place and reason, and never stops the rest. Every file, row
and member ends as an item or as a `Bad`. Two things are left out without a line: hidden files (their name begins with a
dot), and images that no row names.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np

from nanochameleon.errors import UserError
from nanochameleon.images.tokenizer import load_square

T = TypeVar("T")
TEXT_KEYS = ("text", "caption")  # of a JSON object or a table that holds a text
MAX_CAPTION = 1_000  # characters
MAX_LINE = 2**25  # bytes; a longer line is skipped
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
SKIPPED = "skipped.jsonl"  # beside what was prepared
NOT_READ = "files that are not read"


@dataclass(frozen=True)
class Bad:
    """Something that is not used: where it is, why (a class of reasons, to be counted), and a detail for its owner."""

    where: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, eq=False)
class File:
    """An image that is not decoded: a file, or bytes that were read from a place called `name`."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    fit: Literal["crop", "pad"] = "crop"  # pad: of a prompt

    def pixels(self, resolution: int) -> np.ndarray:
        """uint8 (R, R, 3). Raises UserError, as load_image does."""
        return load_square(self.path or self.name, resolution, self.fit, self.data)


@dataclass(frozen=True, eq=False)
class Captioned:
    """An image with a caption of at most MAX_CAPTION characters; `cut`: it was longer."""

    where: str
    caption: str
    image: File
    cut: bool = False


@dataclass
class Report:
    """What reading came to."""

    images: int = 0
    captions: int = 0
    cut: int = 0  # captions shortened to the limit
    skipped: list[Bad] = field(default_factory=list)

    def skip(self, where: str, reason: str, detail: str = "") -> None:
        self.skipped.append(Bad(where, reason, detail))

    def __str__(self) -> str:
        text = f"{self.images:,} images with {self.captions:,} captions"
        if self.cut:
            text += f", {self.cut:,} of them cut"
        return text + (f"; {reasons(Counter(bad.reason for bad in self.skipped))}" if self.skipped else "")


def reasons(counts: Counter[str]) -> str:
    """'3 skipped: 2 missing images, 1 broken lines'."""
    return f"{counts.total():,} skipped: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common())


def first_few(skipped: Iterable[Bad]) -> str:
    """'a.csv:2 (without a caption: its fields are 'file')'; short enough to be a part of a sentence."""
    first = islice(sorted(skipped, key=lambda bad: bad.reason == NOT_READ), 2)
    return "; ".join(f"{bad.where[-60:]} ({bad.reason}{': ' * bool(bad.detail)}{bad.detail[:50]})" for bad in first)


def as_line(bad: Bad) -> bytes:
    """Of skipped.jsonl."""
    return (json.dumps(asdict(bad)) + "\n").encode()


def first_text(row: dict, keys: tuple[str, ...]) -> str:
    """The first value under one of the keys that is a text with something in it, stripped; '' if none is."""
    values = (row.get(key) for key in keys)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")


def is_utf8(text: str) -> bool:
    """False for bytes that were none in the file, and for half a surrogate pair that JSON may spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(caption: str) -> tuple[str, bool]:
    """The caption within MAX_CAPTION, and whether it was longer."""
    return caption[:MAX_CAPTION].rstrip(), len(caption) > MAX_CAPTION


# ---------------------------------------------------------------------------------------------------------------------
# Files of a folder


def walk(folder: Path) -> tuple[list[Path], list[Bad]]:
    """All files of a folder and its subfolders in order, and what else is there that cannot be read.

    Hidden files and images are in neither list. Links are followed, to files and to folders; a folder that a link
    reaches a second time is not read again. Raises UserError where `folder` itself cannot be read.
    """
    files, left, seen, todo = [], [], set(), deque([folder])
    while todo:
        place = todo.popleft()
        name, real = str(place.relative_to(folder)), os.path.realpath(place)
        if real in seen:
            left.append(Bad(name, "links to folders that are read already"))
            continue
        seen.add(real)
        for entry in visible(place, name, left):
            kind, path = kind_of(entry), place / entry.name
            if kind == "folder":
                (todo.append if entry.is_symlink() else todo.appendleft)(path)  # links come last
            elif not is_image(entry.name):
                files += [path] if kind == "file" else []
                left += [Bad(str(path.relative_to(folder)), "neither files nor folders")] if not kind else []
    return sorted(files), sorted(left, key=lambda bad: bad.where)


def visible(place: Path, name: str, left: list[Bad]) -> list[os.DirEntry]:
    """The entries of a folder that are not hidden, by name; of one that may not be read none, and a note in `left`."""
    try:
        with os.scandir(place) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        if name == "." or not isinstance(error, PermissionError):
            raise UserError(f"cannot read the folder {place}: {error.strerror}") from error
        left.append(Bad(name, "folders that may not be read"))
        return []


def kind_of(entry: os.DirEntry) -> str:
    """ "folder", "file", or "" for what is neither, such as a link that leads nowhere."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:
        return ""


def size_of(path: Path) -> int:
    """Bytes of a file, -1 where that may not be known."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def is_image(name: str) -> bool:
    return name.lower().endswith(tuple(f".{ending}" for ending in IMAGE_ENDINGS))


def near(folder: Path, files: Iterable[Path]) -> list[Path]:
    """The files in the folder itself, then those in each of its subfolders."""
    places = (path for path in files if folder in (path.parent, path.parent.parent))
    return sorted(places, key=lambda path: (path.parent, path))


def not_read(folder: Path, files: Iterable[Path], chosen: Iterable[Path]) -> list[Bad]:
    """The files of a folder that are not among the chosen ones."""
    chosen = set(chosen)
    return [Bad(str(path.relative_to(folder)), NOT_READ) for path in files if path not in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# What is in a file


class NotUTF8(Exception):
    """A file whose first bytes are those of another encoding."""


def accounted(found: Iterable[T], path: Path, name: str, whole: bool = True) -> Iterator[T | Bad]:
    """What was found in a file. One that may not be read, is in another encoding or, if it is the whole file, has
    nothing in it is bad itself.

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
        raise UserError(f"{why}; once that is mended, the same command goes on") from error
    else:
        if empty:
            yield Bad(name, "empty files")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file of text in UTF-8, as bytes. Raises NotUTF8 where its first bytes show another encoding."""
    with open(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
        if not encoding.startswith("utf-8"):
            raise NotUTF8(f"they look like {encoding}: save them as utf-8")
        file.seek(0)
        yield file


def text_lines(file: BinaryIO, start: int, end: float, longest: int = MAX_LINE) -> Iterator[tuple[int, bytes | None]]:
    r"""(where it begins, line with its end) of bytes start .. end-1; None for a line of more than `longest` bytes.

    Lines end with \n, \r\n or \r.
    """
    file.seek(start)
    while (place := file.tell()) < end and (block := file.readline(longest)):
        lines = block.splitlines(keepends=True)
        if len(block) == longest and not block.endswith(b"\n"):
            if len(lines) == 1:
                skip_line(file, longest)
                lines = [None]
            else:  # after a \r the last line may go on
                file.seek(-len(lines.pop()), os.SEEK_CUR)
        for line in lines:
            yield place, line
            place += len(line or b"")


def skip_line(file: BinaryIO, longest: int) -> None:
    """Moves to where the next line begins."""
    while rest := file.readline(longest):
        if (ending := rest.find(b"\r")) >= 0:
            file.seek(ending + 1 - len(rest), os.SEEK_CUR)
            return
        if rest.endswith(b"\n"):
            return


def json_row(line: bytes, errors: str = "surrogateescape") -> dict | None:
    """The JSON object of a line, None if it holds none."""
    try:
        row = json.loads(line.decode("utf-8-sig", errors))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def is_blank(line: bytes | None) -> bool:
    """Whether a line holds white space alone, or a byte order mark."""
    return line is not None and not line.strip(b" \t\r\n\xef\xbb\xbf")
