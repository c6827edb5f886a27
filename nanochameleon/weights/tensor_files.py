"""Read and write safetensors files one tensor at a time.

Files are mapped into memory, and every page that was touched stays resident as long as its map does. So a file is
mapped again after every REMAP bytes (over all shards of a model). Reading a 70 GB model then holds REMAP bytes, or one
tensor that is larger, and never a whole shard.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanochameleon.errors import UserError, shown
from nanochameleon.files import fsync, read_json
from nanochameleon.training import checkpoint

REMAP = 2**26  # bytes that are read before files are mapped again
MAX_HEADER = 2**22  # bytes that describe a file's tensors; the 34B's weights take 100,000
INDEX = "model.safetensors.index.json"
Meta = dict[str, Tensor]  # tensors on the meta device: dtypes and shapes without values
Get = Callable[[str], Tensor]


class LazyTensors(NamedTuple):
    """Dtypes and shapes by name, and the function that reads one tensor."""

    meta: Meta
    get: Get


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors
DTYPES = FLOATS | {"I8": torch.int8}  # int8 has scales (int8.py), and no other reader takes it
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def check_dtype(name: str, dtype: object, where: object) -> None:
    """Raise UserError for a tensor of integers, of 8 bits or of anything else that is not in FLOATS."""
    if dtype not in FLOATS and dtype not in FLOATS.values():
        kind = str(dtype).removeprefix("torch.")
        why = "float32, float16, bfloat16 and float64 are read"
        raise UserError(f"{shown(name)} in {where} is of type {shown(kind)}: {why}")


def cannot_read(path: Path, error: Exception) -> UserError:
    """Turn an error of the disk, or of a damaged file, into a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"cannot read {path}: {error.strerror}")
    return UserError(f"cannot read {path}: {shown(error, 120)}; is the download complete?")


def open_file(path: Path):
    """Map a .safetensors into memory. Raises UserError for a damaged one, or one whose header repeats a name."""

    def without_duplicates(pairs: list) -> dict:
        if len(content := dict(pairs)) < len(pairs):
            (double, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"it describes {shown(double)} twice")
        return content

    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if MAX_HEADER < size < path.stat().st_size:
                raise ValueError(f"its header has {size:,} bytes, which no Chameleon needs")
            json.loads(file.read(min(size, MAX_HEADER)), object_pairs_hook=without_duplicates)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise cannot_read(path, error) from None


class Safetensors:
    """The tensors of one or several .safetensors, by name; `meta` holds their dtypes and shapes."""

    def __init__(self, paths: list[Path]):
        self.where: dict[str, Path] = {}
        self.meta: Meta = {}
        self.open, self.bytes_read = {}, 0  # mapped files, and what was read since
        for path in paths:
            file = self._map(path)
            for name in file.keys():  # noqa: SIM118, this is no dict
                if name in self.where:
                    raise UserError(f"{shown(name)} is both in {self.where[name].name} and in {path.name}")
                self.where[name], part = path, file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    check_dtype(name, part.get_dtype(), path)
                self.meta[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")

    def _map(self, path: Path):
        if path not in self.open:
            self.open[path] = open_file(path)
        return self.open[path]

    def __getitem__(self, name: str) -> Tensor:
        size = self.meta[name].nbytes
        if self.bytes_read and self.bytes_read + size > REMAP:
            self.open, self.bytes_read = {}, 0
        self.bytes_read += size
        return self._map(self.where[name]).get_tensor(name)


class ShardedSafetensors:
    """Tensors that a sharded checkpoint cut over several .safetensors (training/saver.py); each is whole when read.

    shapes: name -> whole shape of the tensors to read. The files hold others, too, such as the optimizer's.
    """

    def __init__(self, paths: list[Path], shapes: dict[str, tuple[int, ...]]):
        self.pieces: dict[str, list[tuple[Path, tuple[slice, ...]]]] = {}
        self.meta: Meta = {}
        for path in paths:
            with open_file(path) as file:
                offsets = checkpoint.shard_offsets(file.metadata())
                for name in shapes.keys() & set(file.keys()):
                    part = file.get_slice(name)
                    check_dtype(name, part.get_dtype(), path)
                    starts = offsets.get(name, (0,) * len(shapes[name]))
                    where = tuple(slice(a, a + n) for a, n in zip(starts, part.get_shape(), strict=True))
                    self.pieces.setdefault(name, []).append((path, where))
                    self.meta[name] = torch.empty(shapes[name], dtype=DTYPES[part.get_dtype()], device="meta")

    def __getitem__(self, name: str) -> Tensor:
        whole = torch.empty_like(self.meta[name], device="cpu")
        for path, where in self.pieces[name]:
            with safe_open(path, framework="pt") as file:
                whole[where] = file.get_tensor(name)
        return whole


def open_safetensors(folder: Path, stem: str = "model") -> Safetensors:
    """Open folder/STEM.safetensors, or the files that its index names. Raises UserError for missing files."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise UserError(f"{folder} has neither {single.name} nor {index.name}")
        return Safetensors([single])
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index} is damaged: it has no weight_map of tensors to files")
    names = sorted(set(where.values()))
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise UserError(f"{index} names {shown(missing[0])}, which is missing, as are {len(missing) - 1} other files")
    files = Safetensors([folder / name for name in names])
    if lost := [name for name, file in where.items() if files.where.get(name, Path()).name != file]:
        raise UserError(f"{index} says that {shown(where[lost[0]])} holds {shown(lost[0])}, which it does not")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_safetensors(path: Path, meta: Meta, get: Get) -> None:
    """Write the tensors that `meta` describes, one at a time.

    The format: 8 bytes with the header's length, the header as JSON, then the bytes of all tensors.
    """
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, x in meta.items():
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, x in meta.items():
            tensor = get(name)
            if tensor.shape != x.shape or tensor.dtype != x.dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, promised {x.dtype} {x.shape}")
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    fsync(path)


def write_sharded(folder: Path, meta: Meta, get: Get, max_bytes: float) -> None:
    """Write model.safetensors, or several files with an index where all tensors together exceed `max_bytes`."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, x in meta.items():
        if parts[-1] and sum(t.nbytes for t in parts[-1].values()) + x.nbytes > max_bytes:
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
