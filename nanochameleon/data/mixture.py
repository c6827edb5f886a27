"""Several sources in fixed shares: which one gives item i is a pure function of (seed, i), with no state to save."""

import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

import numpy as np

from nanochameleon.data.forms import RawDocument, Source
from nanochameleon.errors import UserError

BLOCK = 1_000  # items in a row of which every source gives exactly its share


@lru_cache(maxsize=16)
def permutation(n: int, *seed: int) -> np.ndarray:
    """0..n-1 in an order that the seed decides."""
    order = np.random.default_rng(seed).permutation(n)
    order.flags.writeable = False  # it is shared by all callers
    return order


def seed_of(name: str) -> int:
    """A number of one's own for a source, whatever other sources there are."""
    return zlib.crc32(name.encode())


class Shares:
    """Which of several sources gives item i: of each BLOCK items in a row every source gives exactly its share, in a
    drawn order; so how many a source has given before i needs no counting.

    Raises UserError for a share that is not positive or smaller than one in BLOCK.
    """

    def __init__(self, weights: dict[str, float], seed: int, stage: int = 0):
        self.names, self.seed, self.stage = list(weights), seed, stage
        numbers = np.array(list(weights.values()), float)
        if not len(numbers) or not np.isfinite(numbers).all() or numbers.min() <= 0:
            raise UserError(f"a mixture needs sources with weights above 0, not {weights}")
        edges = np.round(np.cumsum(numbers) / numbers.sum() * BLOCK).astype(int)
        self.per_block = np.diff(edges, prepend=0)
        if self.per_block.min() == 0:
            rare = self.names[int(self.per_block.argmin())]
            raise UserError(f"source {rare!r} has less than 1/{BLOCK} of the mixture: raise its weight or drop it")

    def slots(self, block: int) -> np.ndarray:
        """(BLOCK,) number of the source of each item."""
        return np.repeat(np.arange(len(self.names)), self.per_block)[permutation(BLOCK, self.seed, block, self.stage)]

    def draw(self, i: int) -> tuple[int, int]:
        """Number of the source that gives item i, and how many it has given before."""
        block, place = divmod(i, BLOCK)
        slots = self.slots(block)
        which = int(slots[place])
        return which, block * int(self.per_block[which]) + int((slots[:place] == which).sum())

    def given(self, n: int) -> dict[str, int]:
        """How many of items 0 .. n-1 each source gives."""
        block, place = divmod(n, BLOCK)
        rest = np.bincount(self.slots(block)[:place], minlength=len(self.names))
        return dict(zip(self.names, (block * self.per_block + rest).tolist(), strict=True))


class Mixture:
    """Sources of raw documents in fixed shares, itself an endless source: document i is a pure function of (seed, i).

    A finite source gives each of its items once before any comes again.
    """

    size = None

    def __init__(self, sources: dict[str, tuple[Source, float]], seed: int):
        self.seed = seed
        self.shares = Shares({name: weight for name, (_, weight) in sources.items()}, seed)
        self.names, self.sources = list(sources), [source for source, _ in sources.values()]

    def draw(self, i: int) -> tuple[int, int]:
        """Number of the source that gives document i, and the index to ask it for."""
        which, count = self.shares.draw(i)
        return which, in_epochs(count, self.sources[which].size, self.seed, self.names[which])

    def document(self, i: int) -> RawDocument:
        which, index = self.draw(i)
        return self.sources[which].document(index)

    def captions(self, n: int) -> Iterator[str]:
        """About n texts, from each source its share."""
        for source, count in zip(self.sources, self.shares.per_block, strict=True):
            yield from islice(source.captions(round(n * count / BLOCK)), round(n * count / BLOCK))


def in_epochs(count: int, size: int | None, seed: int, name: str) -> int:
    """What a source is asked for as its document number `count`: a finite one shows each item once an epoch, in a new
    order each time."""
    if size is None:
        return count
    epoch, place = divmod(count, size)
    return epoch * size + int(permutation(size, seed, epoch, seed_of(name))[place])
