"""Token shards: documents of ids as uint16 files, which hold 65,536 ids exactly, mapped into memory.

write_shards(folder, lists of ids)  ->  shard-00000.bin, shard-00001.bin, ..., offsets.bin, checksums.bin, index.json

offsets.bin (uint64) is where each document begins, and the end; checksums.bin (uint32) the CRC-32 of each document.
Shards are not checked when they are opened: a rank needs documents from all of them in its first steps, and reading
1 TB takes 17 minutes at 1 GB/s. A document is checked whenever it is read, for about a microsecond.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from nanochameleon.data.index import aside, damaged, map_file, read_index, write_index
from nanochameleon.errors import OwnError


def shard_sized(docs: Iterable[Sequence[int]], shard_tokens: int) -> Iterator[list[np.ndarray]]:
    """Groups of successive documents, each of at most shard_tokens ids or of a single document."""
    group, size = [], 0
    for number, ids in enumerate(docs):
        array = np.asarray(ids)
        if not array.size or array.min() < 0 or array.max() > 0xFFFF:
            raise ValueError(f"document {number} is empty or has ids outside 0..65535")
        if group and size + array.size > shard_tokens:
            yield group
            group, size = [], 0
        group.append(array.astype("<u2"))
        size += array.size
    if group:
        yield group


def write_shards(
    directory: Path, docs: Iterable[Sequence[int]], shard_tokens: int = 2**24, notes: Mapping | None = None
) -> None:
    """Documents of ids 0..65535 -> shard-00000.bin, ... of at most `shard_tokens` ids (uint16, little-endian).

    No document is split between shards. notes: what else the index is to hold. Raises ValueError for an empty document
    or an id that 16 bits do not hold; then, as after Ctrl-C, nothing is left.
    """
    with aside(directory, Shards.INDEX) as new:
        lengths, checksums, per_shard = [np.zeros(1, "<u8")], [np.zeros(0, "<u4")], []
        for number, group in enumerate(shard_sized(docs, shard_tokens)):
            np.concatenate(group).tofile(new / f"shard-{number:05d}.bin")
            lengths.append(np.array([len(ids) for ids in group], "<u8"))
            checksums.append(np.array([zlib.crc32(ids) for ids in group], "<u4"))
            per_shard.append(len(group))
        np.concatenate(lengths).cumsum(dtype="<u8").tofile(new / Shards.OFFSETS)
        np.concatenate(checksums).tofile(new / Shards.CHECKSUMS)
        write_shards_index(new, {"documents_per_shard": per_shard} | (notes or {}))


def write_shards_index(directory: Path, content: dict) -> None:
    """The last file of token shards. content: "documents_per_shard", and what else is to be noted."""
    write_index(directory, Shards.INDEX, Shards.FORMAT, content, (Shards.OFFSETS, Shards.CHECKSUMS))


class Shards:
    """Reads what write_shards wrote, memory-mapped: a sequence of documents, each a uint16 array of its ids.

    vocab_size: no id may be that or more. Raises UserError for a directory that is not one, or of which a file is
    missing or not as it was written.
    """

    FORMAT, INDEX = "a folder of token shards", "index.json"
    OFFSETS, CHECKSUMS = "offsets.bin", "checksums.bin"

    def __init__(self, directory: Path, vocab_size: int = 2**16):
        self.directory, self.vocab_size = Path(directory), vocab_size
        self.index = read_index(directory, self.INDEX, self.FORMAT)
        counts = self.index.get("documents_per_shard")
        if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 2**32 for n in counts):
            raise damaged(self.directory / self.INDEX, "does not say how many documents each shard has")
        self.firsts = np.cumsum([0, *counts])  # first document of each shard, and the end
        n_docs = int(self.firsts[-1])
        self.offsets = map_file(self.directory / self.OFFSETS, "<u8", (n_docs + 1,))
        if self.offsets[0] or not all((self.sizes(first, last) > 0).all() for first, last in self.groups):
            raise damaged(self.directory / self.OFFSETS, "is not in order")
        checked = self.index["files"]  # none in data of an older version
        self.checksums = map_file(self.directory / self.CHECKSUMS, "<u4", (n_docs,)) if checked else None
        starts = self.offsets[self.firsts].astype(np.int64)
        sizes = enumerate(np.diff(starts).tolist())
        self.shards = [map_file(self.shard(number), "<u2", (size,)) for number, size in sizes]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First document of each shard, and the first behind it."""
        return list(pairwise(self.firsts.tolist()))

    def sizes(self, first: int, last: int) -> np.ndarray:
        """Ids of documents first .. last-1, int64."""
        return np.diff(self.offsets[first : last + 1]).astype(np.int64)

    def fetch(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """Several documents, in the order asked for; their places are looked up together.

        Raises OwnError for one that is not as it was written.
        """
        first = np.asarray(numbers, np.int64)
        shards = np.searchsorted(self.firsts, first, side="right") - 1
        before = self.offsets[self.firsts[shards]]
        starts, ends = ((self.offsets[first + k] - before).tolist() for k in (0, 1))
        docs = [self.shards[shard][a:b] for shard, a, b in zip(shards.tolist(), starts, ends, strict=True)]
        self.check(first, shards, docs)
        return docs

    def check(self, numbers: np.ndarray, shards: np.ndarray, docs: list[np.ndarray]) -> None:
        """Raises OwnError for a document that is not as it was written."""
        if self.checksums is not None:
            for shard, ids, expected in zip(shards, docs, self.checksums[numbers].tolist(), strict=True):
                if zlib.crc32(ids) != expected:
                    raise damaged(self.shard(shard), "has changed since it was written", OwnError)
        if docs and (largest := np.concatenate(docs).max()) >= self.vocab_size:
            shard = next(shard for shard, ids in zip(shards, docs, strict=True) if largest in ids)
            why = f"has the id {largest}, which a vocabulary of {self.vocab_size} has not"
            raise damaged(self.shard(shard), why, OwnError)

    def shard(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.bin"

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.fetch([i])[0]
