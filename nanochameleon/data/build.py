"""From a configuration to training data: sources of raw documents, token shards, the loader.

The drawn worlds are endless and need no files. Emoji and folders are first stored as images (sources/emoji.py,
sources/folder.py). Prepared data has its shards already (prepared.py).
"""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from nanochameleon.config import DataConfig, RunConfig
from nanochameleon.data import (
    Loader,
    Mixture,
    OnTheFly,
    PackedDocuments,
    Shards,
    Source,
    fuse,
    in_epochs,
    stored_images,
    write_shards,
)  # fmt: skip
from nanochameleon.data.image_store import index_of
from nanochameleon.data.index import read_index
from nanochameleon.data.prepared import sources as prepared_sources
from nanochameleon.data.reading import SKIPPED
from nanochameleon.data.sources.alignment import CATEGORIES, AlignmentSource
from nanochameleon.data.sources.emoji import EmojiSource, prepare_emoji
from nanochameleon.data.sources.folder import FolderSource, prepare_folder
from nanochameleon.data.sources.scenes import World
from nanochameleon.data.sources.shapes import ShapesSource
from nanochameleon.documents import render
from nanochameleon.errors import Interrupted, UserError, say
from nanochameleon.files import write_file
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.run import TEXT_TOKENIZER
from nanochameleon.weights.tokenizer_json import to_json

CHUNK = 256  # documents whose images are encoded together


def world(data: DataConfig) -> World | None:
    """The shapes world of a configuration, None for real images."""
    return {"shapes": World(), "shapes_rich": World.rich()}.get(data.source)


def source_class(data: DataConfig) -> type[Source]:
    if world(data):
        return ShapesSource
    return EmojiSource if data.source == "emoji" else FolderSource


def check_sources(cfg: RunConfig) -> None:
    """Raise UserError for a name in a stage's weights that this data does not have."""
    prepared = cfg.data.source == "prepared"
    names = prepared_sources(cfg.data.path) if prepared else source_class(cfg.data).FORMS
    names = [*names, *CATEGORIES] if world(cfg.data) else names
    for number, stage in enumerate(cfg.stages):
        for name, _ in stage.weights:
            if name not in names:
                has = f"{cfg.data.path if prepared else cfg.data.source} has {', '.join(names) or 'nothing finished'}"
                raise UserError(f"stages.{number}.weights names {name!r}; {has}")


def store_images(cfg: RunConfig, folder: Path) -> None:
    """Store the images of emoji or of a folder in the run's folder, unless they are there; print what was skipped.

    Raises UserError where a split is empty: now, and not when the first images of the test split are drawn.
    """
    check_sources(cfg)
    if world(cfg.data) or cfg.data.source == "prepared":
        return
    stored = stored_images(folder)
    if not index_of(stored).exists():
        if cfg.data.source == "emoji":
            prepare_emoji(stored, cfg.vqgan.resolution)
        elif cfg.data.path is None:
            raise UserError("source folder needs --data.path, the folder with the images and their captions")
        else:
            report = prepare_folder(cfg.data.path, stored, cfg.vqgan.resolution)
            say(f"{report}; listed in {stored / SKIPPED}" if report.skipped else report)
    for split in ("train", "test"):
        open_sources(cfg, folder, split)("pairs")


def open_sources(cfg: RunConfig, folder: Path, split: str = "train") -> Callable[[str], Source]:
    """A function from a form of documents (data.FORMS), or a category of alignment, to their source.

    Raises UserError for a wrong resolution.
    """
    if shapes := world(cfg.data):
        if cfg.vqgan.resolution != shapes.resolution:
            raise UserError(
                f"{cfg.data.source} are drawn at {shapes.resolution} pixels: set --vqgan.resolution to that"
            )
        test = split == "test"
        return lambda form: (AlignmentSource if form in CATEGORIES else ShapesSource)(shapes, form, cfg.seed, test)
    opened = source_class(cfg.data)
    return lambda form: opened(stored_images(folder), split, cfg.seed, form)


def mixture(cfg: RunConfig, folder: Path, split: str = "train") -> Mixture:
    """Documents of all forms, each in its fraction over all stages."""
    source = open_sources(cfg, folder, split)
    return Mixture({form: (source(form), fraction) for form, fraction in cfg.mixture.items()}, cfg.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Documents of tokens


class InEpochs:
    """A source as an endless one: document i shows each item once before any comes again."""

    size = None

    def __init__(self, source: Source, seed: int, name: str):
        self.source, self.seed, self.name = source, seed, name

    def document(self, i: int):
        return self.source.document(in_epochs(i, self.source.size, self.seed, self.name))


def tokenize(
    docs: InEpochs,
    image_tokenizer: ImageTokenizer,
    tokenizer: TextTokenizer,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[list[int]]:
    """Yield documents 0, 1, 2, ... as tokens, without end; each image of a finite source is encoded once."""
    known = None if docs.source.size is None else {}
    start = 0
    while True:
        if stopped():
            raise Interrupted
        raw = [docs.document(i) for i in range(start, start + CHUNK)]
        for doc in fuse(raw, image_tokenizer, known):
            yield render(doc, tokenizer, tokenizer.vocab)
        start += CHUNK


def amounts(cfg: RunConfig) -> dict[str, tuple[int, int | None]]:
    """For each source: how many tokens the run reads of it, and how many documents it may have, if that is set."""
    total = cfg.train.steps * cfg.train.batch_size * cfg.train.seq_len
    requested = cfg.data.n_documents
    return {
        name: (
            round(fraction * total) + cfg.train.seq_len,
            None if requested is None else max(1, round(fraction * requested)),
        )
        for name, fraction in cfg.mixture.items()
    }


def write_tokens(
    cfg: RunConfig,
    image_tokenizer: ImageTokenizer,
    tokenizer: TextTokenizer,
    folder: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Write folder/data/SOURCE for each source, unless it is there: as many documents as the run reads, each once.

    `stopped` is called before every CHUNK of documents. When it returns True, that source is not written and
    Interrupted is raised.
    """
    if cfg.data.source == "prepared":
        return
    source, notes = open_sources(cfg, folder), {TEXT_TOKENIZER: tokenizer_checksum(tokenizer)}
    for name, (n_tokens, n_documents) in amounts(cfg).items():
        if not (folder / "data" / name).exists():
            docs = tokenize(InEpochs(source(name), cfg.seed, name), image_tokenizer, tokenizer, stopped)
            write_shards(folder / "data" / name, take(docs, n_tokens, n_documents, name), notes=notes)


def take(docs: Iterator[list[int]], n_tokens: int, n_documents: int | None, name: str) -> Iterator[list[int]]:
    """The first documents, until they hold n_tokens tokens or, if given, are n_documents; with a progress bar."""
    total, done = n_documents or n_tokens, 0  # the bar does not count where it is switched off
    unit = "doc" if n_documents else "token"
    with tqdm(total=total, desc=f"tokenizing {name}", unit=unit, unit_scale=True) as bar:
        while done < total:
            tokens = next(docs)
            yield tokens
            new = 1 if n_documents else len(tokens)
            done += new
            bar.update(new)


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def open_loader(cfg: RunConfig, image_tokenizer: ImageTokenizer, tokenizer: TextTokenizer, folder: Path) -> Loader:
    """The transformer's batches. Raises UserError where no document of a source fits in a sequence."""
    t = cfg.train
    sources = {name: packed_source(name, cfg, image_tokenizer, tokenizer, folder) for name in cfg.mixture}
    stages = [(start, dict(stage.weights)) for start, stage in zip(cfg.stage_starts, cfg.stages, strict=True)]
    vocab = tokenizer.vocab
    return Loader(
        sources, stages, t.batch_size, t.seq_len, cfg.seed, vocab.pad, vocab.eot if t.assistant_only_loss else None
    )


def packed_source(
    name: str, cfg: RunConfig, image_tokenizer: ImageTokenizer, tokenizer: TextTokenizer, folder: Path
) -> PackedDocuments:
    """One source's documents, packed into sequences; the packing is kept in the run's folder."""
    seq_len, place, size = cfg.train.seq_len, folder / "data" / name, tokenizer.vocab.size
    if cfg.data.tokenize_on_the_fly:
        docs = InEpochs(open_sources(cfg, folder)(name), cfg.seed, name)
        documents = OnTheFly(docs, image_tokenizer, tokenizer, *amounts(cfg)[name])
        return PackedDocuments(name, documents, seq_len, cfg.seed)
    if cfg.data.source == "prepared":
        shards = Shards(cfg.data.path / name, size)
        check_unchanged(cfg.data.path / name / Shards.INDEX, place / Shards.INDEX)
    else:
        shards = Shards(place, size)
        if shards.index.get(TEXT_TOKENIZER) != tokenizer_checksum(tokenizer):
            why = f"{folder / TEXT_TOKENIZER} is not the one that made {place}"
            raise UserError(f"{why}: delete the former, and the same command makes it again")
    return PackedDocuments(name, shards, seq_len, cfg.seed, place)


def tokenizer_checksum(tokenizer: TextTokenizer) -> int:
    return zlib.crc32(json.dumps(to_json(tokenizer)).encode())


def check_unchanged(index: Path, kept: Path) -> None:
    """Keep a copy of a prepared source's index. Raises UserError if it differs from the copy that was kept earlier: the
    sequences would not be those that this run began with."""
    content = index.read_bytes()
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, content)
    elif kept.read_bytes() != content:
        read_index(kept.parent, kept.name, Shards.FORMAT, files=False)  # raises if the copy is the damaged one
        raise UserError(f"{index.parent} has changed since this run began: start over with --overwrite")
