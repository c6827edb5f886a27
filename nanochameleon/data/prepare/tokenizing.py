"""Tokenizes units into shards, on as many processes as there are, which agree through files alone.

    NAME/plan.json                                    the units, and all that decides their ids
    NAME/shard-00007.bin, unit-00007.json             a unit's ids; then their lengths and what was skipped
    NAME/offsets.bin, checksums.bin, skipped.jsonl    when every unit is there, by whoever comes last
    NAME/index.json                                   then these are token shards (data/shards.py), and unit-*.json go

Each file appears at once. So a killed process costs the unit it was at, and what comes out does not depend on how many
there were: a unit's ids are a function of the plan alone, its images are encoded in batches of its own.
"""

import json
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanochameleon.data import RawDocument, RawImage, Shards, fuse
from nanochameleon.data.index import read_index, write_index
from nanochameleon.data.prepare.units import Item, Loose, Unit, items
from nanochameleon.data.reading import SKIPPED, Bad, File, as_line, first_few, reasons
from nanochameleon.data.shards import write_shards_index
from nanochameleon.documents import Document, EndOfTurn, Image, Text, render_segment
from nanochameleon.errors import UserError
from nanochameleon.files import atomic_open, write_file
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.checkpoint import sweep

IN_A_ROW = 100  # bad items after which something else is wrong
DOCUMENTS = 256  # of a batch at most
PIXELS = 2**24  # of a batch, about
WAITING = 2**28  # bytes of images that wait for a decoder, about
OUTCOME = "the outcome of a unit"
TOTALS = ("documents", "ids", "pictures", "cut", "mended", "skipped")  # in index.json
CHARACTERS = 64  # of a text that are looked at for each id that it may have


@dataclass(frozen=True)
class Job:
    """What is to become of all units. most: ids of a document at most."""

    directory: Path
    form: str
    most: int
    seed: int
    text: TextTokenizer
    image_tokenizer: ImageTokenizer
    digest: str  # of the tokenizers
    units: Sequence[Unit]
    left: Sequence[Bad] = ()  # what lies in the sources and is in no unit: listed last

    @property
    def resolution(self) -> int:
        return self.image_tokenizer.vqgan.cfg.resolution

    @property
    def batch(self) -> int:
        """Images, or documents without any, that are encoded together."""
        return max(8, min(DOCUMENTS, PIXELS // self.resolution**2))

    def shard(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.bin"

    def outcome(self, number: int) -> Path:
        return self.directory / f"unit-{number:05d}.json"

    def plan(self) -> bytes:
        units = [[unit.name, unit.start, unit.end] for unit in self.units]
        head = {"form": self.form, "seq_len": self.most, "seed": self.seed, "tokenizers": self.digest}
        return (json.dumps(head | {"units": units}, indent=1) + "\n").encode()


@dataclass
class Outcome:
    """Of one unit."""

    lengths: list[int] = field(default_factory=list)  # ids of each document
    checksums: list[int] = field(default_factory=list)
    images: int = 0
    cut: int = 0  # documents of which something was left out
    mended: int = 0  # documents with bytes that were no UTF-8
    skipped: list[Bad] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# A unit


def decode(item: Loose, resolution: int) -> RawDocument | Bad:
    try:
        return [RawImage(s.pixels(resolution)) if isinstance(s, File) else s for s in item.doc]
    except UserError as error:
        return Bad(item.where, "unreadable images", str(error))


def decoded(
    found: Iterator[tuple[Item, int]], job: Job, pool: ThreadPoolExecutor
) -> Iterator[tuple[Item, RawDocument | Bad, int]]:
    """Items in order with their images decoded by the pool, which works ahead; and the bytes read so far."""
    waiting: deque[tuple[Item, Future, int, int]] = deque()
    size = 0

    def first():
        nonlocal size
        item, future, end, own = waiting.popleft()
        size -= own
        return item, future.result(), end

    for item, end in found:
        if isinstance(item, Bad) or not any(isinstance(s, File) for s in item.doc):
            future = Future()
            future.set_result(item if isinstance(item, Bad) else item.doc)
            own = 0
        else:
            future = pool.submit(decode, item, job.resolution)
            own = sum(len(s.data or b"") for s in item.doc if isinstance(s, File))
        waiting.append((item, future, end, own))
        size += own
        while len(waiting) > 2 * job.batch or size > WAITING:
            yield first()
    while waiting:
        yield first()


Found = Iterator[tuple[Loose, RawDocument]]


def good(unit: Unit, job: Job, outcome: Outcome, pool: ThreadPoolExecutor, bar: tqdm) -> Found:
    """Items that can be used, and their documents; notes the rest. Raises UserError after IN_A_ROW bad ones."""
    before, in_a_row = bar.n, 0
    for item, doc, end in decoded(items(unit, job.form), job, pool):
        bar.update(before + end - bar.n)
        if isinstance(doc, Bad):
            outcome.skipped.append(doc)
            in_a_row += 1
            if in_a_row == IN_A_ROW:
                last = f"{doc.where}: {doc.reason}{', ' + doc.detail if doc.detail else ''}"
                raise UserError(f"{IN_A_ROW} items in a row cannot be used, the last one {last}; look at {unit.path}")
            continue
        in_a_row = 0
        yield item, doc
    bar.update(before + unit.end - unit.start - bar.n)


def arranged(docs: Found, number: int, job: Job) -> Found:
    """Pairs with either one first, half and half (paper section 2.2); captioned images by twos where interleaved."""
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


def batches(docs: Found, most: int) -> Iterator[list[tuple[Loose, RawDocument]]]:
    """Of about `most` images and at most DOCUMENTS documents."""
    batch, images = [], 0
    for item, doc in docs:
        batch.append((item, doc))
        images += sum(isinstance(s, RawImage) for s in doc)
        if images >= most or len(batch) == DOCUMENTS:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def tokenize(number: int, job: Job, pool: ThreadPoolExecutor, bar: tqdm) -> Outcome:
    """Writes a unit's shard and then its outcome."""
    outcome, shards = Outcome(), []
    docs = arranged(good(job.units[number], job, outcome, pool, bar), number, job)
    for batch in batches(docs, job.batch):
        for (item, _), doc in zip(batch, fuse([doc for _, doc in batch], job.image_tokenizer), strict=True):
            lists, was_cut = fit(doc, job)
            if not lists:
                outcome.skipped.append(Bad(item.where, "documents too long"))
                continue
            outcome.cut += was_cut or item.cut
            outcome.mended += item.mended
            outcome.images += sum(ids.count(job.text.vocab.boi) for ids in lists)
            shards += [np.array(ids, "<u2") for ids in lists]
    outcome.lengths, outcome.checksums = list(map(len, shards)), list(map(zlib.crc32, shards))
    write_file(job.shard(number), np.concatenate(shards or [np.empty(0, "<u2")]).tobytes())
    write_index(job.directory, job.outcome(number).name, OUTCOME, asdict(outcome))
    return outcome


def read_outcome(job: Job, number: int) -> Outcome | None:
    """Of a unit that is done; None where the unit is to be done, or done again since its outcome is damaged."""
    try:
        content = read_index(job.directory, job.outcome(number).name, OUTCOME)
        found = {field.name: content[field.name] for field in fields(Outcome)}
    except (UserError, KeyError):
        return None
    return Outcome(**found | {"skipped": [Bad(**bad) for bad in found["skipped"]]})


# ---------------------------------------------------------------------------------------------------------------------
# Documents that are too long


def fit(doc: Document, job: Job) -> tuple[list[list[int]], bool]:
    """-> documents of at most job.most ids, and whether something was left out; no image is ever cut.

    A text becomes several documents, none of it lost. The caption of an image loses its end, a conversation its last
    turns, another document what comes behind.
    """
    vocab, room = job.text.vocab, job.most - 2
    if job.form == "text":
        ids = job.text.encode(doc[0].text)
        return [[vocab.bos, *ids[i : i + room], vocab.eos] for i in range(0, len(ids), room)], False
    clipped = [clip(s, job.most) for s in doc]
    parts = [render_segment(s, job.text, vocab) for s in clipped]
    if sum(map(len, parts)) <= room:
        return [[vocab.bos, *(token for part in parts for token in part), vocab.eos]], clipped != doc
    if job.form == "chat":
        kept = whole_turns(doc, parts, room)
    else:
        kept = shortened_parts(doc, parts, room, captioned=job.form in ("pairs", "drawings"))
    return [[vocab.bos, *kept, vocab.eos]] if kept else [], bool(kept)


def clip(segment, most: int):
    """A text beyond all measure is cut before its words are looked for."""
    return Text(segment.text[: CHARACTERS * most]) if isinstance(segment, Text) else segment


def whole_turns(doc: Document, parts: list[list[int]], room: int) -> list[int]:
    """As many first pairs of prompt and answer as fit."""
    kept, ids, turns = [], [], 0
    for segment, part in zip([*doc, EndOfTurn()], [*parts, []], strict=True):
        if isinstance(segment, EndOfTurn):
            turns += 1
            if turns % 2 == 0 and len(ids) <= room:
                kept = list(ids)
        ids += part
    return kept


def shortened_parts(doc: Document, parts: list[list[int]], room: int, captioned: bool) -> list[int]:
    """Up to the first image that does not fit, the last text shortened; a caption leaves room for its image."""
    ids: list[int] = []
    reserved = sum(len(part) for s, part in zip(doc, parts, strict=True) if isinstance(s, Image)) if captioned else 0
    for segment, part in zip(doc, parts, strict=True):
        if isinstance(segment, Image):
            if len(ids) + len(part) > room:
                break
            reserved = 0 if captioned else reserved
            ids += part
        else:
            ids += part[: max(0, room - reserved - len(ids))]
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# All units


def begin(job: Job) -> bool:
    """Writes the plan, or finds it there; True if all is done. Raises UserError where another one is there."""
    plan, finished = job.directory / "plan.json", (job.directory / Shards.INDEX).exists()
    job.directory.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in job.directory.iterdir() if not path.name.startswith(".tmp-")}
    if names and plan.name not in names:
        raise UserError(f"{job.directory} was not written by this: choose another --name")
    if not plan.exists():
        write_file(plan, job.plan())
    elif plan.read_bytes() != job.plan():
        why = "was begun with other sources or options, or its sources have changed"
        raise UserError(f"{job.directory} {why}: delete it, or choose another --name")
    return finished


def run(job: Job, rank: int, world: int, threads: int, quiet: bool = False) -> str:
    """Prepares units rank, rank + world, ... that are not there; whoever finds all there finishes. -> what was done.

    quiet: without a bar. Raises UserError for too many bad items, and where all are bad.
    """
    if begin(job):
        return f"{job.directory} is prepared already"
    mine = range(rank, len(job.units), world)
    todo = [number for number in mine if not read_outcome(job, number)]
    size, left = (sum(job.units[n].end - job.units[n].start for n in numbers) for numbers in (mine, todo))
    shown = dict(total=size, initial=size - left, unit="B", unit_scale=True, disable=quiet or rank > 0)
    # Pillow warns of broken metadata; the switch for that is one for all threads, so it is thrown here
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool, tqdm(desc="preparing", **shown) as bar:
        warnings.simplefilter("ignore")
        for number in todo:
            tokenize(number, job, pool, bar)
    try:
        if all(job.outcome(number).exists() for number in range(len(job.units))):
            return finish(job)
    except FileNotFoundError:  # taken away by another process that has finished
        if not (job.directory / Shards.INDEX).exists():
            raise
    if (job.directory / Shards.INDEX).exists():
        return f"{job.directory} is prepared"
    return f"{len(mine)} units of {job.directory} are prepared; other processes are at the rest"


def finish(job: Job) -> str:
    """Joins what the units came to, one after another. Raises UserError where nothing can be used."""
    totals, counts, per_shard, first = Counter(), Counter(), [], []
    with (
        atomic_open(job.directory / Shards.OFFSETS) as offsets,
        atomic_open(job.directory / Shards.CHECKSUMS) as checksums,
        atomic_open(job.directory / SKIPPED) as listed,
    ):
        offsets.write(bytes(8))
        for number in range(len(job.units)):
            outcome = read_outcome(job, number)
            if outcome is None:
                raise FileNotFoundError(f"{job.outcome(number)} is gone or damaged")
            offsets.write((totals["ids"] + np.cumsum(outcome.lengths, dtype=np.int64)).astype("<u8").tobytes())
            checksums.write(np.array(outcome.checksums, "<u4").tobytes())
            listed.writelines(map(as_line, outcome.skipped))
            counts.update(bad.reason for bad in outcome.skipped)
            first = (first + outcome.skipped)[:3]
            per_shard.append(len(outcome.lengths))
            totals += Counter(documents=per_shard[-1], ids=sum(outcome.lengths), pictures=outcome.images)
            totals += Counter(cut=outcome.cut, mended=outcome.mended, skipped=len(outcome.skipped))
        listed.writelines(map(as_line, job.left))
        counts.update(bad.reason for bad in job.left)
        totals["skipped"] += len(job.left)
        if not totals["documents"]:
            why = first_few([*first, *job.left]) or "the sources are empty"
            raise UserError(f"nothing of {job.directory} can be used: {why}; delete it before you try others")
    index = {"documents_per_shard": per_shard, "form": job.form, "seq_len": job.most, "tokenizers": job.digest}
    write_shards_index(job.directory, index | {name: totals[name] for name in TOTALS})
    for number in range(len(job.units)):
        with suppress(FileNotFoundError):
            job.outcome(number).unlink()
    sweep(job.directory)
    return said(job, totals, counts)


def said(job: Job, totals: Counter[str], counts: Counter[str]) -> str:
    ids = f"{totals['documents']:,} documents of {totals['ids']:,} ids with {totals['pictures']:,} images"
    for name, what in (("cut", "cut to fit"), ("mended", "with bytes that were no UTF-8")):
        ids += f"; {totals[name]:,} {what}" if totals[name] else ""
    ids += f"; {reasons(counts)}; listed in {job.directory / SKIPPED}" if counts else ""
    return f"{job.directory}: {ids}"
