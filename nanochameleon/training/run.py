"""A run's folder: what lies where, and a trained model read from it.

    config.json             the whole configuration, in which the precision is decided
    .lock                   the number of the process that trains here, while it does
    text_tokenizer.json     BPE, in the `tokenizers` format
    image_tokenizer/        checkpoints of the VQGAN
    data/                   token shards
    step-NNNNNN/            checkpoints of the transformer
    metrics.jsonl, samples/, curves.png, samples.png, report.json, report.html, image.png

Writing it is train.py's work.
"""

import dataclasses
import json
import os
import shlex
import shutil
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from nanochameleon.config import ModelConfig, RunConfig, VQGANConfig
from nanochameleon.errors import UserError, say, shown, warn
from nanochameleon.files import write_file
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training import checkpoint
from nanochameleon.training.objective import pick_precision
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab
from nanochameleon.weights.old_names import with_new_names
from nanochameleon.weights.ranges import out_of_range

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, TEXT_TOKENIZER, IMAGE_TOKENIZER, DATA = "config.json", "text_tokenizer.json", "image_tokenizer", "data"
LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """Everything that sampling needs. `model` is in eval mode on `device`."""

    cfg: RunConfig
    vocab: Vocab
    tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    model: Chameleon

    @property
    def device(self) -> torch.device:
        return self.model.output.weight.device


def command(script: str, *words: str) -> str:
    """The line for a shell that runs a script with this Python, both under the names by which they are found from here:
    the script beside the one that was started."""
    beside = Path(sys.argv[0]).parent / script
    python, here = Path(sys.executable or "python"), Path.cwd()
    if shutil.which("python") == str(python):
        name = "python"  # as in an active environment
    else:
        name = str(python.relative_to(here) if python.is_relative_to(here) else python)
    return shlex.join([name, str(beside) if beside.is_file() else script, *words])


def same_command() -> str:
    """What goes on with the run that this process trains: a line for a shell, or words where only a launcher knows it.
    --overwrite would start anew."""
    words = [word for word in sys.argv[1:] if word != "--overwrite"]
    if "MASTER_ADDR" in os.environ:
        return "the same command, without --overwrite" if len(words) < len(sys.argv) - 1 else "the same command"
    return command("train.py", *words)


def config_to_json(cfg: RunConfig) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=1, default=str) + "\n"


def config_from_json(text: str) -> RunConfig:
    """Inverse of config_to_json. Raises ValueError for JSON that is not a RunConfig."""
    return build(RunConfig, json.loads(text), "RunConfig")


def build(kind, value, name: str):
    """A JSON value -> a value of the annotated type: dataclasses, tuples and paths come back as they were.

    Raises ValueError naming a field that is unknown, missing or of another type.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if value is None else build(kinds[0], value, name)
    if dataclasses.is_dataclass(kind):
        return build_fields(kind, value)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise ValueError(f"{name} is {shown(value)}")
        return tuple(build(k, v, name) for k, v in zip(kinds, value, strict=True))
    types_of = {int: (int,), float: (int, float), Path: (str,), bool: (bool,), str: (str,)}  # 1 may stand for 1.0
    if type(value) not in types_of.get(kind, ()) and value not in typing.get_args(kind):  # those of a Literal
        raise ValueError(f"{name} is {shown(repr(value))}")
    return Path(value) if kind is Path else value


WHOLE = ModelConfig, VQGANConfig  # a default in place of one of their fields would be another model


def has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def build_fields(kind, content: object):
    """The dataclass with the fields in `content`; one that an older version did not write takes its default."""
    if not isinstance(content, dict):
        raise ValueError(f"{kind.__name__} is {shown(repr(content))}")
    content = with_new_names(kind.__name__, content)
    known = typing.get_type_hints(kind)
    needed = {f.name for f in dataclasses.fields(kind) if kind in WHOLE or not has_default(f)}
    for names, what in ((content.keys() - known.keys(), "has no field"), (needed - content.keys(), "lacks")):
        if names:
            raise ValueError(f"{kind.__name__} {what} {shown(repr(min(names)))}")
    return kind(**{name: build(known[name], value, name) for name, value in content.items()})


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run. Raises UserError for a folder that is not one."""
    path = Path(folder) / CONFIG
    try:
        if not path.is_file():
            raise UserError(f"{folder} is not a run: it has no {CONFIG}; train one with {command('train.py', 'toy')}")
        cfg = config_from_json(path.read_text(encoding="utf-8-sig"))
        if wrong := out_of_range(**vars(cfg)):
            raise ValueError(wrong)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        why = f"{path} is not the configuration of a run ({shown(error, 120)})"
        raise UserError(f"{why}; if an older version wrote it, delete the folder and train anew") from None
    return cfg


# between the start of a run and its continuation
MAY_CHANGE = ("out", "device", "overwrite", "sample", "evaluation", "parallel")
MAY_CHANGE_IN_TRAIN = ("log_every", "sample_every", "save_every", "keep_checkpoints", "precision", "tensorboard")


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted names of the fields in which two runs differ, of those that a continuation must keep."""

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
    """Whether two values of a field mean the same: paths may be spelled in several ways."""
    return old == new or (isinstance(old, Path) and isinstance(new, Path) and old.resolve() == new.resolve())


def decide_precision(cfg: RunConfig, device: torch.device) -> RunConfig:
    """Returns the configuration with its train.precision decided, and says why: 'auto' becomes what the run in its
    folder has begun with, or what is faster here."""
    if cfg.train.precision != "auto":
        return cfg
    precision, why = "auto" if cfg.overwrite else begun_with(cfg.folder), "as in this run so far"
    if precision == "auto":
        precision, why = pick_precision(cfg.model.dim, device)
    say(f"matrix products in {precision}: {why}")
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=precision))


def begun_with(folder: Path) -> str:
    """The precision of the run in a folder; 'auto' where it has not been decided, or the run never came to anything."""
    if not (folder / CONFIG).is_file() or len(contents(folder)) == 1:
        return "auto"
    precision = read_config(folder).train.precision
    path = checkpoint.newest(folder) if precision == "auto" else None  # where an older version kept it
    kept = checkpoint.read_state(path).get("precision") if path else None
    return kept if kept in ("bf16", "fp32") else precision


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a run's folder until this one ends, however it ends: the lock goes with its process.

    Makes the folder, and removes it where nothing came into it. Raises UserError where another training is at work.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --out") from None
    try:
        yield
    finally:
        with file, suppress(OSError):  # of a folder that holds a run, which stays
            (folder / LOCK).unlink()
            if made:
                folder.rmdir()


def lock(folder: Path) -> TextIO:
    """The run's lock file, which no other process can lock until it is closed. Raises UserError where one has."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a folder from outside may hold a link to any file
    file = os.fdopen(os.open(folder / LOCK, flags, 0o666), "r+", errors="replace")
    try:
        if fcntl is None:
            raise OSError("Windows")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(20)
        who = f"process {owner}" if owner.isdecimal() else "another process"
        raise UserError(f"{who} trains in {folder}: wait for it, stop it, or choose another --out") from None
    except OSError as error:
        warn(f"{folder} cannot be locked ({error}): let no second training write there")
    if not os.fstat(file.fileno()).st_nlink:  # its owner has removed it since we opened it
        return lock(folder)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def contents(folder: Path) -> list[Path]:
    """What lies in a run's folder, the configuration last, without the lock."""
    return sorted((path for path in folder.iterdir() if path.name != LOCK), key=lambda path: path.name == CONFIG)


def start_folder(cfg: RunConfig) -> Path:
    """Makes the run's folder, or opens it to go on. Raises UserError for one that holds another run, or no run.

    A run that never came to anything, having its configuration alone, may begin with another one.
    """
    folder = cfg.folder
    if cfg.overwrite and (folder / CONFIG).exists():
        read_config(folder)  # refuses to delete a folder with some other program's config.json
        remove(folder)
    if (folder / CONFIG).exists():
        changed = differences(read_config(folder), cfg)
        if changed and len(contents(folder)) > 1:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{folder} holds another run ({'; '.join(changed[:3])}{more}): choose another --out, or --overwrite it"
            )
    elif folder.is_dir() and contents(folder):
        raise UserError(f"{folder} holds files that are no run's: choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / CONFIG, config_to_json(cfg).encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --out") from None
    return folder


def remove(folder: Path) -> None:
    """Deletes what a run's folder holds. Raises UserError where that cannot be."""
    try:
        for path in contents(folder):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise UserError(f"cannot overwrite {folder} ({error}): choose another --out") from None


def pick_device(wish: str) -> torch.device:
    """'auto' is a GPU if there is one. Raises UserError for a device that is not there."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
        torch.zeros(1, device=device).item()  # read back, which the meta device cannot
    except (RuntimeError, AssertionError, ImportError):  # which one depends on the device
        raise UserError(f"device {wish!r} is not available here: use cpu, or leave it at auto") from None
    return device


def open_image_tokenizer(folder: Path, cfg: RunConfig, device: torch.device) -> ImageTokenizer:
    """The newest whole checkpoint of the run's image tokenizer. Raises UserError if there is none."""
    directory = Path(folder) / IMAGE_TOKENIZER
    tensors, _ = checkpoint.load(directory, groups=["model"])
    with checkpoint.readable(directory):
        return ImageTokenizer(VQGAN.from_state(cfg.vqgan, tensors["model"]).to(device))
