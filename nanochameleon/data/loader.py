"""From token shards to batches: documents packed into sequences, drawn from several sources in fractions by stage.

    Loader(...).batch(step)  ->  Batch (packing.py), tensors (B, T)

Every draw is a pure function of (seed, step). To resume is to ask for the next step, and ranks that share a batch ask
for different sequences of it. A sequence holds documents of one source, so fractions count sequences, hence tokens.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from nanochameleon.data.index import read_index, write_index
from nanochameleon.data.mixture import Fractions, name_seed
from nanochameleon.data.shards import Shards
from nanochameleon.errors import UserError, warn
from nanochameleon.files import atomic_open
from nanochameleon.packing import Batch, best_fit, collate

PACKED = "documents packed into sequences"


class Documents(Protocol):
    """Documents of known lengths: Shards, or OnTheFly, which makes them when they are asked for."""

    groups: Sequence[tuple[int, int]]  # ranges that are packed one by one, so that packing needs little memory

    def sizes(self, first: int, last: int) -> np.ndarray:
        """Tokens of documents first .. last-1, int64."""
        ...

    def fetch(self, numbers: Sequence[int]) -> list[np.ndarray]: ...


# ---------------------------------------------------------------------------------------------------------------------
# Sequences of one source


def shuffled(i: int, n: int, *seed: int) -> int:
    """Where item i of 0 .. n-1 comes in an order that the seed decides: one number of a permutation, without the rest.

    A Feistel network on the next even power of 2, repeated until it gives a number below n (cycle walking). So the
    order of 366 million sequences needs no array.
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
    """Pack documents first .. last-1 in a shuffled order. Returns their numbers, sequence by sequence, and each
    sequence's document count."""
    lengths = documents.sizes(first, last)
    short = np.flatnonzero(lengths <= seq_len)
    short = short[np.random.default_rng((seed, first)).permutation(len(short))]
    sequences = best_fit(lengths[short], seq_len)
    return (first + short[np.argsort(sequences, kind="stable")]).astype(np.uint32), np.bincount(sequences)


def pack_all(documents: Documents, seq_len: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents' numbers, sequence by sequence, and where each sequence begins, with the end.

    Documents longer than a sequence are left out.
    """
    packed = [pack_group(documents, first, last, seq_len, seed) for first, last in documents.groups]
    numbers, counts = (np.concatenate([np.zeros(0, np.uint32), *(part[i] for part in packed)]) for i in (0, 1))
    return numbers, np.concatenate([[0], np.cumsum(counts)])


def pack_once(folder: Path, documents: Documents, seq_len: int, seed: int) -> list[np.ndarray]:
    """pack_all, kept in two files next to the shards and memory-mapped, however many ranks read them."""
    stem = f"packed-{seq_len}-{seed}"
    names = [f"{stem}-{what}.npy" for what in ("documents", "starts")]
    if not is_packed(folder, f"{stem}.json", {*names, Shards.INDEX}):
        for name, array in zip(names, pack_all(documents, seq_len, seed), strict=True):
            with atomic_open(folder / name) as file:
                np.save(file, array)
        # the index has the shards' own index's checksum, too: other shards are packed again
        write_index(folder, f"{stem}.json", PACKED, {}, (*names, Shards.INDEX))
    return [np.load(folder / name, mmap_mode="r") for name in names]


def is_packed(folder: Path, index: str, names: set[str]) -> bool:
    """Whether packed sequences are there, undamaged and of these shards. Warns where they are damaged."""
    try:
        return (folder / index).exists() and read_index(folder, index, PACKED)["files"].keys() == names
    except UserError as error:
        warn(f"packing documents again: {str(error).partition(': delete')[0]}")
        return False


class PackedDocuments:
    """A source's documents packed into sequences; every epoch shows each sequence once, in another order.

    Raises UserError if no document fits in a sequence.
    """

    def __init__(self, name: str, documents: Documents, seq_len: int, seed: int, folder: Path | None = None):
        self.name, self.documents, self.seed = name, documents, seed
        packed = pack_all(documents, seq_len, seed) if folder is None else pack_once(folder, documents, seq_len, seed)
        self.numbers, self.starts = packed
        if not len(self):
            raise UserError(
                f"none of the documents of {name!r} fits in a sequence of {seq_len} tokens: raise train.seq_len"
            )
        self.n_too_long = documents.groups[-1][1] - len(self.numbers)  # left out

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sequence(self, count: int) -> list[int]:
        """The document numbers of the source's sequence number `count`: 0, 1, 2 and so on without end."""
        epoch, place = divmod(count, len(self))
        i = shuffled(place, len(self), self.seed, epoch, name_seed(self.name))
        return self.numbers[int(self.starts[i]) : int(self.starts[i + 1])].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Loader:
    """Batches of packed sequences, each a pure function of (seed, step).

    sources: packed documents by name. stages: (first step, weights of the sources), in order, the first at step 0.
    assistant_eot: the end-of-turn token, where only answers are learnt (packing.collate).
    """

    def __init__(
        self, sources: dict[str, PackedDocuments], stages: Sequence[tuple[int, dict[str, float]]], batch_size: int,
        seq_len: int, seed: int, pad: int, assistant_eot: int | None = None,
    ):  # fmt: skip
        self.sources, self.batch_size, self.seq_len, self.pad = sources, batch_size, seq_len, pad
        self.assistant_eot = assistant_eot
        self.firsts = [first * batch_size for first, _ in stages]  # first sequence of each stage
        self.fractions = [Fractions(weights, seed, stage) for stage, (_, weights) in enumerate(stages)]
        self.before = [dict.fromkeys(sources, 0)]  # sequences that each source has given before each stage
        for number, first in enumerate(self.firsts[1:]):
            given = self.fractions[number].given(first - self.firsts[number])
            self.before.append({name: n + given.get(name, 0) for name, n in self.before[-1].items()})

    def place(self, i: int) -> tuple[str, int]:
        """Sequence i of the whole training -> its source, and how many sequences that source gave before."""
        stage = bisect_right(self.firsts, i) - 1
        fractions = self.fractions[stage]
        source, count = fractions.draw(i - self.firsts[stage])
        name = fractions.names[source]
        return name, self.before[stage][name] + count

    def sequences(self, step: int, which: slice = slice(None)) -> Iterator[tuple[str, list[int]]]:
        """For each sequence of batch `step`, or some of them: its source and the numbers of its documents there."""
        for i in range(step * self.batch_size, (step + 1) * self.batch_size)[which]:
            name, count = self.place(i)
            yield name, self.sources[name].sequence(count)

    def batch(self, step: int, which: slice = slice(None)) -> Batch:
        """Batch `step`, or some of its sequences: tensors (B, T)."""
        # 1. Which documents; each source is asked once for all of them.
        sequences = list(self.sequences(step, which))
        wanted: dict[str, list[int]] = {}
        for name, numbers in sequences:
            wanted.setdefault(name, []).extend(numbers)
        docs = {name: iter(self.sources[name].documents.fetch(numbers)) for name, numbers in wanted.items()}
        # 2. Back into sequences.
        filled = [list(islice(docs[name], len(numbers))) for name, numbers in sequences]
        return collate(filled, self.seq_len, self.pad, self.assistant_eot)
