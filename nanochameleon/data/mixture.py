"""Several sources in fixed fractions: which one gives item i is a pure function of (seed, i), with no state to save."""

import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

import numpy as np

from nanochameleon.data.forms import RawDocument, Source
from nanochameleon.errors import UserError

BLOCK = 1_000  # successive items of which every source gives exactly its fraction


@lru_cache(maxsize=16)
def permutation(n: int, *seed: int) -> np.ndarray:
    """0..n-1 in an order that the seed decides."""
    order = np.random.default_rng(seed).permutation(n)
    order.flags.writeable = False  # all callers share it
    return order


def name_seed(name: str) -> int:
    """A seed for a source that depends on its name alone, not on the other sources."""
    return zlib.crc32(name.encode())


class Fractions:
    """Which of several sources gives item i. Of each BLOCK successive items every source gives exactly its fraction, in
    a shuffled order; so the number of items that a source gave before i is known without counting.

    Raises UserError for a weight that is not positive, or a fraction below 1/BLOCK.
    """

    def __init__(self, weights: dict[str, float], seed: int, stage: int = 0):
        self.names, self.seed, self.stage = list(weights), seed, stage
        numbers = np.array(list(weights.values()), float)
        if not len(numbers) or not np.isfinite(numbers).all() or numbers.min() <= 0:
            raise UserError(f"a mixture needs sources with weights above 0, not {weights}")
        bounds = np.round(np.cumsum(numbers) / numbers.sum() * BLOCK).astype(int)
        self.per_block = np.diff(bounds, prepend=0)
        if self.per_block.min() == 0:
            rare = self.names[int(self.per_block.argmin())]
            raise UserError(f"source {rare!r} has less than 1/{BLOCK} of the mixture: raise its weight or drop it")

    def block(self, number: int) -> np.ndarray:
        """(BLOCK,) the source of each item of a block, by its number."""
        sources = np.repeat(np.arange(len(self.names)), self.per_block)
        return sources[permutation(BLOCK, self.seed, number, self.stage)]

    def draw(self, i: int) -> tuple[int, int]:
        """Number of the source that gives item i, and how many items that source gave before."""
        number, place = divmod(i, BLOCK)
        block = self.block(number)
        source = int(block[place])
        return source, number * int(self.per_block[source]) + int((block[:place] == source).sum())

    def given(self, n: int) -> dict[str, int]:
        """How many of items 0 .. n-1 each source gives."""
        number, place = divmod(n, BLOCK)
        rest = np.bincount(self.block(number)[:place], minlength=len(self.names))
        return dict(zip(self.names, (number * self.per_block + rest).tolist(), strict=True))


class Mixture:
    """Sources of raw documents in fixed fractions, itself an endless source: document i depends on (seed, i) alone.

    A finite source gives each of its items once before any comes again.
    """

    size = None

    def __init__(self, sources: dict[str, tuple[Source, float]], seed: int):
        self.seed = seed
        self.fractions = Fractions({name: weight for name, (_, weight) in sources.items()}, seed)
        self.names, self.sources = list(sources), [source for source, _ in sources.values()]

    def draw(self, i: int) -> tuple[int, int]:
        """Number of the source that gives document i, and the index to ask it for."""
        source, count = self.fractions.draw(i)
        return source, in_epochs(count, self.sources[source].size, self.seed, self.names[source])

    def document(self, i: int) -> RawDocument:
        source, index = self.draw(i)
        return self.sources[source].document(index)

    def captions(self, n: int) -> Iterator[str]:
        """About n texts, from each source its fraction."""
        for source, count in zip(self.sources, self.fractions.per_block, strict=True):
            yield from islice(source.captions(round(n * count / BLOCK)), round(n * count / BLOCK))


def in_epochs(count: int, size: int | None, seed: int, name: str) -> int:
    """The index to ask a source for, for its document number `count`.

    A finite source shows each item once an epoch, every epoch in another order. An endless source has no epochs.
    """
    if size is None:
        return count
    epoch, place = divmod(count, size)
    return epoch * size + int(permutation(size, seed, epoch, name_seed(name))[place])
