"""A trained run: what its folder holds, its configuration as JSON, the model and tokenizers that sampling needs.

    config.json             the whole configuration, with the precision that was decided
    .lock                   the process id of the training, while it runs
    text_tokenizer.json     BPE, in the `tokenizers` format
    image_tokenizer/        checkpoints of the VQGAN
    data/                   token shards
    step-NNNNNN/            checkpoints of the transformer
    metrics.jsonl, samples/, curves.png, samples.png, report.json, report.html, image.png

run_folder.py makes and locks the folder; train.py fills it.
"""

import dataclasses
import json
import shlex
import shutil
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochameleon.config import ModelConfig, RunConfig, VQGANConfig
from nanochameleon.errors import UserError, shown
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab
from nanochameleon.weights.old_names import with_new_names
from nanochameleon.weights.ranges import out_of_range

CONFIG, TEXT_TOKENIZER, IMAGE_TOKENIZER, DATA = "config.json", "text_tokenizer.json", "image_tokenizer", "data"


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
    """The shell line that runs a script with this Python, such as 'python train.py toy'.

    The script is taken from the folder of the program that was started. Both paths are relative where they can be.
    """
    neighbour = Path(sys.argv[0]).parent / script
    python, here = Path(sys.executable or "python"), Path.cwd()
    if shutil.which("python") == str(python):
        name = "python"  # an active environment
    else:
        name = str(python.relative_to(here) if python.is_relative_to(here) else python)
    return shlex.join([name, str(neighbour) if neighbour.is_file() else script, *words])


def config_to_json(cfg: RunConfig) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=1, default=str) + "\n"


def config_from_json(text: str) -> RunConfig:
    """Inverse of config_to_json. Raises ValueError for JSON that is not a RunConfig."""
    return build(RunConfig, json.loads(text), "RunConfig")


def build(kind, value, name: str):
    """Convert a JSON value to the annotated type: dataclasses, tuples and paths come back as they were.

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
    types_of = {int: (int,), float: (int, float), Path: (str,), bool: (bool,), str: (str,)}  # 1 is fine for 1.0
    if type(value) not in types_of.get(kind, ()) and value not in typing.get_args(kind):  # a Literal's
        raise ValueError(f"{name} is {shown(repr(value))}")
    return Path(value) if kind is Path else value


NO_DEFAULTS = ModelConfig, VQGANConfig  # a default for a missing field would be another model


def has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def build_fields(kind, content: object):
    """Build the dataclass from its fields in `content`; a field that an older version did not write has its default."""
    if not isinstance(content, dict):
        raise ValueError(f"{kind.__name__} is {shown(repr(content))}")
    content = with_new_names(kind.__name__, content)
    known = typing.get_type_hints(kind)
    needed = {f.name for f in dataclasses.fields(kind) if kind in NO_DEFAULTS or not has_default(f)}
    for names, what in ((content.keys() - known.keys(), "has no field"), (needed - content.keys(), "lacks")):
        if names:
            raise ValueError(f"{kind.__name__} {what} {shown(repr(min(names)))}")
    return kind(**{name: build(known[name], value, name) for name, value in content.items()})


def read_config(folder: Path) -> RunConfig:
    """Read the configuration of a run. Raises UserError for a folder that is not a run."""
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
        raise UserError(f"{why}; if an older version wrote it, delete the folder and train again") from None
    return cfg


def pick_device(requested: str) -> torch.device:
    """Resolve 'auto' to a GPU if there is one, and make a GPU with a number the current one of this thread.

    Raises UserError for a device that is not available.
    """
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
        torch.zeros(1, device=device).item()  # the meta device cannot read it back
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError):  # depends on the device
        raise UserError(f"device {requested!r} is not available here: use cpu, or leave it at auto") from None
    return device
