"""From token shards to batches: documents packed into rows, rows drawn from several sources in shares that may change.

    Loader(...).batch(step)  ->  Batch

Every draw is a pure function of (seed, step): to resume is to ask for the next step, and ranks that share a batch ask
for different rows of it. A row holds documents of one source, so that shares are shares of rows, hence of ids.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from nanochameleon.data.index import read_index, write_index
from nanochameleon.data.mixture import Shares, seed_of
from nanochameleon.data.shards import Shards
from nanochameleon.errors import UserError, warn
from nanochameleon.files import atomic_open
from nanochameleon.packing import Batch, best_fit, collate

ROWS = "rows of documents"


class Documents(Protocol):
    """Documents of ids with known lengths: Shards, or live.py's, which are made when they are asked for."""

    groups: Sequence[tuple[int, int]]  # stretches that are packed on their own, so that none needs much memory

    def sizes(self, first: int, last: int) -> np.ndarray:
        """Ids of documents first .. last-1, int64."""
        ...

    def fetch(self, numbers: Sequence[int]) -> list[np.ndarray]: ...


# ---------------------------------------------------------------------------------------------------------------------
# Rows of one source


def shuffled(i: int, n: int, *seed: int) -> int:
    """Where item i of 0 .. n-1 comes in an order that the seed decides: one number of a permutation, without the rest.

    A Feistel network on the next even power of 2, walked until it lands below n; 366 million rows need no array.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = np.random.SeedSequence(seed).generate_state(8).tolist()
    while True:
        left, right = i >> half, i & mask
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B1 & 0xFFFFFFFF
            mixed = (mixed ^ mixed >> 15) * 0x85EBCA77 & 0xFFFFFFFF
            left, right = right, left ^ (mixed ^ mixed >> 13) & mask
        i = left << half | right
        if i < n:
            return i


def pack_group(documents: Documents, first: int, last: int, seq_len: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents first .. last-1 in a drawn order -> their numbers row by row, and how many each row has."""
    lengths = documents.sizes(first, last)
    short = np.flatnonzero(lengths <= seq_len)
    short = short[np.random.default_rng((seed, first)).permutation(len(short))]
    rows = best_fit(lengths[short], seq_len)
    return (first + short[np.argsort(rows, kind="stable")]).astype(np.uint32), np.bincount(rows)


def pack_all(documents: Documents, seq_len: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents' numbers row by row, and where each row begins, with the end. Those longer than a row are left out."""
    packed = [pack_group(documents, first, last, seq_len, seed) for first, last in documents.groups]
    numbers, counts = (np.concatenate([np.zeros(0, np.uint32), *(part[i] for part in packed)]) for i in (0, 1))
    return numbers, np.concatenate([[0], np.cumsum(counts)])


def kept(folder: Path, documents: Documents, seq_len: int, seed: int) -> list[np.ndarray]:
    """pack_all, done once: its two arrays lie beside the shards and are mapped, however many ranks read them."""
    stem = f"rows-{seq_len}-{seed}"
    names = [f"{stem}-{what}.npy" for what in ("documents", "edges")]
    if not whole(folder, f"{stem}.json", {*names, Shards.INDEX}):
        for name, array in zip(names, pack_all(documents, seq_len, seed), strict=True):
            with atomic_open(folder / name) as file:
                np.save(file, array)
        write_index(folder, f"{stem}.json", ROWS, {}, (*names, Shards.INDEX))
    return [np.load(folder / name, mmap_mode="r") for name in names]


def whole(folder: Path, index: str, names: set[str]) -> bool:
    """Whether packed rows are there, as they were written and of these shards. Others are made again, with a warning
    where they are damaged."""
    try:
        return (folder / index).exists() and read_index(folder, index, ROWS)["files"].keys() == names
    except UserError as error:
        warn(f"packing rows again: {str(error).partition(': delete')[0]}")
        return False


class Rows:
    """A source's documents packed into rows; every epoch shows each row once, in an order of its own.

    Raises UserError if no document fits in a row.
    """

    def __init__(self, name: str, documents: Documents, seq_len: int, seed: int, folder: Path | None = None):
        self.name, self.all, self.seed = name, documents, seed
        packed = pack_all(documents, seq_len, seed) if folder is None else kept(folder, documents, seq_len, seed)
        self.numbers, self.edges = packed
        if not len(self):
            raise UserError(f"none of the documents of {name!r} fits in a row of {seq_len} ids: raise train.seq_len")
        self.n_too_long = documents.groups[-1][1] - len(self.numbers)  # left out

    def __len__(self) -> int:
        return len(self.edges) - 1

    def documents(self, count: int) -> list[int]:
        """The numbers of the documents of the source's row number `count`, 0, 1, 2 and so on without end."""
        epoch, place = divmod(count, len(self))
        row = shuffled(place, len(self), self.seed, epoch, seed_of(self.name))
        return self.numbers[int(self.edges[row]) : int(self.edges[row + 1])].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Loader:
    """Batches of rows, each a pure function of (seed, step).

    rows: by source. stages: (first step, weights of the sources), in order, the first at step 0. assistant_eot: the end
    of turn where only answers are learnt (packing.fill).
    """

    def __init__(
        self, rows: dict[str, Rows], stages: Sequence[tuple[int, dict[str, float]]], batch_size: int, seq_len: int,
        seed: int, pad: int, assistant_eot: int | None = None,
    ):  # fmt: skip
        self.rows, self.batch_size, self.seq_len, self.pad = rows, batch_size, seq_len, pad
        self.assistant_eot = assistant_eot
        self.firsts = [first * batch_size for first, _ in stages]  # first row of each stage
        self.shares = [Shares(weights, seed, stage) for stage, (_, weights) in enumerate(stages)]
        self.before = [dict.fromkeys(rows, 0)]  # rows that each source has given before each stage
        for number, first in enumerate(self.firsts[1:]):
            given = self.shares[number].given(first - self.firsts[number])
            self.before.append({name: n + given.get(name, 0) for name, n in self.before[-1].items()})

    def place(self, row: int) -> tuple[str, int]:
        """Row `row` of the whole training, 0, 1, 2 and so on -> its source, and that source's count of rows before."""
        stage = bisect_right(self.firsts, row) - 1
        shares = self.shares[stage]
        which, count = shares.draw(row - self.firsts[stage])
        name = shares.names[which]
        return name, self.before[stage][name] + count

    def numbers(self, step: int, which: slice = slice(None)) -> Iterator[tuple[str, list[int]]]:
        """For each row of batch `step`, or for some of them: its source and the numbers of its documents there."""
        for row in range(step * self.batch_size, (step + 1) * self.batch_size)[which]:
            name, count = self.place(row)
            yield name, self.rows[name].documents(count)

    def batch(self, step: int, which: slice = slice(None)) -> Batch:
        """Batch `step`, or some of its rows; each source is asked once for all its documents."""
        rows = list(self.numbers(step, which))
        wanted: dict[str, list[int]] = {}
        for name, numbers in rows:
            wanted.setdefault(name, []).extend(numbers)
        docs = {name: iter(self.rows[name].all.fetch(numbers)) for name, numbers in wanted.items()}
        filled = [list(islice(docs[name], len(numbers))) for name, numbers in rows]
        return collate(filled, self.seq_len, self.pad, self.assistant_eot)
