"""Files that appear at once or not at all: whoever reads one sees the old content or the new one, never half of it.

Folders of several files are checkpoint.py's and data/shards.py's.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nanochameleon.errors import UserError, shown

MAX_JSON = 2**24  # bytes; the released tokenizer has a third of them, and JSON takes 20 times its size in memory


def fsync(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, which takes its place in one step when the block ends, and is gone if it fails. Several
    processes may do so at once, on several machines."""
    aside = path.with_name(f".tmp-{os.urandom(6).hex()}-{path.name}")
    try:
        with open(aside, "wb") as file:
            yield file
        fsync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def read_json(path: Path) -> dict:
    """The JSON object in a file; a byte order mark may stand first. Raises UserError, naming the file."""
    try:
        if not path.is_file():
            raise UserError(f"cannot read {path}: {'it is not a file' if path.exists() else 'it is not there'}")
        if (size := path.stat().st_size) > MAX_JSON:
            raise UserError(
                f"{path} has {size:,} bytes: no file of a model's sizes and names has more than {MAX_JSON:,}"
            )
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {shown(error, 120)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is no JSON object")
    return content
