"""From raw documents to batches: formats, mixtures, stored pictures, token shards, and the loader.

    source.document(i)  ->  [Text, Picture, ...]  -fuse->  [Text, Image, ...]  -render->  ids  -write_shards->  Shards
    Loader(shards, ...).batch(step)  ->  Batch

Every draw is a pure function of (seed, index): the same numbers give the same document, mixture and batch, so that a
run resumes exactly with no state of a loader to save. The sources are shapes.py, emoji.py and folder.py.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from nanochameleon.documents import Document, EndOfTurn, Image, Text
from nanochameleon.errors import UserError
from nanochameleon.image_tokenizer import ImageTokenizer
from nanochameleon.packing import Batch, assign_rows, fill


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that is not tokenized yet."""

    pixels: np.ndarray  # uint8 (R, R, 3)


RawDocument = list[Text | Picture | EndOfTurn]
FORMS = ("pair", "questions", "interleaved")  # what the documents of a source look like, see below


class Source(Protocol):
    """Where raw documents come from. `size` counts the items of a finite source and is None for an endless one.

    document(index) takes any index >= 0: a finite source shows item index % size, and draws everything else (which
    comes first, which question) from the index, so that the next time round the item looks different.
    """

    size: int | None

    def document(self, index: int) -> RawDocument: ...

    def captions(self, n: int) -> Iterable[str]:
        """n texts of the kind that its documents hold, for training a text tokenizer."""
        ...


# ---------------------------------------------------------------------------------------------------------------------
# The forms a document takes


def pair(caption: str, pixels: np.ndarray, rng: np.random.Generator) -> RawDocument:
    """A picture and its caption, either one first, half and half (paper section 2.2: 50% each)."""
    picture, text = Picture(pixels), Text(caption)
    return [picture, text] if rng.random() < 0.5 else [text, picture]


def question_answer(pixels: np.ndarray, qas: Sequence[tuple[str, str]]) -> RawDocument:
    """Picture, question, end of turn, answer; before each further question another end of turn."""
    doc: RawDocument = [Picture(pixels)]
    for number, (question, answer) in enumerate(qas):
        doc += [EndOfTurn()] if number else []
        doc += [Text(question), EndOfTurn(), Text(answer)]
    return doc


def interleaved(pairs: Sequence[tuple[str, np.ndarray]]) -> RawDocument:
    """Text, picture, text, picture: each text is the caption of the picture after it."""
    return [segment for caption, pixels in pairs for segment in (Text(caption), Picture(pixels))]


def fuse(
    docs: Sequence[RawDocument], image_tokenizer: ImageTokenizer, known: dict[bytes, Image] | None = None
) -> list[Document]:
    """Raw documents -> documents with codes in place of pixels; all their pictures, of one size, go in one batch.

    `known` holds codes by a digest of the pixels and grows: with it a finite source's pictures are encoded only once.
    """
    known = {} if known is None else known
    pixels = {digest(s.pixels): s.pixels for doc in docs for s in doc if isinstance(s, Picture)}
    new = [key for key in pixels if key not in known]
    if new:
        codes = image_tokenizer.encode(np.stack([pixels[key] for key in new]))
        known |= {key: Image(tuple(row)) for key, row in zip(new, codes.tolist(), strict=True)}
    return [[known[digest(s.pixels)] if isinstance(s, Picture) else s for s in doc] for doc in docs]


def digest(pixels: np.ndarray) -> bytes:
    """16 bytes that tell one picture from another."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


@lru_cache(maxsize=16)
def permutation(n: int, *seed: int) -> np.ndarray:
    """0..n-1 in an order that the seed decides."""
    order = np.random.default_rng(seed).permutation(n)
    order.flags.writeable = False  # it is shared by all callers
    return order


class Mixture:
    """Several sources in fixed shares, itself an endless source: document i is a pure function of (seed, i).

    Of each BLOCK documents in a row every source gives exactly its share, in a drawn order; so how many a source has
    given before i needs no counting. A finite source gives each of its items once before any comes again.
    Raises UserError for a share that is not positive or smaller than one in BLOCK.
    """

    BLOCK = 1_000
    size = None

    def __init__(self, sources: dict[str, tuple[Source, float]], seed: int):
        self.seed = seed
        self.names = list(sources)
        self.sources = [source for source, _ in sources.values()]
        weights = np.array([weight for _, weight in sources.values()], float)
        if not len(weights) or not np.isfinite(weights).all() or weights.min() <= 0:
            raise UserError(f"a mixture needs sources with weights above 0, got {weights} for {self.names}")
        edges = np.round(np.cumsum(weights) / weights.sum() * self.BLOCK).astype(int)
        self.per_block = np.diff(edges, prepend=0)
        if self.per_block.min() == 0:
            rare = self.names[int(self.per_block.argmin())]
            raise UserError(f"source {rare!r} has less than 1/{self.BLOCK} of the mixture: raise its weight or drop it")

    def draw(self, i: int) -> tuple[int, int]:
        """Number of the source that gives document i, and the index to ask it for."""
        block, place = divmod(i, self.BLOCK)
        slots = np.repeat(np.arange(len(self.sources)), self.per_block)[permutation(self.BLOCK, self.seed, block)]
        which = int(slots[place])
        count = block * int(self.per_block[which]) + int((slots[:place] == which).sum())
        size = self.sources[which].size
        if size is None:
            return which, count
        epoch, place = divmod(count, size)
        return which, epoch * size + int(
            permutation(size, self.seed, epoch, zlib.crc32(self.names[which].encode()))[place]
        )

    def document(self, i: int) -> RawDocument:
        which, index = self.draw(i)
        return self.sources[which].document(index)

    def captions(self, n: int) -> Iterator[str]:
        """About n texts, from each source its share."""
        for source, count in zip(self.sources, self.per_block, strict=True):
            yield from islice(source.captions(round(n * count / self.BLOCK)), round(n * count / self.BLOCK))


# ---------------------------------------------------------------------------------------------------------------------
# Directories that are whole or not there


@contextmanager
def aside(directory: Path, index: str) -> Iterator[Path]:
    """A new directory to write in; it takes the place of `directory` when the block ends, and is gone if it fails.

    Raises UserError if `directory` holds anything but an earlier one of its kind (known by its file `index`).
    """
    directory = Path(directory)
    if (
        directory.exists()
        and not (directory / index).is_file()
        and not (directory.is_dir() and not any(directory.iterdir()))
    ):
        raise UserError(
            f"{directory} is in the way: it was not written by nanochameleon; move it or choose another place"
        )
    new, old = (directory.with_name(f".{directory.name}.{kind}") for kind in ("new", "old"))
    if old.exists() and not directory.exists():  # killed between the two renames below
        os.replace(old, directory)
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if directory.exists():
            os.replace(directory, old)
        os.replace(new, directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_index(directory: Path, index: str, what: str) -> dict:
    """The JSON object in directory/index. Raises UserError: `directory` is no such thing, or the file is broken."""
    try:
        content = json.loads((Path(directory) / index).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{directory} is not {what}: it has no readable {index}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != what:
        raise UserError(f"{Path(directory) / index} is broken: delete {directory} and prepare the data again")
    return content


def map_file(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A file of exactly this type and shape, memory-mapped for reading. Raises UserError for one of any other size."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        state = "missing" if found < 0 else f"{found:,} bytes long where {expected:,} were written"
        raise UserError(f"{path} is {state}: delete {path.parent} and prepare the data again")
    return np.memmap(path, dtype, "r", shape=shape) if expected else np.empty(shape, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Stored pictures: what emoji.py and folder.py prepare once


def write_pictures(directory: Path, pictures: Iterable[tuple[np.ndarray, dict]], resolution: int) -> int:
    """Writes uint8 (R, R, 3) pictures one by one, each with a JSON object about it, into an existing directory.

    Returns how many. The index comes last.
    """
    items = []
    with open(directory / "pictures.bin", "wb") as file:
        for pixels, item in pictures:
            assert pixels.dtype == np.uint8 and pixels.shape == (resolution, resolution, 3)
            file.write(np.ascontiguousarray(pixels).data)
            items.append(item)
    index = {"format": Pictures.FORMAT, "resolution": resolution, "items": items}
    (directory / Pictures.INDEX).write_text(json.dumps(index), encoding="utf-8")
    return len(items)


class Pictures:
    """Reads what write_pictures wrote: `pixels` uint8 (n, R, R, 3), memory-mapped, and `items`, n JSON objects.

    Raises UserError for a directory that is not one or is not whole.
    """

    FORMAT, INDEX = "a folder of prepared pictures", "pictures.json"

    def __init__(self, directory: Path):
        index = read_index(directory, self.INDEX, self.FORMAT)
        self.resolution, self.items = index["resolution"], index["items"]
        shape = len(self.items), self.resolution, self.resolution, 3
        self.pixels = map_file(Path(directory) / "pictures.bin", "u1", shape)


# ---------------------------------------------------------------------------------------------------------------------
# Token shards


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
    def lengths(self) -> np.ndarray:
        """Ids of each document, (n,) int64."""
        return np.diff(self.offsets).astype(np.int64)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        shard = int(np.searchsorted(self.firsts, i, side="right")) - 1
        start, end = (int(self.offsets[j] - self.offsets[self.firsts[shard]]) for j in (i, i + 1))
        return self.shards[shard][start:end]


# ---------------------------------------------------------------------------------------------------------------------
# The loader


class Loader:
    """Batches of packed rows, each a pure function of (seed, step): to resume is to ask for the next step.

    Documents are shuffled and packed once; every epoch shows each row once, in its own order. Documents longer than a
    row are left out: `n_too_long` of them. Raises UserError if that leaves none.
    """

    def __init__(self, shards: Shards, batch_size: int, seq_len: int, seed: int, pad: int):
        self.shards, self.batch_size, self.seq_len, self.seed, self.pad = shards, batch_size, seq_len, seed, pad
        lengths = shards.lengths
        short = np.flatnonzero(lengths <= seq_len)
        self.n_too_long = len(lengths) - len(short)
        if not len(short):
            raise UserError(f"none of the {len(lengths):,} documents fits in a row of {seq_len} ids: raise seq_len")
        short = short[np.random.default_rng(seed).permutation(len(short))]
        rows = assign_rows(lengths[short], seq_len)
        self.docs = short[np.argsort(rows, kind="stable")]  # documents, row by row
        self.edges = np.concatenate([[0], np.cumsum(np.bincount(rows))])  # where in `docs` each row begins

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""
        return len(self.edges) - 1

    def rows(self, step: int) -> list[int]:
        """Numbers of the rows in batch `step`."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(permutation(self.n_rows, self.seed, p // self.n_rows)[p % self.n_rows]) for p in places]

    def documents(self, step: int) -> list[list[int]]:
        """For each row of batch `step` the numbers of its documents."""
        return [self.docs[self.edges[row] : self.edges[row + 1]].tolist() for row in self.rows(step)]

    def batch(self, step: int) -> Batch:
        return fill([[self.shards[i] for i in docs] for docs in self.documents(step)], self.seq_len, self.pad)
