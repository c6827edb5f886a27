"""Files of tensors, one tensor at a time: safetensors read and written, torch's .pth read.

Both kinds are mapped into memory rather than read, and what was touched stays resident as long as its map does. So a
file is mapped anew after every REMAP bytes (all shards of a model together): walking through 70 GB of shards holds
those, or one tensor that is larger, and never a shard.
A .pth is a pickle; it is opened with weights_only=True, which builds tensors and refuses everything else.
"""

import gc
import json
import pickle
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanochameleon import checkpoint
from nanochameleon.errors import UserError
from nanochameleon.files import fsync

REMAP = 2**26  # bytes handed out before files are mapped anew
INDEX = "model.safetensors.index.json"
Meta = dict[str, Tensor]  # on the meta device: types and shapes without content
Get = Callable[[str], Tensor]

NAMES = {  # of safetensors
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_pth(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """A .pth's tensors, mapped. `key`: the entry that holds them. Raises UserError for anything but named tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        why = str(error).splitlines()[0][:160]
        raise UserError(f"{path} is refused: it holds more than tensors, or is damaged ({why})") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        why = str(error).splitlines()[0][:160]
        raise UserError(f"cannot read {path}: {why}; is the download complete?") from None
    if key and isinstance(content, dict):
        content = content.get(key, content)
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise UserError(f"{path} does not hold tensors by name, as a Chameleon checkpoint does")
    return content


class Pth:
    """The tensors of one .pth; `meta` holds their types and shapes."""

    def __init__(self, path: Path, key: str | None = None, n_shards: int = 1):
        self.path, self.key, self.given, self.n_shards = path, key, 0, n_shards
        self.tensors = load_pth(path, key)
        self.meta = {name: x.to("meta") for name, x in self.tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        size = self.meta[name].nbytes
        if self.given and self.given + size > REMAP // self.n_shards:
            self.tensors = {}
            gc.collect()  # torch.load leaves a cycle that holds the map
            self.tensors, self.given = load_pth(self.path, self.key), 0
        self.given += size
        return self.tensors[name]


class Safetensors:
    """The tensors of one or several .safetensors, by name; `meta` as above. Raises UserError for a damaged one."""

    def __init__(self, paths: list[Path]):
        self.where: dict[str, Path] = {}
        self.meta: Meta = {}
        self.open, self.given = {}, 0
        for path in paths:
            file = self._map(path)
            for name in file.keys():  # noqa: SIM118, this is no dict
                if name in self.where:
                    raise UserError(f"{name} stands both in {self.where[name].name} and in {path.name}")
                self.where[name], part = path, file.get_slice(name)
                self.meta[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")

    def _map(self, path: Path):
        if path not in self.open:
            try:
                self.open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"cannot read {path}: {error}; is the download complete?") from None
        return self.open[path]

    def __getitem__(self, name: str) -> Tensor:
        size = self.meta[name].nbytes
        if self.given and self.given + size > REMAP:
            self.open, self.given = {}, 0
        self.given += size
        return self._map(self.where[name]).get_tensor(name)


class Cut:
    """Tensors that lie in pieces in several .safetensors, as a sharded checkpoint has them (saver.py); those of `names`
    alone. Each is put together when it is asked for."""

    def __init__(self, paths: list[Path], names: Collection[str]):
        self.pieces: dict[str, list[tuple[Path, tuple[slice, ...]]]] = {}
        self.meta: Meta = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                offsets = checkpoint.shard_offsets(file.metadata())
                for name in names & set(file.keys()):
                    part = file.get_slice(name)
                    begins = offsets.get(name, (0,) * len(part.get_shape()))
                    ends = [a + n for a, n in zip(begins, part.get_shape(), strict=True)]
                    self.pieces.setdefault(name, []).append((path, tuple(map(slice, begins, ends))))
                    shape = map(max, ends, self.meta[name].shape if name in self.meta else ends)
                    self.meta[name] = torch.empty(tuple(shape), dtype=DTYPES[part.get_dtype()], device="meta")

    def __getitem__(self, name: str) -> Tensor:
        whole = torch.empty_like(self.meta[name], device="cpu")
        for path, where in self.pieces[name]:
            with safe_open(path, framework="pt") as file:
                whole[where] = file.get_tensor(name)
        return whole


def open_safetensors(folder: Path, stem: str = "model") -> Safetensors:
    """folder/STEM.safetensors, or the shards that its index names. Raises UserError for missing files."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise UserError(f"{folder} has neither {single.name} nor {index.name}")
        return Safetensors([single])
    try:
        where = json.loads(index.read_text())["weight_map"]
        names = sorted(set(where.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged ({error})") from None
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise UserError(f"{index} names {missing[0]}, which is not there: {len(missing)} of {len(names)} files miss")
    files = Safetensors([folder / name for name in names])
    if lost := [name for name, file in where.items() if files.where.get(name, Path()).name != file]:
        raise UserError(f"{index} says that {where[lost[0]]} holds {lost[0]}, which it does not")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_safetensors(path: Path, meta: Meta, get: Get) -> None:
    """Writes the tensors that `meta` describes, one at a time.

    The format: 8 bytes of the header's length, the header as JSON, then the bytes of all tensors.
    """
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, x in meta.items():
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, x in meta.items():
            tensor = get(name)
            if tensor.shape != x.shape or tensor.dtype != x.dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, promised {x.dtype} {x.shape}")
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    fsync(path)


def write_sharded(folder: Path, meta: Meta, get: Get, most: int) -> None:
    """model.safetensors, or several with an index where the whole has more than `most` bytes."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, x in meta.items():
        if parts[-1] and sum(t.nbytes for t in parts[-1].values()) + x.nbytes > most:
            parts.append({})
        parts[-1][name] = x
    if len(parts) == 1:
        return write_safetensors(folder / "model.safetensors", meta, get)
    files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        write_safetensors(folder / file, part, get)
    where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    total = sum(x.nbytes for x in meta.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))


def write_pth(path: Path, content: dict) -> None:
    """torch.save, which needs the whole of one file in memory."""
    torch.save(content, path)
    fsync(path)
