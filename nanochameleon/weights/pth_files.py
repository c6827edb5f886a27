"""Read torch's .pth files one tensor at a time, and write them.

A .pth is a pickle, which can run code or ask for any amount of memory. So its instructions are checked first, and it is
opened with weights_only=True, which builds tensors and refuses everything else.
"""

import gc
import pickle
import pickletools
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.errors import UserError, shown
from nanochameleon.files import fsync
from nanochameleon.weights import tensor_files
from nanochameleon.weights.tensor_files import cannot_read

MAX_PICKLE = 2**20  # bytes that describe a file's tensors; the 34B's weights take 100,000

# All that a pickle of tensors may name. torch would also build others, such as bytearray and FloatTensor, but those
# allocate as much memory as a number in the file says.
HARMLESS = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)|_codecs encode"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch (\w+Storage|Size|device|[a-z]+\d\w*|bool)"
)


class Pth:
    """The tensors of one .pth, mapped into memory; `meta` holds their dtypes and shapes.

    key: the entry of the file that holds the tensors. n_shards: files of one model, which share the REMAP bytes.
    """

    def __init__(self, path: Path, key: str | None = None, n_shards: int = 1):
        self.path, self.key, self.n_shards = path, key, n_shards
        self.bytes_read = 0  # since the file was mapped
        self.tensors = load_pth(path, key)
        self.meta = {name: x.to("meta") for name, x in self.tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        size = self.meta[name].nbytes
        if self.bytes_read and self.bytes_read + size > tensor_files.REMAP // self.n_shards:
            self.tensors = {}
            gc.collect()  # torch.load leaves a reference cycle that holds the map
            self.tensors, self.bytes_read = load_pth(self.path, self.key, check=False), 0
        self.bytes_read += size
        return self.tensors[name]


def load_pth(path: Path, key: str | None = None, check: bool = True) -> dict[str, Tensor]:
    """Map the tensors of a .pth into memory. Raises UserError for anything but tensors by name."""
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


def check_pickle(path: Path) -> None:
    """Raise UserError for a .pth that would take long to describe its tensors, or more memory than it has bytes."""
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


def is_plain(name: object, x: object) -> bool:
    """Is this a named tensor whose values are stored one by one in the file?"""
    return (
        isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu"
        and not x.is_quantized
    )  # fmt: skip


def write_pth(path: Path, content: dict) -> None:
    """Write one file with torch.save, which needs all of it in memory. Raises OSError for a full disk."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's own error, about positions in the file, hides the disk's
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    fsync(path)
