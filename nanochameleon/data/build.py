"""From a configuration to what is trained on: sources of raw documents, and token shards for the transformer.

The made-up worlds are endless and need nothing; emoji and folders are first stored as images (emoji.py, folder.py);
prepared data has shards already (prepared.py).
"""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from nanochameleon.config import DataConfig, RunConfig
from nanochameleon.data import Live, Loader, Mixture, Rows, Shards, Source, fuse, in_epochs, write_shards
from nanochameleon.data.index import read_index
from nanochameleon.data.prepared import sources as prepared_sources
from nanochameleon.data.reading import SKIPPED
from nanochameleon.data.sources.alignment import CATEGORIES, AlignmentSource
from nanochameleon.data.sources.emoji import EmojiSource, prepare_emoji
from nanochameleon.data.sources.folder import FolderSource, prepare_folder
from nanochameleon.data.sources.shapes import ShapesSource, World
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


def store_images(cfg: RunConfig, folder: Path) -> None:
    """Reads emoji or a folder into folder/images, unless they are there, and says what was skipped.

    Raises UserError where a split is empty: now, and not when the first images of the test split are drawn.
    """
    check_sources(cfg)
    stored = folder / "pictures"
    if world(cfg.data) or cfg.data.source == "prepared":
        return
    if not (stored / "pictures.json").exists():
        store(cfg, stored)
    for split in ("train", "test"):
        open_sources(cfg, folder, split)("pairs")


def kind_of(data: DataConfig) -> type[Source]:
    if world(data):
        return ShapesSource
    return EmojiSource if data.source == "emoji" else FolderSource


def check_sources(cfg: RunConfig) -> None:
    """Raises UserError for a name in a stage's weights that this data has not."""
    prepared = cfg.data.source == "prepared"
    names = prepared_sources(cfg.data.path) if prepared else kind_of(cfg.data).FORMS
    names = [*names, *CATEGORIES] if world(cfg.data) else names
    for number, stage in enumerate(cfg.stages):
        for name, _ in stage.weights:
            if name not in names:
                has = f"{cfg.data.path if prepared else cfg.data.source} has {', '.join(names) or 'nothing finished'}"
                raise UserError(f"stages.{number}.weights names {name!r}; {has}")


def store(cfg: RunConfig, stored: Path) -> None:
    if cfg.data.source == "emoji":
        prepare_emoji(stored, cfg.vqgan.resolution)
    elif cfg.data.path is None:
        raise UserError("source folder needs --data.path, the folder with the images and their captions")
    else:
        report = prepare_folder(cfg.data.path, stored, cfg.vqgan.resolution)
        say(f"{report}; listed in {stored / SKIPPED}" if report.skipped else report)


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
    opened = kind_of(cfg.data)
    return lambda form: opened(folder / "pictures", split, cfg.seed, form)


def mixture(cfg: RunConfig, folder: Path, split: str = "train") -> Mixture:
    """Documents of all forms, each in its share over all stages."""
    source = open_sources(cfg, folder, split)
    return Mixture({form: (source(form), share) for form, share in cfg.mixture.items()}, cfg.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Documents of ids


class Epochs:
    """A source as an endless one: document i shows each item once before any comes again."""

    size = None

    def __init__(self, source: Source, seed: int, name: str):
        self.source, self.seed, self.name = source, seed, name

    def document(self, i: int):
        return self.source.document(in_epochs(i, self.source.size, self.seed, self.name))


def token_lists(
    docs: Epochs, image_tokenizer: ImageTokenizer, tokenizer: TextTokenizer, stopped: Callable[[], bool] = lambda: False
) -> Iterator[list[int]]:
    """Documents 0, 1, 2, ... as ids, without end; each image of a finite source is encoded once."""
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
    """For each source how many ids the run reads of it, and how many documents were asked for instead, if any."""
    total = cfg.train.steps * cfg.train.batch_size * cfg.train.seq_len
    wish = cfg.data.n_documents
    return {
        name: (round(share * total) + cfg.train.seq_len, None if wish is None else max(1, round(share * wish)))
        for name, share in cfg.mixture.items()
    }


def write_tokens(
    cfg: RunConfig,
    image_tokenizer: ImageTokenizer,
    tokenizer: TextTokenizer,
    folder: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Writes folder/data/SOURCE for each source unless it is there: as many documents as the run reads, so that none
    comes twice.

    `stopped` is asked before every CHUNK of documents; when it says so, that source is not written, and Interrupted
    raised.
    """
    if cfg.data.source == "prepared":
        return
    source, notes = open_sources(cfg, folder), {TEXT_TOKENIZER: checksum_of(tokenizer)}
    for name, (n_ids, n_documents) in amounts(cfg).items():
        if not (folder / "data" / name).exists():
            docs = Epochs(source(name), cfg.seed, name)
            lists = token_lists(docs, image_tokenizer, tokenizer, stopped)
            write_shards(folder / "data" / name, enough(lists, n_ids, n_documents, name), notes=notes)


def enough(lists: Iterator[list[int]], n_tokens: int, n_documents: int | None, name: str) -> Iterator[list[int]]:
    """The first documents, until they hold n_tokens ids or, if given, are n_documents; with a progress bar."""
    total, done = n_documents or n_tokens, 0  # the bar does not count where it is switched off
    unit = "doc" if n_documents else "id"
    with tqdm(total=total, desc=f"tokenizing {name}", unit=unit, unit_scale=True) as bar:
        while done < total:
            ids = next(lists)
            yield ids
            new = 1 if n_documents else len(ids)
            done += new
            bar.update(new)


def open_loader(cfg: RunConfig, image_tokenizer: ImageTokenizer, tokenizer: TextTokenizer, folder: Path) -> Loader:
    """What the transformer is trained on. Raises UserError where nothing of a source fits in a row."""
    t = cfg.train
    rows = {name: rows_of(name, cfg, image_tokenizer, tokenizer, folder) for name in cfg.mixture}
    stages = [(start, dict(stage.weights)) for start, stage in zip(cfg.stage_starts, cfg.stages, strict=True)]
    vocab = tokenizer.vocab
    return Loader(
        rows, stages, t.batch_size, t.seq_len, cfg.seed, vocab.pad, vocab.eot if t.assistant_only_loss else None
    )


def rows_of(name: str, cfg: RunConfig, image_tokenizer: ImageTokenizer, tokenizer: TextTokenizer, folder: Path) -> Rows:
    """One source's rows; how they are packed is kept in the run's folder."""
    seq_len, place, size = cfg.train.seq_len, folder / "data" / name, tokenizer.vocab.size
    if cfg.data.tokenize_on_the_fly:
        docs = Epochs(open_sources(cfg, folder)(name), cfg.seed, name)
        return Rows(name, Live(docs, image_tokenizer, tokenizer, *amounts(cfg)[name]), seq_len, cfg.seed)
    if cfg.data.source != "prepared":
        shards = Shards(place, size)
        made_by = shards.index.get(TEXT_TOKENIZER)  # None of an older version
        if made_by not in (None, checksum_of(tokenizer)):
            why = f"{folder / TEXT_TOKENIZER} is not the one that made {place}"
            raise UserError(f"{why}: delete the former, and the same command makes it again")
        return Rows(name, shards, seq_len, cfg.seed, place)
    shards = Shards(cfg.data.path / name, size)
    same_as_before(cfg.data.path / name / Shards.INDEX, place / Shards.INDEX)
    return Rows(name, shards, seq_len, cfg.seed, place)


def checksum_of(tokenizer: TextTokenizer) -> int:
    return zlib.crc32(json.dumps(to_json(tokenizer)).encode())


def same_as_before(index: Path, kept: Path) -> None:
    """Keeps a copy of a prepared source's index. Raises UserError where it differs from the one kept earlier: rows
    would not be those that this run has begun with."""
    content = index.read_bytes()
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, content)
    elif kept.read_bytes() != content:
        read_index(kept.parent, kept.name, Shards.FORMAT, files=False)  # says so where it is the copy that is damaged
        raise UserError(f"{index.parent} has changed since this run began: start anew with --overwrite")
