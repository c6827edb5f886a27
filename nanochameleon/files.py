"""Files that appear at once or not at all: a reader sees the old content or the new one, never half of it.

Folders of several files: training/checkpoint.py and data/shards.py.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import BinaryIO

from nanochameleon.errors import UserError, shown

MAX_JSON = 2**24  # bytes, 3 times the released tokenizer; JSON takes 20 times its size in memory


def is_safe_name(name: str) -> bool:
    """Whether a name read from a file is safe to use: no path, not long, and printable."""
    return re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII) is not None


def is_finite_number(value: object) -> bool:
    """Whether a JSON value is a number that is finite in single precision."""
    return type(value) in (int, float) and abs(value) < 2.0**128


def fsync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Write a new file next to `path`. It replaces `path` when the block ends, and is removed if the block fails.

    Several processes may do so at once, on several machines.
    """
    # A random name, since several processes may write; next to the file, since a rename across disks is a copy.
    aside = path.with_name(f".tmp-{os.urandom(6).hex()}-{path.name}")
    try:
        with open(aside, "wb") as file:
            yield file
        fsync(aside)  # else a crash soon after the rename could leave an empty file
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write the file, whole or not at all."""
    with atomic_open(path) as file:
        file.write(data)


def read_json(path: Path) -> dict:
    """Read the JSON object in a file, which may start with a byte order mark. Raises UserError, naming the file."""
    try:
        if not path.is_file():
            raise UserError(f"cannot read {path}: {'it is not a file' if path.exists() else 'it is not there'}")
        if (size := path.stat().st_size) > MAX_JSON:
            raise UserError(f"{path} has {size:,} bytes: at most {MAX_JSON:,} are read")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # RecursionError: lists nested by the thousand
        raise UserError(f"{path} is damaged: {shown(error, 120)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object")
    return content


def remove_stale(folder: Path, start: str) -> None:
    """Remove the folders `start`-PID of this process and of processes that have ended; those of running ones stay."""
    for path in folder.glob(".*"):
        name, _, pid = path.name.rpartition("-")
        if name == start and pid.isdigit() and (int(pid) == os.getpid() or not process_exists(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def process_exists(pid: int) -> bool:
    """Whether a process has this number. On Windows the check would kill it, so there the answer is yes."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_new(folder: Path, stem: str, ending: str, data: bytes) -> Path:
    """Write folder/STEM-N.ENDING with the first free N from 1 on, and return its path.

    Never overwrites a file, however many processes do so at once.
    """
    for number in count(1):
        path = folder / f"{stem}-{number}{ending}"
        try:
            path.touch(exist_ok=False)  # reserves the name: only one process succeeds
        except FileExistsError:
            continue
        try:
            write_file(path, data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


def check_writable(folder: Path) -> None:
    """Make the folder if needed. Raises OSError if no file can be made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@cache
def commit() -> str:
    """Return the commit of the source tree, "unknown" outside of one."""
    return git("rev-parse", "--short", "HEAD") or "unknown"


@cache
def has_changes() -> bool:
    """Whether files of the source tree differ from its commit. False outside of one, where the commit is unknown."""
    return bool(git("status", "--porcelain", "--untracked-files=no"))


def git(*words: str) -> str:
    """Return what git prints about the source tree, "" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
