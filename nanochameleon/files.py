"""Files that appear at once or not at all: whoever reads one sees the old content or the new one, never half of it.

Folders of several files are checkpoint.py's and data.py's.
"""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Writes beside `path`, then replaces it in one step; several processes may do so at once, on several machines."""
    aside = path.with_name(f".tmp-{os.urandom(6).hex()}-{path.name}")
    try:
        aside.write_bytes(data)
        fsync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
