"""Token shards: documents of ids as uint16 files, which hold 65,536 ids exactly, mapped into memory.

write_shards(folder, lists of ids)  ->  shard-00000.bin, shard-00001.bin, ..., offsets.bin, index.json
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from nanochameleon.data.folders import aside, map_file, read_index


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


def write_shards(directory: Path, docs: Iterable[Sequence[int]], shard_tokens: int = 2**24) -> None:
    """Documents of ids 0..65535 -> shard-00000.bin, ... of at most `shard_tokens` ids (uint16, little-endian).

    No document is split between shards. Raises ValueError for an empty document or an id that 16 bits do not hold;
    then, as after Ctrl-C, nothing is left.
    """
    with aside(directory, Shards.INDEX) as new:
        lengths, per_shard = [np.zeros(1, "<u8")], []
        for number, group in enumerate(shard_sized(docs, shard_tokens)):
            np.concatenate(group).tofile(new / f"shard-{number:05d}.bin")
            lengths.append(np.array([len(ids) for ids in group], "<u8"))
            per_shard.append(len(group))
        np.concatenate(lengths).cumsum(dtype="<u8").tofile(new / "offsets.bin")
        index = {"format": Shards.FORMAT, "documents_per_shard": per_shard}
        (new / Shards.INDEX).write_text(json.dumps(index), encoding="utf-8")


class Shards:
    """Reads what write_shards wrote, memory-mapped: a sequence of documents, each a uint16 array of its ids.

    Raises UserError for a directory that is not one, or of which a file is missing or not of the size it was written.
    """

    FORMAT, INDEX = "a folder of token shards", "index.json"

    def __init__(self, directory: Path):
        index = read_index(directory, self.INDEX, self.FORMAT)
        self.firsts = np.cumsum([0, *index["documents_per_shard"]])  # first document of each shard, and the end
        self.offsets = map_file(Path(directory) / "offsets.bin", "<u8", (int(self.firsts[-1]) + 1,))
        starts = self.offsets[self.firsts].astype(np.int64)
        self.shards = [
            map_file(Path(directory) / f"shard-{number:05d}.bin", "<u2", (int(size),))
            for number, size in enumerate(np.diff(starts))
        ]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First document of each shard, and the first behind it."""
        return list(pairwise(self.firsts.tolist()))

    def sizes(self, first: int, last: int) -> np.ndarray:
        """Ids of documents first .. last-1, int64."""
        return np.diff(self.offsets[first : last + 1]).astype(np.int64)

    def fetch(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """Several documents, in the order asked for; their places are looked up together."""
        first = np.asarray(numbers, np.int64)
        shards = np.searchsorted(self.firsts, first, side="right") - 1
        before = self.offsets[self.firsts[shards]]
        starts, ends = ((self.offsets[first + k] - before).tolist() for k in (0, 1))
        return [self.shards[shard][a:b] for shard, a, b in zip(shards.tolist(), starts, ends, strict=True)]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.fetch([i])[0]
