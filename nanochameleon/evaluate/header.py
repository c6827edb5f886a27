"""What an evaluation depends on, besides its items: OUT/header.json.

model, options   must be the same when an evaluation is resumed, or its lines would come from two models
tasks            how many items each of them has
sessions         one entry each time that the command ran: date, commit, versions, machine, kernels, wall time
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nanochameleon.bench.rows import device_name
from nanochameleon.errors import UserError, warn
from nanochameleon.evaluate.log import writing
from nanochameleon.evaluate.task import Options, digest
from nanochameleon.files import commit, has_changes, read_json, write_file
from nanochameleon.generation import fastest
from nanochameleon.kernels.dispatch import OPS, decide
from nanochameleon.training.run import Run
from nanochameleon.weights.tokenizer_json import to_json

HEADER = "header.json"
NAMES = {  # what must be the same, and its name for people
    "weights": "model", "image_tokenizer": "image tokenizer", "text_tokenizer": "text tokenizer",
    "sampling": "set of sampling parameters",
}  # fmt: skip
AFFECTS_ANSWERS = ("commit", "versions", "machine", "kernels")  # of a session: what may show in its answers


def describe_model(run: Run, path: Path) -> dict[str, Any]:
    """Return the path, and hashes of all that answers: the same in every layout that holds the same numbers."""
    return {
        "path": str(path),
        "weights": tensors_hash(run.model),
        "image_tokenizer": tensors_hash(run.image_tokenizer.vqgan),
        "text_tokenizer": digest(to_json(run.tokenizer)),
        "parameters": sum(x.numel() for x in run.model.state_dict().values()),
        "dtype": dtype_of(run),
        "device": run.device.type,
        "sampling": asdict(run.cfg.sample),  # the model's own, for images
    }


def dtype_of(run: Run) -> str:
    return str(run.model.output.weight.dtype).removeprefix("torch.")


def tensors_hash(module: nn.Module) -> str:
    """Return 16 hexadecimal digits of the names, shapes, types and values of a module's tensors."""
    sha = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        sha.update(f"{name} {tuple(x.shape)} {x.dtype}\n".encode())
        sha.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def describe_session(run: Run, tasks: Sequence[str], options: Options) -> dict[str, Any]:
    """Return what may differ between two sessions of one evaluation."""
    dtype = run.model.tok_embeddings.weight.dtype
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tasks": list(tasks),
        "limit": options.limit,
        "data": None if options.data is None else str(options.data),
        "commit": commit(),
        "uncommitted_changes": has_changes(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": device_name(run.device),
        "kernels": {op: decide(op, run.device, dtype)[0] for op in OPS} | {"decoder": fastest.decide(run.model)[0]},
        "seconds": None,  # the wall time, once the session has ended
    }


# ---------------------------------------------------------------------------------------------------------------------
# The file


def read_header(out: Path) -> dict[str, Any]:
    """Return the header of a folder; an empty one for a folder without files. Raises UserError for other files."""
    if (out / HEADER).exists():
        header = read_json(out / HEADER)
        if [type(header.get(name)) for name in ("model", "options", "tasks", "sessions")] == [dict, dict, dict, list]:
            return header
        raise UserError(f"{out / HEADER} is not the header of an evaluation: choose another --out")
    if any(not path.name.startswith(".") for path in out.iterdir()):  # the lock, and what a kill left half written
        raise UserError(f"{out} holds files, and no {HEADER} of an evaluation: choose another --out")
    return {"model": {}, "options": {}, "tasks": {}, "sessions": []}


def check_same(out: Path, header: dict, model: dict, options: dict) -> None:
    """Raise UserError, naming the first difference, unless the folder is empty or of this model and these options."""
    if not header["sessions"]:
        return
    settings = {name: model[name] for name in ("dtype", "device")} | options
    for name, value in settings.items():
        before = (header["model"] | header["options"]).get(name)
        if before != value:
            was = f"{name} was {said(before)} and is {said(value)}"
            raise UserError(f"{out} holds another evaluation ({was}): choose another --out, or the same --{name}")
    for name, words in NAMES.items():
        if header["model"].get(name) != model[name]:
            raise UserError(f"{out} holds an evaluation with another {words}: choose another --out")


def said(value: object) -> object:
    return "the task's own" if value is None else value


def check_sessions(header: dict, task: str) -> None:
    """Warn that a log which is resumed was begun in another way that may show in the last digits of its answers."""
    *earlier, last = header["sessions"]
    changed = [name for name in AFFECTS_ANSWERS if any(each.get(name) != last[name] for each in earlier)]
    if changed:
        warn(f"{task} was begun with another {' and '.join(changed)}: its answers come from two versions")


def options_of(header: dict, task: str, options: Options) -> Options:
    """Return the options that a task was last run with; `options` give the rest."""
    limit = next((each["limit"] for each in reversed(header["sessions"]) if task in each["tasks"]), None)
    return replace(options, limit=limit, **header["options"])


def write_header(out: Path, header: dict) -> None:
    with writing(out / HEADER):
        write_file(out / HEADER, (json.dumps(header, indent=1) + "\n").encode())
