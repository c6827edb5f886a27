"""The folder that a run is written into: one training at a time, never over another run or other files."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch

from nanochameleon.config import RunConfig
from nanochameleon.errors import UserError, say, warn
from nanochameleon.files import write_file
from nanochameleon.training.precision import pick_precision
from nanochameleon.training.run import CONFIG, command, config_to_json, read_config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"


@contextmanager
def claim(folder: Path, doing: str = "trains") -> Iterator[None]:
    """Keep other processes out of a folder until this one ends; the lock ends with its process, even if killed.

    Makes the folder, and removes it if nothing was written into it. Raises UserError while another process `doing` the
    same runs there.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock(folder, doing)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --out") from None
    try:
        yield
    finally:
        with file, suppress(OSError):  # a folder that holds a run is not empty and stays
            (folder / LOCK).unlink()
            if made:
                folder.rmdir()


def lock(folder: Path, doing: str) -> TextIO:
    """Lock the folder's lock file until it is closed. Raises UserError if another process has locked it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a folder from elsewhere may hold a link to any file
    file = os.fdopen(os.open(folder / LOCK, flags, 0o666), "r+", errors="replace")
    try:
        if fcntl is None:
            raise OSError("Windows")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(20)
        who = f"process {owner}" if owner.isdecimal() else "another process"
        raise UserError(f"{who} {doing} in {folder}: wait for it, stop it, or choose another --out") from None
    except OSError as error:
        warn(f"{folder} cannot be locked ({error}): start no second process there")
    if not os.fstat(file.fileno()).st_nlink:  # its owner removed it after we opened it
        return lock(folder, doing)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def contents(folder: Path) -> list[Path]:
    """The entries of a run's folder without the lock, the configuration last."""
    return sorted((path for path in folder.iterdir() if path.name != LOCK), key=lambda path: path.name == CONFIG)


def start_folder(cfg: RunConfig) -> Path:
    """Make the run's folder, or check that the run in it can be resumed; write config.json.

    Raises UserError for a folder with another run or with other files. A folder that holds nothing but config.json may
    take another configuration.
    """
    folder = cfg.folder
    if cfg.overwrite and (folder / CONFIG).exists():
        read_config(folder)  # so that another program's folder with a config.json is never deleted
        remove(folder)
    if (folder / CONFIG).exists():
        changed = differences(read_config(folder), cfg)
        if changed and len(contents(folder)) > 1:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{folder} holds another run ({'; '.join(changed[:3])}{more}): choose another --out, or --overwrite it"
            )
    elif folder.is_dir() and contents(folder):
        raise UserError(f"{folder} holds files but no run: choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / CONFIG, config_to_json(cfg).encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --out") from None
    return folder


def remove(folder: Path) -> None:
    """Delete what a run's folder holds. Raises UserError if that fails."""
    try:
        for path in contents(folder):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise UserError(f"cannot overwrite {folder} ({error}): choose another --out") from None


def same_command() -> str:
    """The shell line that resumes the run of this process; a phrase where only the launcher knows it."""
    words = [word for word in sys.argv[1:] if word != "--overwrite"]  # which would start again
    if "MASTER_ADDR" in os.environ:
        return "the same command, without --overwrite" if len(words) < len(sys.argv) - 1 else "the same command"
    return command("train.py", *words)


# ---------------------------------------------------------------------------------------------------------------------
# The same run or another one

MAY_CHANGE = ("out", "device", "overwrite", "sample", "evaluation", "parallel")
MAY_CHANGE_IN_TRAIN = (
    "log_every", "sample_every", "sample_minutes", "save_every", "keep_checkpoints", "precision", "fused_output",
    "tensorboard",
)  # fmt: skip


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Describe the fields in which two runs differ, without those that may change when a run is resumed."""

    def flat(value, name: str) -> dict[str, object]:
        if not dataclasses.is_dataclass(value):
            return {name: value}
        fields = (flat(getattr(value, f.name), f"{name}.{f.name}".lstrip(".")) for f in dataclasses.fields(value))
        return {key: v for part in fields for key, v in part.items()}

    free = {*MAY_CHANGE, *(f"train.{name}" for name in MAY_CHANGE_IN_TRAIN)}
    a, b = flat(old, ""), flat(new, "")
    names = [name for name in b if not same(a.get(name), b[name]) and not {name, name.split(".")[0]} & free]
    return [f"{name} was {a.get(name)} and is {b[name]}" for name in names]


def same(old, new) -> bool:
    """Whether two values of a field are equal; paths may be spelled in several ways."""
    return old == new or (isinstance(old, Path) and isinstance(new, Path) and old.resolve() == new.resolve())


def decide_precision(cfg: RunConfig, device: torch.device) -> RunConfig:
    """Replace train.precision 'auto' by that of the run to be resumed, or by what is faster here, and print why."""
    if cfg.train.precision != "auto":
        return cfg
    precision, why = "auto" if cfg.overwrite else precision_so_far(cfg.folder), "as in this run so far"
    if precision == "auto":
        precision, why = pick_precision(cfg.model.dim, device)
    say(f"matmuls in {precision}: {why}")
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=precision))


def precision_so_far(folder: Path) -> str:
    """The precision of the run in a folder; 'auto' if the run has made nothing yet."""
    if not (folder / CONFIG).is_file() or len(contents(folder)) == 1:
        return "auto"
    return read_config(folder).train.precision
