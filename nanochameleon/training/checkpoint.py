"""Checkpoints: step-NNNNNN/ folders that are either whole or do not count.

    step-000200/  model.safetensors  optim.safetensors  state.json  manifest.json
    step-000400/  shard-00001-model-00001-of-00001.safetensors, ...  state.json  manifest.json     of a sharded model

All files are written into a .tmp-... folder. The manifest (size and sha256 of each file) comes last, then one rename.
So a kill at any moment leaves the older checkpoints as they were, and a flipped byte or a cut file is noticed. The
newest checkpoint is the newest WHOLE one, found by looking; there is no pointer file that could be stale. Files that
the manifest does not list, such as leftovers of a copy, are never read. Safetensors and JSON only, never pickle.
This file moves state; it builds no model and knows no configuration.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochameleon.errors import UserError, warn
from nanochameleon.files import fsync, is_safe_name

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", ".safetensors"
ODD = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what odd content raises
# .old: the earlier save of a step that is saved again, until the rename
STEP_FOLDER = re.compile(r"step-(\d{6,})(\.old)?")

# ---------------------------------------------------------------------------------------------------------------------
# The manifest


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def render_manifest(entries: dict[str, dict]) -> bytes:
    """{name: {"size": bytes, "sha256": hex}} -> its canonical JSON, so that any flipped byte is noticed."""
    return (json.dumps({"files": entries}, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(checkpoint: Path) -> dict[str, dict]:
    """Read the manifest's entries. Raises ValueError or OSError for one that is missing, cut or changed."""
    data = (checkpoint / MANIFEST).read_bytes()
    manifest = json.loads(data)
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(entries, dict) or STATE not in entries or render_manifest(entries) != data:
        raise ValueError("the manifest is not as save wrote it")
    if not all(is_safe_name(name) and isinstance(entry, dict) for name, entry in entries.items()):
        raise ValueError("the manifest names something other than plain files")
    return entries


def tensor_files(checkpoint: Path) -> list[Path]:
    """The safetensors that a whole checkpoint's manifest lists, sorted; others in its folder do not belong to it."""
    return [checkpoint / name for name in sorted(read_manifest(checkpoint)) if name.endswith(TENSORS)]


def damage(checkpoint: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if all files are readable and as its manifest says."""
    try:
        entries = read_manifest(checkpoint)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, RecursionError):
        return f"{MANIFEST} is damaged"
    for name, entry in entries.items():
        if problem := _damage_of(checkpoint / name, entry):
            return f"{name} {problem}"
    return None


def _damage_of(file: Path, entry: dict) -> str | None:
    try:
        if not file.is_file():
            return "is missing"
        if file.stat().st_size != entry.get("size"):  # before hashing: cheap, and bounds what is read
            return f"has {file.stat().st_size} bytes instead of {entry.get('size')}"
        if sha256(file) != entry.get("sha256"):
            return "has changed since it was written"
        if file.name == STATE:
            read_state(file.parent)
        elif file.suffix == TENSORS:
            shapes_in([file])
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ODD:
        return "is not what belongs there"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Save


def save(run_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> Path:
    """Write run_dir/step-NNNNNN and return it.

    tensors: {"model": {name: tensor}, "optim": ..., ...}, one safetensors file each; tensors must not share memory.
    state: what JSON can hold.
    Raises UserError if the disk is full or not writable; nothing new is left then, and older checkpoints are untouched.
    """
    run_dir = Path(run_dir)
    aside = run_dir / temporary_name(step)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        sweep_folders(run_dir)
        check_room(run_dir, (t for group in tensors.values() for t in group.values()))
        aside.mkdir()
        _write_tensors(aside, tensors)
        return commit(aside, run_dir, step, state, describe(aside.iterdir()))
    except OSError as error:
        raise UserError(f"cannot save a checkpoint in {run_dir}: {error}; older checkpoints are untouched") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def temporary_name(step: int) -> str:
    return f".tmp-step-{step:06d}-{os.getpid()}"


def check_room(run_dir: Path, tensors: Iterable[Tensor]) -> None:
    """Raises OSError if the disk has no room for these tensors."""
    needed = sum(t.numel() * t.element_size() for t in tensors)
    if shutil.disk_usage(run_dir).free < needed:
        raise OSError(f"it needs {needed / 1e6:,.1f} MB and the disk has less")


def sweep(run_dir: Path) -> None:
    """Remove the .tmp-* folders and files that a killed process has left. Call it while nothing is being written."""
    sweep_folders(run_dir)
    for path in Path(run_dir).glob(".tmp-*"):
        if not path.is_dir():
            path.unlink(missing_ok=True)


def sweep_folders(run_dir: Path) -> None:
    """Remove the folders only, which are saves; other files may be in the middle of being written."""
    for path in Path(run_dir).glob(".tmp-*/"):
        shutil.rmtree(path, ignore_errors=True)


def _write_tensors(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    for group, content in tensors.items():
        try:
            save_file({k: t.detach().cpu().contiguous() for k, t in content.items()}, folder / f"{group}.safetensors")
        except SafetensorError as error:  # safetensors reports a full disk by its own error
            raise OSError(str(error)) from error


def describe(paths: Iterable[Path]) -> dict[str, dict]:
    """Sync files to the disk and return their entries of the manifest."""
    entries = {}
    for path in paths:
        fsync(path)
        entries[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return entries


def commit(aside: Path, run_dir: Path, step: int, state: dict, entries: dict[str, dict]) -> Path:
    """Turn a folder whose tensors are written and described into a checkpoint; returns its path."""
    (aside / STATE).write_text(json.dumps(state, indent=1))
    entries = entries | describe([aside / STATE])
    (aside / MANIFEST).write_bytes(render_manifest(entries))
    fsync(aside / MANIFEST)
    fsync(aside)
    return _move_in(aside, run_dir / f"step-{step:06d}")


def _move_in(aside: Path, target: Path) -> Path:
    """Rename into place. An older save of the same step is renamed first, to a name that newest() still finds."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(aside, target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Find and load


def checkpoints(run_dir: Path) -> list[Path]:
    """The step folders of a run, newest first, whole or not."""
    found = [(STEP_FOLDER.fullmatch(path.name), path) for path in Path(run_dir).glob("step-*") if path.is_dir()]
    ranked = [((int(match[1]), match[2] is None), path) for match, path in found if match]
    return [path for _, path in sorted(ranked, reverse=True)]


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, None without one; warns of each newer one that is damaged."""
    for path in checkpoints(run_dir):
        problem = damage(path)
        if problem is None:
            return path
        warn(f"passing over {path}: {problem}")
    return None


def load(path: Path, groups: Collection[str] | None = None) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Checkpoint, or run folder (then its newest whole one) -> (tensors by group on the CPU, state).

    groups: which ones to read, such as ("model",). Raises UserError for a path that is no run folder, a run without a
    whole checkpoint, and a checkpoint that is not whole: if you name one, you get that one or an error.
    """
    path = locate(path)
    files = {file.stem: file for file in tensor_files(path)}
    for group in groups or ():
        if group not in files:
            raise UserError(f"{path} has no {group}{TENSORS}; it was saved by another stage or version")
    with readable(path):
        return {group: load_file(files[group]) for group in (files if groups is None else groups)}, read_state(path)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises UserError for a checkpoint that matches its manifest but holds something else than it should."""
    try:
        yield
    except (*ODD, RuntimeError) as error:
        what = f"{path} does not hold what it should ({type(error).__name__})"
        raise UserError(f"{what}: delete it, and the same command resumes without it") from error


def locate(path: Path) -> Path:
    """Resolve a checkpoint or a run folder to a whole checkpoint. Raises UserError as load does."""
    path = Path(path)
    if not path.is_dir():
        what = "is a file, not a run folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give the folder that train.py wrote, such as runs/toy")
    if STEP_FOLDER.fullmatch(path.name) or ((path / MANIFEST).exists() and not checkpoints(path)):
        if problem := damage(path):
            raise UserError(f"{path} is damaged: {problem}; name the run folder to use the newest whole checkpoint")
        return path
    if not checkpoints(path):
        raise UserError(f"{path} is not a run folder: it holds no step-NNNNNN; give the folder that train.py wrote")
    found = newest(path)
    if found is None:
        raise UserError(
            f"{path} holds no whole checkpoint, all are damaged: restore a copy, or start again with --overwrite"
        )
    return found


def keep_last(run_dir: Path, k: int) -> None:
    """Delete what is older than the k newest whole checkpoints, except the best one: the one with the least "loss" in
    its state. Damaged ones do not count among the k."""
    if k < 1:
        raise ValueError(f"keep at least 1 checkpoint, not {k}")
    sweep_folders(run_dir)
    whole, old = 0, []
    for path in checkpoints(run_dir):
        if whole >= k:
            old.append(path)
        elif damage(path) is None:
            whole += 1
    best = min(checkpoints(run_dir), key=loss_of, default=None)
    for path in old:
        if path == best and loss_of(path) < math.inf and damage(path) is None:
            continue
        # Renamed first: a kill in the middle leaves a .tmp-*, not half a checkpoint.
        doomed = path.with_name(f".tmp-old-{path.name}")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def loss_of(checkpoint: Path) -> float:
    """The "loss" in a checkpoint's state; infinity without one."""
    try:
        loss = json.loads((checkpoint / STATE).read_text()).get("loss")
    except (OSError, ValueError, AttributeError, RecursionError):
        return math.inf
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# What the files hold


def read_state(path: Path) -> dict:
    """Read a checkpoint's state.json. Raises ValueError or RecursionError for what save did not write."""
    state = json.loads((path / STATE).read_text())
    if not isinstance(state, dict):
        raise ValueError("state.json is not a JSON object")
    return state


def steps_done(state: dict) -> int:
    """The "step" of a state. Raises ValueError if it is not a count."""
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError("its step is not a count")
    return state["step"]


def shapes_in(files: Iterable[Path]) -> tuple[dict[str, tuple[int, ...]], Counter[str]]:
    """Name -> shape of the full tensor, and how many of its elements are in these files."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: Counter[str] = Counter()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            offsets = shard_offsets(opened.metadata())
            for name in opened.keys():  # noqa: SIM118
                shape = tuple(opened.get_slice(name).get_shape())
                ends = tuple(a + b for a, b in zip(offsets.get(name, (0,) * len(shape)), shape, strict=True))
                before = shapes.get(name, (0,) * len(ends))
                shapes[name] = tuple(max(a, b) for a, b in zip(ends, before, strict=True))
                sizes[name] += math.prod(shape)
    return shapes, sizes


def shard_offsets(metadata: dict[str, str] | None) -> dict[str, tuple[int, ...]]:
    """Where each shard of a file starts in its full tensor, as torch.distributed.checkpoint notes it; {} without
    shards."""
    noted = json.loads((metadata or {}).get("DCP_SHARDING_INFO", "{}"))
    found = {name: tuple(entry["saved_offsets"]) for name, entry in noted.items()}
    if not all(type(n) is int and 0 <= n < 2**48 for offsets in found.values() for n in offsets):
        raise ValueError("a shard's offsets are not counts")
    return found
