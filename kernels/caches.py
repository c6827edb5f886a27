"""Where compiled code is kept: the first folder that can be written.

To load such code is to run it, and Numba's cache is pickle. So in the temporary folder, which all users share, only a
folder is taken that belongs to this user and that nobody else can open.
"""

import logging
import os
import stat
import tempfile
from functools import cache
from itertools import chain
from pathlib import Path


def writable(folder: Path) -> bool:
    """Makes the folder, and says whether a file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def home() -> Path | None:
    """This user's cache, or None for a user without a home."""
    try:
        return Path.home() / ".cache" / "nanochameleon"
    except RuntimeError:
        return None


def private() -> Path | None:
    """This user's own folder in the temporary one, or None where it could be anyone's. On Windows homes are private."""
    if not hasattr(os, "getuid"):
        return None
    try:
        folder = Path(tempfile.gettempdir()) / f"nanochameleon-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # of a link itself, which another user may have made
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if ours else None


@cache
def say(line: str) -> None:
    """Writes a line to stderr, once, on rank 0. A stderr that is closed or full costs the line alone."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("nanochameleon").warning(line)


@cache
def cache_folder(variable: str, wished: str, usual: Path | None = None, name: str = "") -> Path | None:
    """A folder of this name in the first one that can be written: the one `wished` by an environment variable, else the
    usual one; this user's cache; a private temporary folder. None where none of them can.

    Says a line where it is not the one that was wished for, or may not last.
    """
    expected = [Path(wished)] if wished else [folder for folder in (usual, home()) if folder]
    places = chain(expected, (find() for find in (home, private)))  # the private one is made where nothing else will do
    chosen = next((folder for folder in places if folder and writable(folder / name)), None)
    if chosen not in expected:
        where = f"are kept in {chosen}" if chosen else "are not kept, so each process compiles them"
        why = f"{' and '.join(map(str, expected))} cannot be written" if expected else "this user has no home"
        say(f"compiled kernels {where}, since {why}: {variable} names another folder")
    return chosen / name if chosen else None
