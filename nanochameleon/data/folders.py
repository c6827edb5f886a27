"""Folders of several files that are whole or not there, and files that are mapped instead of read."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nanochameleon.errors import UserError


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


def read_index(directory: Path, index: str, what: str) -> dict:
    """The JSON object in directory/index. Raises UserError: `directory` is no such thing, or the file is broken."""
    try:
        content = json.loads((Path(directory) / index).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{directory} is not {what}: it has no readable {index}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != what:
        raise UserError(f"{Path(directory) / index} is broken: delete {directory} and prepare the data again")
    return content


def map_file(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A file of exactly this type and shape, memory-mapped for reading. Raises UserError for one of any other size."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        state = "missing" if found < 0 else f"{found:,} bytes long where {expected:,} were written"
        raise UserError(f"{path} is {state}: delete {path.parent} and prepare the data again")
    # a plain array: each slice of a memmap would cost microseconds of bookkeeping
    return np.memmap(path, dtype, "r", shape=shape).view(np.ndarray) if expected else np.empty(shape, dtype)
