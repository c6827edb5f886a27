"""Folders of several files that are whole or not there, and files that are mapped instead of read.

The last file that is written is the index, a JSON object. It says what the folder holds, and it has a checksum of each
file that is read as a whole, and of itself, checked when the folder is opened. A large file has a checksum for
each of its items instead, which is checked whenever the item is read, so that a terabyte of tokens is not read twice.
Folders of older versions have no checksums and open without.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nanochameleon.errors import UserError
from nanochameleon.files import is_safe_name, write_file

CHECKED = ", with checksums"  # follows the format's name in an index; an older index lacks it, and all checksums


@contextmanager
def aside(directory: Path, index: str) -> Iterator[Path]:
    """A new directory to write in; it takes the place of `directory` when the block ends, and is gone if it fails.

    Raises UserError if `directory` holds anything but an earlier one of its kind (known by its file `index`).
    """
    directory = Path(directory)
    if (
        directory.exists()
        and not (directory / index).is_file()
        and not (directory.is_dir() and not any(directory.iterdir()))
    ):
        raise UserError(
            f"{directory} is in the way: it was not written by nanochameleon; move it or choose another place"
        )
    new, old = (directory.with_name(f".{directory.name}.{kind}") for kind in ("new", "old"))
    if old.exists() and not directory.exists():  # killed between the two renames below
        os.replace(old, directory)
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if directory.exists():
            os.replace(directory, old)
        os.replace(new, directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def damaged(path: Path, why: str, kind: type[UserError] = UserError) -> UserError:
    """The error for a file of such a folder that is not as it was written."""
    return kind(f"{path} {why}: delete {path.parent}, and the command that wrote it makes it again")


# ---------------------------------------------------------------------------------------------------------------------
# Index and checksums


def checksum(path: Path) -> int:
    """CRC-32 of a file's content: 3 GB a second where it lies in memory."""
    return zlib.crc32(np.memmap(path, np.uint8, "r")) if path.stat().st_size else 0


def write_index(directory: Path, index: str, what: str, content: dict, files: Iterable[str] = ()) -> None:
    """Writes directory/index with `content`, the checksums of `files`, which are complete, and its own checksum."""
    content = {"format": what + CHECKED} | content | {"files": {name: checksum(directory / name) for name in files}}
    write_file(directory / index, json.dumps(content | {"checksum": _own(content)}).encode())


def _own(content: dict) -> int:
    """The checksum of an index, of which itself is left out."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def read_index(directory: Path, index: str, what: str, files: bool = True) -> dict:
    """The JSON object in directory/index; its "files" are those that have checksums, none in an older one. They are
    checked too, unless the index is to be read alone.

    Raises UserError: `directory` is no such thing, or the index or a file that it has a checksum of is damaged.
    """
    path = Path(directory) / index
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        checked = content["format"] == what + CHECKED
        whole = content["checksum"] == _own(content) if checked else content["format"] == what
        content |= {"files": dict(content["files"]) if checked else {}}
    except OSError:
        raise UserError(f"{directory} is not {what}: it has no readable {index}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise damaged(path, "is broken")
    for name, expected in content["files"].items() if files else ():
        check_file(path.with_name(name) if is_safe_name(name) else path, expected)
    return content


def check_file(path: Path, expected: int) -> None:
    """Raises UserError where a file's checksum is another one."""
    if not path.is_file():
        raise damaged(path, "is missing")
    if checksum(path) != expected:
        raise damaged(path, "has changed since it was written")


def map_file(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A file of exactly this type and shape, memory-mapped for reading. Raises UserError for one of any other size."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        raise damaged(path, "is missing" if found < 0 else f"has {found:,} bytes where {expected:,} were written")
    # a plain array: each slice of a memmap would cost microseconds of bookkeeping
    return np.memmap(path, dtype, "r", shape=shape).view(np.ndarray) if expected else np.empty(shape, dtype)
