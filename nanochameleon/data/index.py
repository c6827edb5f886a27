"""Folders of several files that are whole or not there, each with an index and checksums.

The index is the file that is written last, a JSON object. It says what the folder holds. It has a checksum of each file
that is read as a whole, and one of itself; both are checked when the folder is opened. A large file has a checksum for
each of its items instead, which is checked when the item is read, so that a terabyte of tokens is not read twice.
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

CHECKED = ", with checksums"  # the end of every format's name in an index


@contextmanager
def replacing_folder(directory: Path, index: str) -> Iterator[Path]:
    """Yield a new directory to write in. It replaces `directory` when the block ends; if the block fails, it goes.

    Raises UserError if `directory` holds anything but an earlier folder of this kind (known by its file `index`).
    """
    directory = Path(directory)
    empty = directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not (directory / index).is_file() and not empty:
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
    """CRC-32 of a file's content: 3 GB a second where the file is in memory."""
    return zlib.crc32(np.memmap(path, np.uint8, "r")) if path.stat().st_size else 0


def write_index(directory: Path, index: str, what: str, content: dict, files: Iterable[str] = ()) -> None:
    """Write directory/index: `content`, the checksums of `files`, which are complete, and the index's own checksum."""
    content = {"format": what + CHECKED} | content | {"files": {name: checksum(directory / name) for name in files}}
    write_file(directory / index, json.dumps(content | {"checksum": _own_checksum(content)}).encode())


def _own_checksum(content: dict) -> int:
    """The checksum of an index, without its field "checksum"."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def read_index(directory: Path, index: str, what: str, files: bool = True) -> dict:
    """Read the JSON object in directory/index, and check the files that it has checksums of unless `files` is False.

    Raises UserError if `directory` is not `what`, or if the index or one of those files is damaged.
    """
    path = Path(directory) / index
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        whole = content["format"] == what + CHECKED and content["checksum"] == _own_checksum(content)
        content["files"] = dict(content["files"])
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
    """Raise UserError if the file's checksum is not the expected one."""
    if not path.is_file():
        raise damaged(path, "is missing")
    if checksum(path) != expected:
        raise damaged(path, "has changed since it was written")


def map_file(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map a file of exactly this type and shape for reading. Raises UserError for one of any other size."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        raise damaged(path, "is missing" if found < 0 else f"has {found:,} bytes where {expected:,} were written")
    # a plain array: each slice of a memmap would cost microseconds of bookkeeping
    return np.memmap(path, dtype, "r", shape=shape).view(np.ndarray) if expected else np.empty(shape, dtype)
