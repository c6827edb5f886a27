"""From a configuration to what is trained on: sources of raw documents, and token shards for the transformer.

The made-up worlds are endless and need nothing; emoji and folders are first stored as pictures (emoji.py, folder.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from nanochameleon.config import DataConfig, RunConfig
from nanochameleon.data import FORMS, Mixture, Shards, Source, fuse, write_shards
from nanochameleon.documents import render
from nanochameleon.emoji import EmojiSource, prepare_emoji
from nanochameleon.errors import Interrupted, UserError
from nanochameleon.folder import SKIPPED, FolderSource, prepare_folder
from nanochameleon.image_tokenizer import ImageTokenizer
from nanochameleon.shapes import ShapesSource, World
from nanochameleon.text_tokenizer import TextTokenizer

CHUNK = 256  # documents whose pictures are encoded together


def world(data: DataConfig) -> World | None:
    """The shapes world of a configuration, None for real pictures."""
    return {"shapes": World(), "shapes_rich": World.rich()}.get(data.source)


def store_pictures(cfg: RunConfig, folder: Path) -> None:
    """Reads emoji or a folder into folder/pictures, unless they are there, and says what was skipped.

    Raises UserError where a split is empty: now, and not when the first pictures of the test split are drawn.
    """
    if cfg.data.source == "folder" and cfg.data.questions:
        raise UserError("a folder of captioned pictures has no questions: set --data.questions 0")
    stored = folder / "pictures"
    if world(cfg.data):
        return
    if not (stored / "pictures.json").exists():
        store(cfg, stored)
    for split in ("train", "test"):
        open_sources(cfg, folder, split)("pair")


def store(cfg: RunConfig, stored: Path) -> None:
    if cfg.data.source == "emoji":
        prepare_emoji(stored, cfg.vqgan.resolution)
    elif cfg.data.path is None:
        raise UserError("source folder needs --data.path, the folder with the pictures and their captions")
    else:
        report = prepare_folder(cfg.data.path, stored, cfg.vqgan.resolution)
        print(f"{report}; listed in {stored / SKIPPED}" if report.skipped else report)


def open_sources(cfg: RunConfig, folder: Path, split: str = "train") -> Callable[[str], Source]:
    """A function from a form of documents (data.FORMS) to their source. Raises UserError for a wrong resolution."""
    if shapes := world(cfg.data):
        if cfg.vqgan.resolution != shapes.resolution:
            raise UserError(
                f"{cfg.data.source} are drawn at {shapes.resolution} pixels: set --vqgan.resolution to that"
            )
        return lambda form: ShapesSource(shapes, form, cfg.seed, test=split == "test")
    opened = EmojiSource if cfg.data.source == "emoji" else FolderSource
    return lambda form: opened(folder / "pictures", split, cfg.seed, form)


def mixture(cfg: RunConfig, folder: Path, split: str = "train") -> Mixture:
    """Documents of all forms in the configured shares."""
    shares = dict(zip(FORMS, (cfg.data.pairs, cfg.data.questions, cfg.data.interleaved), strict=True))
    source = open_sources(cfg, folder, split)
    return Mixture({form: (source(form), share) for form, share in shares.items() if share}, cfg.seed)


def token_lists(
    docs: Mixture, images: ImageTokenizer, tokenizer: TextTokenizer, stopped: Callable[[], bool] = lambda: False
) -> Iterator[list[int]]:
    """Documents 0, 1, 2, ... as ids, without end; each picture of a finite source is encoded once."""
    known = None if all(source.size is None for source in docs.sources) else {}
    start = 0
    while True:
        if stopped():
            raise Interrupted
        raw = [docs.document(i) for i in range(start, start + CHUNK)]
        for doc in fuse(raw, images, known):
            yield render(doc, tokenizer, tokenizer.vocab)
        start += CHUNK


def write_tokens(
    cfg: RunConfig,
    docs: Mixture,
    images: ImageTokenizer,
    tokenizer: TextTokenizer,
    folder: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> Shards:
    """Writes folder/data unless it is there: as many documents as the run reads, so that none comes twice.

    `stopped` is asked before every CHUNK of documents; when it says so, nothing is written and Interrupted raised.
    """
    directory = folder / "data"
    if not directory.exists():
        needed = cfg.train.steps * cfg.train.batch_size * cfg.train.seq_len
        write_shards(directory, enough(token_lists(docs, images, tokenizer, stopped), needed, cfg.data.n_documents))
    return Shards(directory)


def enough(lists: Iterator[list[int]], n_tokens: int, n_documents: int | None) -> Iterator[list[int]]:
    """The first documents, until they hold n_tokens ids or, if given, are n_documents; with a progress bar."""
    total, done = n_documents or n_tokens, 0  # the bar does not count where it is switched off
    with tqdm(total=total, desc="tokenizing", unit="doc" if n_documents else "id", unit_scale=True) as bar:
        while done < total:
            ids = next(lists)
            yield ids
            new = 1 if n_documents else len(ids)
            done += new
            bar.update(new)
