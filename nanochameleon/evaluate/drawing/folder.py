"""The folder of one drawing run: files that appear whole or not at all, and a header that says whose they are.

OUT holds what a scorer reads and nothing else, since some scorers read every file that they find. So the header is
next to it, as OUT.draw.json. A run that was killed continues if its header is the same; another run's is refused.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from nanochameleon.errors import UserError, shown
from nanochameleon.files import check_writable, read_json, remove_stale, write_file

UNFINISHED = ".unfinished"  # a folder in OUT while a process draws, which the next one removes


@contextmanager
def open_folder(out: Path, header: dict) -> Iterator[None]:
    """Make the folder with its header, or check that both are those of this run. Raises UserError.

    Unfinished files of processes that were killed are removed at the start, those of this process at the end.
    """
    header, header_path = json.loads(json.dumps(header)), header_of(out)
    try:
        used = out.is_dir() and any(path.name.rpartition("-")[0] != UNFINISHED for path in out.iterdir())
        if used and not header_path.exists():
            raise UserError(f"{out} is not empty, and {header_path} does not say what is in it: give another --out")
        if used:
            check_same(read_json(header_path), header, out)
        check_writable(out)
        if not used:
            write_file(header_path, json.dumps(header, indent=1).encode() + b"\n")
        remove_stale(out, UNFINISHED)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; give another --out") from None
    try:
        yield
    finally:
        remove_stale(out, UNFINISHED)


def header_of(out: Path) -> Path:
    out = out.resolve()
    return out.with_name(f"{out.name}.draw.json")


def check_same(known: dict, header: dict, out: Path) -> None:
    for name in {**header, **known}:
        there, here = known.get(name), header.get(name)
        if there != here:
            differ = f"with {name} {shown(json.dumps(there))}, and this one has {shown(json.dumps(here))}"
            raise UserError(f"{out} holds images of another run, {differ}: give another --out")


def write_whole(out: Path, path: PurePath, data: bytes) -> None:
    """Write OUT/path, whole or not at all, and the folders on the way. A name of 255 bytes leaves no room for more, so
    the unfinished file has another name in another folder."""
    aside = out / f"{UNFINISHED}-{os.getpid()}" / "file"
    save(aside, data)
    with explained(out / path):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside, out / path)


def save(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, and the folders on the way. Raises UserError."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise UserError for an OSError within."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {shown(path, 200)}: {error.strerror}; run the same command again") from None
