"""Token shards: documents as files of uint16 tokens, memory-mapped. 16 bits hold 65,536 tokens, the paper's vocabulary.

    write_shards(folder, lists of tokens)  ->  shard-00000.bin, ..., offsets.bin, checksums.bin, index.json

offsets.bin (uint64) holds where each document begins, and the end; checksums.bin (uint32) the CRC-32 of each document.
Opening a folder checks no shard: a rank needs documents of all shards in its first steps, and reading 1 TB takes 17
minutes at 1 GB/s. Instead a document is checked whenever it is read, which takes about a microsecond.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from nanochameleon.data.index import damaged, map_file, read_index, replacing_folder, write_index
from nanochameleon.errors import OwnError
from nanochameleon.files import atomic_open

# ---------------------------------------------------------------------------------------------------------------------
# Writing


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def write_shards(
    directory: Path, docs: Iterable[Sequence[int]], shard_tokens: int = 2**24, notes: Mapping | None = None
) -> None:
    """Write documents of tokens 0..65535 as shards of at most `shard_tokens` tokens (uint16, little-endian).

    No document is split between shards. notes: further fields of the index. Raises ValueError for an empty document or
    a token that 16 bits do not hold; then, as after Ctrl-C, nothing is left.
    """
    with replacing_folder(directory, Shards.INDEX) as new:
        shards = (
            write_shard(new / shard_name(number), group) for number, group in enumerate(grouped(docs, shard_tokens))
        )
        write_shards_index(new, write_offsets(new, shards), dict(notes or {}))


def grouped(docs: Iterable[Sequence[int]], shard_tokens: int) -> Iterator[list[np.ndarray]]:
    """Group successive documents, at most shard_tokens tokens or a single document each."""
    group, size = [], 0
    for number, tokens in enumerate(docs):
        array = np.asarray(tokens)
        if not array.size or array.min() < 0 or array.max() > 0xFFFF:
            raise ValueError(f"document {number} is empty or has tokens outside 0..65535")
        if group and size + array.size > shard_tokens:
            yield group
            group, size = [], 0
        group.append(array.astype("<u2"))
        size += array.size
    if group:
        yield group


def write_shard(path: Path, docs: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Write one shard of uint16 documents. Returns their lengths and their checksums."""
    with atomic_open(path) as file:
        file.writelines(doc.data for doc in docs)
    return [len(doc) for doc in docs], [zlib.crc32(doc) for doc in docs]


def write_offsets(directory: Path, shards: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
    """Write offsets.bin and checksums.bin from each shard's lengths and checksums. Returns its document counts."""
    counts, total = [], 0
    with atomic_open(directory / Shards.OFFSETS) as offsets, atomic_open(directory / Shards.CHECKSUMS) as checksums:
        offsets.write(bytes(8))
        for lengths, sums in shards:
            offsets.write((total + np.cumsum(lengths, dtype=np.int64)).astype("<u8").tobytes())
            checksums.write(np.array(sums, "<u4").tobytes())
            counts.append(len(lengths))
            total += sum(lengths)
    return counts


def write_shards_index(directory: Path, documents_per_shard: list[int], notes: dict) -> None:
    """Write the index, the last file of token shards."""
    content = {"documents_per_shard": documents_per_shard} | notes
    write_index(directory, Shards.INDEX, Shards.FORMAT, content, (Shards.OFFSETS, Shards.CHECKSUMS))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Shards:
    """Reads what write_shards wrote, memory-mapped: a sequence of documents, each a uint16 array of its tokens.

    vocab_size: every token must be below it. Raises UserError for a directory that is not one, or of which a file is
    missing or damaged.
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
        self.checksums = map_file(self.directory / self.CHECKSUMS, "<u4", (n_docs,))
        starts = self.offsets[self.firsts].astype(np.int64)
        sizes = enumerate(np.diff(starts).tolist())
        self.shards = [map_file(self.path(number), "<u2", (size,)) for number, size in sizes]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First and last + 1 document of each shard."""
        return list(pairwise(self.firsts.tolist()))

    def sizes(self, first: int, last: int) -> np.ndarray:
        """Tokens of documents first .. last-1, int64."""
        return np.diff(self.offsets[first : last + 1]).astype(np.int64)

    def fetch(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """Several documents, in the order asked for; their offsets are looked up together.

        Raises OwnError for a document that has changed since it was written.
        """
        numbers = np.asarray(numbers, np.int64)
        shards = np.searchsorted(self.firsts, numbers, side="right") - 1
        before = self.offsets[self.firsts[shards]]
        starts, ends = ((self.offsets[numbers + k] - before).tolist() for k in (0, 1))
        docs = [self.shards[shard][a:b] for shard, a, b in zip(shards.tolist(), starts, ends, strict=True)]
        self.check(numbers, shards, docs)
        return docs

    def check(self, numbers: np.ndarray, shards: np.ndarray, docs: list[np.ndarray]) -> None:
        for shard, tokens, expected in zip(shards, docs, self.checksums[numbers].tolist(), strict=True):
            if zlib.crc32(tokens) != expected:
                raise damaged(self.path(shard), "has changed since it was written", OwnError)
        # a checksum does not tell tokens of another, larger vocabulary
        if docs and (largest := np.concatenate(docs).max()) >= self.vocab_size:
            shard = next(shard for shard, tokens in zip(shards, docs, strict=True) if largest in tokens)
            why = f"has the token {largest}, which is outside a vocabulary of {self.vocab_size}"
            raise damaged(self.path(shard), why, OwnError)

    def path(self, number: int) -> Path:
        return self.directory / shard_name(number)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.fetch([i])[0]
