"""Chooses where compiled code is cached: in the first folder that can be written.

Loading such code runs it, and Numba's cache is pickle. All users share the temporary folder, so there only a folder
counts that belongs to this user and that no other user can open.
"""

import logging
import os
import stat
import tempfile
from functools import cache
from itertools import chain
from pathlib import Path


def writable(folder: Path) -> bool:
    """Make the folder, and return whether a file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def home() -> Path | None:
    """This user's cache folder, or None for a user without a home."""
    try:
        return Path.home() / ".cache" / "nanochameleon"
    except RuntimeError:
        return None


def private() -> Path | None:
    """This user's own temporary folder, or None if another user could own it. On Windows homes are private anyway."""
    if not hasattr(os, "getuid"):
        return None
    try:
        folder = Path(tempfile.gettempdir()) / f"nanochameleon-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # lstat: another user may have made it a link
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if ours else None


@cache
def say(line: str) -> None:
    """Log a line once, on rank 0. If stderr is closed or full, only the line is lost."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("nanochameleon").warning(line)


@cache
def cache_folder(variable: str, requested: str, default: Path | None = None, name: str = "") -> Path | None:
    """A folder of this name in the first one that can be written, or None if none can.

    Tried in this order: `requested` (by the environment `variable`), else `default`; this user's cache; a private
    temporary folder. Logs a line if the folder is not the expected one, or may not last.
    """
    expected = [Path(requested)] if requested else [folder for folder in (default, home()) if folder]
    # lazily: the private folder is only made if nothing else works
    places = chain(expected, (find() for find in (home, private)))
    chosen = next((folder for folder in places if folder and writable(folder / name)), None)
    if chosen not in expected:
        where = f"are cached in {chosen}" if chosen else "are not cached, so each process compiles them"
        why = f"{' and '.join(map(str, expected))} cannot be written" if expected else "this user has no home"
        say(f"compiled kernels {where}, because {why}: set {variable} to another folder")
    return chosen / name if chosen else None
