"""Tokenizes units into shards, on any number of processes, which agree through files alone.

    NAME/plan.json                                    the units, and all that decides their tokens
    NAME/shard-00007.bin, unit-00007.json             a unit's tokens; then their lengths and what was skipped
    NAME/offsets.bin, checksums.bin, skipped.jsonl    when every unit is done, written by the process that finds it so
    NAME/index.json                                   then these are token shards (data/shards.py), and unit-*.json go

Each file appears at once, so a kill costs a process the unit it was working on. The output does not depend on the
number of processes: a unit's tokens are a function of the plan alone, and its images are encoded in own batches.
"""

import json
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanochameleon.data import RawDocument, RawImage, Shards, fuse
from nanochameleon.data.index import read_index, write_index
from nanochameleon.data.prepare.fit import fit
from nanochameleon.data.reading import SKIPPED, Bad, ImageFile, Item, RawItem, as_line, first_few, reasons
from nanochameleon.data.shards import shard_name, write_offsets, write_shard, write_shards_index
from nanochameleon.data.sources.units import Unit, items
from nanochameleon.errors import UserError
from nanochameleon.files import atomic_open, write_file
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.checkpoint import sweep

MAX_BAD_IN_A_ROW = 100  # successive bad items that end the preparation: the source itself is wrong
DOCUMENTS = 256  # of a batch at most
PIXELS = 2**24  # of a batch, about
WAITING = 2**28  # bytes of images that wait to be decoded, about
RESULT = "the outcome of a unit"


@dataclass(frozen=True)
class PrepareJob:
    """All units and what they are to become: documents of at most max_tokens tokens."""

    directory: Path
    form: str
    max_tokens: int
    seed: int
    text: TextTokenizer
    image_tokenizer: ImageTokenizer
    digest: str  # of the tokenizers
    units: Sequence[Unit]
    unread: Sequence[Bad] = ()  # files of the sources that are in no unit: listed last

    @property
    def resolution(self) -> int:
        return self.image_tokenizer.vqgan.cfg.resolution

    @property
    def batch_size(self) -> int:
        """Images, or documents without any, that are encoded together."""
        return max(8, min(DOCUMENTS, PIXELS // self.resolution**2))

    def result(self, number: int) -> Path:
        return self.directory / f"unit-{number:05d}.json"

    def plan(self) -> bytes:
        units = [[unit.name, unit.start, unit.end] for unit in self.units]
        head = {"form": self.form, "seq_len": self.max_tokens, "seed": self.seed, "tokenizers": self.digest}
        return (json.dumps(head | {"units": units}, indent=1) + "\n").encode()


@dataclass
class UnitResult:
    """What one unit became."""

    lengths: list[int] = field(default_factory=list)  # tokens of each document
    checksums: list[int] = field(default_factory=list)
    images: int = 0
    cut: int = 0  # documents of which something was left out
    mended: int = 0  # documents with bytes that are not UTF-8
    skipped: list[Bad] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# A unit


def decode(item: RawItem, resolution: int) -> RawDocument | Bad:
    """The item's document, with its images decoded."""
    try:
        return [RawImage(s.pixels(resolution)) if isinstance(s, ImageFile) else s for s in item.doc]
    except UserError as error:
        return Bad(item.where, "unreadable images", str(error))


def decode_ahead(
    found: Iterator[tuple[Item, int]], job: PrepareJob, pool: ThreadPoolExecutor
) -> Iterator[tuple[Item, RawDocument | Bad, int]]:
    """Yield items in order with their images decoded by the pool, which works ahead; and the bytes read so far."""
    waiting: deque[tuple[Item, Future, int, int]] = deque()
    size = 0

    def first():
        nonlocal size
        item, future, end, own = waiting.popleft()
        size -= own
        return item, future.result(), end

    for item, end in found:
        if isinstance(item, Bad) or not any(isinstance(s, ImageFile) for s in item.doc):
            future = Future()
            future.set_result(item if isinstance(item, Bad) else item.doc)
            own = 0
        else:
            future = pool.submit(decode, item, job.resolution)
            own = sum(len(s.data or b"") for s in item.doc if isinstance(s, ImageFile))
        waiting.append((item, future, end, own))
        size += own
        while len(waiting) > 2 * job.batch_size or size > WAITING:
            yield first()
    while waiting:
        yield first()


Found = Iterator[tuple[RawItem, RawDocument]]


def usable(unit: Unit, job: PrepareJob, result: UnitResult, pool: ThreadPoolExecutor, bar: tqdm) -> Found:
    """Yield items that can be used with their documents; note the rest. Raises UserError after MAX_BAD_IN_A_ROW."""
    before, in_a_row = bar.n, 0
    for item, doc, end in decode_ahead(items(unit, job.form), job, pool):
        bar.update(before + end - bar.n)
        if isinstance(doc, Bad):
            result.skipped.append(doc)
            in_a_row += 1
            if in_a_row == MAX_BAD_IN_A_ROW:
                last = f"{doc.where}: {doc.reason}{', ' + doc.detail if doc.detail else ''}"
                raise UserError(f"{in_a_row} items in a row cannot be used, the last one {last}; look at {unit.path}")
            continue
        in_a_row = 0
        yield item, doc
    bar.update(before + unit.end - unit.start - bar.n)


def arrange(docs: Found, number: int, job: PrepareJob) -> Found:
    """Pairs: either one first, half and half (paper section 2.2). Interleaved: captioned images two by two."""
    rng, first = np.random.default_rng((job.seed, number)), None
    for item, doc in docs:
        if job.form == "pairs":
            yield item, doc if rng.random() < 0.5 else doc[::-1]
        elif job.form != "interleaved" or not item.captioned:
            yield item, doc
        elif first:
            yield replace(item, where=first[0].where, cut=item.cut or first[0].cut), first[1] + doc
            first = None
        else:
            first = item, doc
    if first:
        yield first


def batches(docs: Found, n_images: int) -> Iterator[list[tuple[RawItem, RawDocument]]]:
    """Batches of about n_images images and at most DOCUMENTS documents."""
    batch, images = [], 0
    for item, doc in docs:
        batch.append((item, doc))
        images += sum(isinstance(s, RawImage) for s in doc)
        if images >= n_images or len(batch) == DOCUMENTS:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def tokenize(number: int, job: PrepareJob, pool: ThreadPoolExecutor, bar: tqdm) -> UnitResult:
    """Write a unit's shard, then its result."""
    result, tokenized = UnitResult(), []
    docs = arrange(usable(job.units[number], job, result, pool, bar), number, job)
    for batch in batches(docs, job.batch_size):
        for (item, _), doc in zip(batch, fuse([doc for _, doc in batch], job.image_tokenizer), strict=True):
            lists, was_cut = fit(doc, job.form, job.max_tokens, job.text)
            if not lists:
                result.skipped.append(Bad(item.where, "documents too long"))
                continue
            result.cut += was_cut or item.cut
            result.mended += item.mended
            result.images += sum(tokens.count(job.text.vocab.boi) for tokens in lists)
            tokenized += [np.array(tokens, "<u2") for tokens in lists]
    result.lengths, result.checksums = write_shard(job.directory / shard_name(number), tokenized)
    write_index(job.directory, job.result(number).name, RESULT, asdict(result))
    return result


def read_result(job: PrepareJob, number: int) -> UnitResult | None:
    """The result of a unit; None if the unit is still to be done, or its result is damaged."""
    try:
        content = read_index(job.directory, job.result(number).name, RESULT)
        found = {field.name: content[field.name] for field in fields(UnitResult)}
    except (UserError, KeyError):
        return None
    return UnitResult(**found | {"skipped": [Bad(**bad) for bad in found["skipped"]]})


# ---------------------------------------------------------------------------------------------------------------------
# All units


def write_plan(job: PrepareJob) -> bool:
    """Write the plan, unless it is there; True if all is done. Raises UserError if a different plan is there."""
    plan, finished = job.directory / "plan.json", (job.directory / Shards.INDEX).exists()
    job.directory.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in job.directory.iterdir() if not path.name.startswith(".tmp-")}
    if names and plan.name not in names:
        raise UserError(f"{job.directory} was not written by this program: choose another --name")
    if not plan.exists():
        write_file(plan, job.plan())
    elif plan.read_bytes() != job.plan():
        why = "was begun with other sources or options, or its sources have changed"
        raise UserError(f"{job.directory} {why}: delete it, or choose another --name")
    return finished


def run(job: PrepareJob, rank: int, world: int, threads: int, quiet: bool = False) -> str:
    """Prepare units rank, rank + world, ... that are not done; the process that finds all done finishes.

    quiet: without a progress bar. Returns a sentence about what was done. Raises UserError for too many bad items, and
    if nothing can be used.
    """
    if write_plan(job):
        return f"{job.directory} is prepared already"
    mine = range(rank, len(job.units), world)
    todo = [number for number in mine if not read_result(job, number)]
    size, left = (sum(job.units[n].end - job.units[n].start for n in numbers) for numbers in (mine, todo))
    shown = dict(total=size, initial=size - left, unit="B", unit_scale=True, disable=quiet or rank > 0)
    # Pillow warns of broken metadata. The filter is global to all threads, so it is set here and not in each of them.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool, tqdm(desc="preparing", **shown) as bar:
        warnings.simplefilter("ignore")
        for number in todo:
            tokenize(number, job, pool, bar)
    try:
        if all(job.result(number).exists() for number in range(len(job.units))):
            return finish(job)
    except FileNotFoundError:  # another process has finished and removed the results
        if not (job.directory / Shards.INDEX).exists():
            raise
    if (job.directory / Shards.INDEX).exists():
        return f"{job.directory} is prepared"
    return f"{len(mine)} units of {job.directory} are prepared; other processes are at the rest"


def finish(job: PrepareJob) -> str:
    """Join the units' results in order into token shards. Raises UserError if nothing can be used."""
    totals = Counter(dict.fromkeys(("documents", "tokens", "images", "cut", "mended", "skipped"), 0))
    counts, first = Counter(), []
    with atomic_open(job.directory / SKIPPED) as listed:

        def note(skipped: Sequence[Bad]) -> None:
            listed.writelines(map(as_line, skipped))
            counts.update(bad.reason for bad in skipped)
            first.extend(skipped[: 3 - len(first)])
            totals["skipped"] += len(skipped)

        def shards() -> Iterable[tuple[list[int], list[int]]]:
            for number in range(len(job.units)):
                result = read_result(job, number)
                if result is None:
                    raise FileNotFoundError(f"{job.result(number)} is gone or damaged")
                note(result.skipped)
                totals.update(documents=len(result.lengths), tokens=sum(result.lengths))
                totals.update(images=result.images, cut=result.cut, mended=result.mended)
                yield result.lengths, result.checksums

        per_shard = write_offsets(job.directory, shards())
        note(job.unread)
        if not totals["documents"]:
            why = first_few(first) or "the sources are empty"
            raise UserError(f"nothing of {job.directory} can be used: {why}; delete it before you try others")
    head = {"form": job.form, "seq_len": job.max_tokens, "tokenizers": job.digest}
    write_shards_index(job.directory, per_shard, head | dict(totals))
    for number in range(len(job.units)):
        with suppress(FileNotFoundError):
            job.result(number).unlink()
    sweep(job.directory)
    return summary(job, totals, counts)


def summary(job: PrepareJob, totals: Counter[str], counts: Counter[str]) -> str:
    text = f"{totals['documents']:,} documents of {totals['tokens']:,} tokens with {totals['images']:,} images"
    for name, what in (("cut", "cut to fit"), ("mended", "with bytes that are not UTF-8")):
        text += f"; {totals[name]:,} {what}" if totals[name] else ""
    text += f"; {reasons(counts)}; listed in {job.directory / SKIPPED}" if counts else ""
    return f"{job.directory}: {text}"
