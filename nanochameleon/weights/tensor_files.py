"""Files of tensors, one tensor at a time: safetensors read and written, torch's .pth read.

Both kinds are mapped into memory rather than read, and what was touched stays resident as long as its map does. So a
file is mapped anew after every REMAP bytes (all shards of a model together): walking through 70 GB of shards holds
those, or one tensor that is larger, and never a shard.
A .pth is a pickle; it is opened with weights_only=True, which builds tensors and refuses everything else.
"""

import gc
import json
import pickle
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanochameleon.errors import UserError, shown
from nanochameleon.files import fsync, read_json
from nanochameleon.training import checkpoint

REMAP = 2**26  # bytes handed out before files are mapped anew
MAX_HEADER, MAX_PICKLE = 2**22, 2**20  # bytes that describe a file's tensors; the 34B's weights take 100,000
INDEX = "model.safetensors.index.json"
Meta = dict[str, Tensor]  # on the meta device: types and shapes without content
Get = Callable[[str], Tensor]


class Tensors(NamedTuple):
    """Types and shapes by name, and the function that reads one."""

    meta: Meta
    get: Get


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def check_type(name: str, dtype: object, where: object) -> None:
    """Raises UserError for a tensor of integers, of 8 bits or of anything else than DTYPES."""
    if dtype not in DTYPES and dtype not in NAMES:
        kind = str(dtype).removeprefix("torch.")
        why = "float32, float16, bfloat16 and float64 are read"
        raise UserError(f"{shown(name)} in {where} is of type {shown(kind)}: {why}")


def cannot_read(path: Path, error: Exception) -> UserError:
    """The sentence for an error of the disk, or of a file that is not what it should be."""
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"cannot read {path}: {error.strerror}")
    return UserError(f"cannot read {path}: {shown(error, 120)}; is the download complete?")


# What a pickle of tensors may name. Others that torch builds, such as bytearray and FloatTensor, take as much memory as
# a number in the file says.
HARMLESS = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)|_codecs encode"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch (\w+Storage|Size|device|[a-z]+\d\w*|bool)"
)


def check_pickle(path: Path) -> None:
    """Raises UserError for a .pth whose description of its tensors would take long, or memory that the file has not."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(f"{path} is refused: it holds compressed parts")
        for entry in entries:
            if entry.filename.lower().rpartition("/")[2] == "data.pkl":
                if entry.file_size > MAX_PICKLE:
                    raise UserError(f"{path} is refused: it describes more tensors than a Chameleon has")
                names = [name for op, name, _ in pickletools.genops(archive.read(entry)) if op.name == "GLOBAL"]
                if bad := [name for name in names if not HARMLESS.fullmatch(name)]:
                    raise UserError(f"{path} is refused: it holds more than tensors ({shown(bad[0])})")


def load_pth(path: Path, key: str | None = None, check: bool = True) -> dict[str, Tensor]:
    """A .pth's tensors, mapped. `key`: the entry that holds them. Raises UserError for anything but named tensors."""
    try:
        if check:
            check_pickle(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it holds more than tensors, or is damaged ({shown(error, 120)})") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can make its reader raise nearly anything
        raise cannot_read(path, error) from None
    if key and isinstance(content, dict):
        content = content.get(key, content)
    if not isinstance(content, dict) or not all(is_plain(name, x) for name, x in content.items()):
        raise UserError(f"{path} does not hold tensors by name, as a Chameleon checkpoint does")
    if sum(x.nbytes for x in content.values()) > path.stat().st_size:
        raise UserError(f"{path} is refused: its tensors are larger than the file")
    return content


def is_plain(name: object, x: object) -> bool:
    """Is it a named tensor whose values lie one by one in the file?"""
    return (
        isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu"
        and not x.is_quantized
    )  # fmt: skip


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
            self.tensors, self.given = load_pth(self.path, self.key, check=False), 0
        self.given += size
        return self.tensors[name]


def open_file(path: Path):
    """A .safetensors, mapped. Raises UserError for one that is damaged, or whose header says something twice."""

    def once(pairs: list) -> dict:
        if len(content := dict(pairs)) < len(pairs):
            (double, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"it describes {shown(double)} twice")
        return content

    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if MAX_HEADER < size < path.stat().st_size:
                raise ValueError(f"its header has {size:,} bytes, which no Chameleon needs")
            json.loads(file.read(min(size, MAX_HEADER)), object_pairs_hook=once)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise cannot_read(path, error) from None


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
                    raise UserError(f"{shown(name)} stands both in {self.where[name].name} and in {path.name}")
                self.where[name], part = path, file.get_slice(name)
                check_type(name, part.get_dtype(), path)
                self.meta[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")

    def _map(self, path: Path):
        if path not in self.open:
            self.open[path] = open_file(path)
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
            with open_file(path) as file:
                offsets = checkpoint.shard_offsets(file.metadata())
                for name in names & set(file.keys()):
                    part = file.get_slice(name)
                    check_type(name, part.get_dtype(), path)
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
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index} is damaged: it has no weight_map of tensors to files")
    names = sorted(set(where.values()))
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise UserError(
            f"{index} names {shown(missing[0])}, which is not there: {len(missing)} of {len(names)} files miss"
        )
    files = Safetensors([folder / name for name in names])
    if lost := [name for name, file in where.items() if files.where.get(name, Path()).name != file]:
        raise UserError(f"{index} says that {shown(where[lost[0]])} holds {shown(lost[0])}, which it does not")
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


def write_sharded(folder: Path, meta: Meta, get: Get, most: float) -> None:
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
    """torch.save, which needs the whole of one file in memory. Raises OSError where the disk does not take it."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's own, about positions in the file, hides the disk's
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    fsync(path)
