"""From a configuration to token shards: enough and no more, the same each time, true to the documents."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import training_config
from tqdm import tqdm

from nanochameleon.config import StageConfig
from nanochameleon.data import FORMS, RawImage, Shards, digest
from nanochameleon.data import build as prepare
from nanochameleon.data.build import (
    CHUNK,
    InEpochs,
    mixture,
    open_loader,
    open_sources,
    store_images,
    take,
    tokenize,
    write_tokens,
)
from nanochameleon.data.sources.scenes import World
from nanochameleon.documents import Image, Text, parse
from nanochameleon.errors import UserError
from nanochameleon.presets import mixed
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab


class Mosaic:
    """An image tokenizer for tests: the code of each 8 x 8 patch is its mean brightness. Counts images."""

    def __init__(self):
        self.n_images = 0

    n_codes_per_image = 16

    def encode(self, images: np.ndarray) -> torch.Tensor:
        self.n_images += len(images)
        patches = images.reshape(len(images), 4, 8, 4, 8, 3).mean((2, 4, 5)).astype(int) // 16
        return torch.from_numpy(patches.reshape(len(images), 16))


CFG = training_config(None)
VOCAB = Vocab.toy(CFG.vqgan.n_codes, CFG.tokenizers.n_merges)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(mixture(CFG, Path()).captions(200), VOCAB)


def write(folder: Path, tokenizer: TextTokenizer, cfg=CFG, image_tokenizer=None) -> dict[str, Shards]:
    write_tokens(cfg, image_tokenizer or Mosaic(), tokenizer, folder)
    return {name: Shards(folder / "data" / name) for name in cfg.mixture}


def test_there_are_enough_tokens_of_each_source_and_not_one_document_more(tmp_path, tokenizer):
    written = write(tmp_path, tokenizer)
    for name, fraction in CFG.mixture.items():
        sizes, needed = written[name].sizes(0, len(written[name])), round(fraction * 12 * 2 * 192) + 192
        assert sizes[:-1].sum() < needed <= sizes.sum()


def test_no_sequence_is_read_twice_whatever_the_stages(tmp_path, tokenizer):
    first = StageConfig("first", 0.8, (("pairs", 1.0), ("text", 2.0)))
    last = StageConfig("last", 0.2, (("drawings", 0.9), ("text", 0.1)))
    cfg = replace(CFG, stages=(first, last), train=replace(CFG.train, steps=100))
    write(tmp_path, tokenizer, cfg)
    loader = open_loader(cfg, Mosaic(), tokenizer, tmp_path)
    counts = Counter(loader.place(row)[0] for row in range(200))
    assert all(counts[name] <= len(loader.sources[name]) for name in counts)
    assert {loader.place(row)[0] for row in range(160)} == {"pairs", "text"}


def test_batches_tokenized_on_the_fly_are_those_of_the_shards(tmp_path, tokenizer):
    write(tmp_path, tokenizer)
    loaders = [
        open_loader(replace(CFG, data=replace(CFG.data, tokenize_on_the_fly=live)), Mosaic(), tokenizer, tmp_path)
        for live in (False, True)
    ]
    for step in range(12):
        assert torch.equal(*(loader.batch(step).tokens for loader in loaders))


def test_a_number_of_documents_is_kept_to(tmp_path, tokenizer):
    cfg = replace(CFG, data=replace(CFG.data, n_documents=CHUNK + 7), stages=mixed(pairs=1.0))
    assert len(write(tmp_path, tokenizer, cfg)["pairs"]) == CHUNK + 7


def test_take_stops_at_once():
    assert len(list(take(itertools.repeat([1, 2, 3]), 10, None, "x"))) == 4
    assert len(list(take(itertools.repeat([1, 2, 3]), 9, None, "x"))) == 3
    assert len(list(take(itertools.repeat([1, 2, 3]), 9, 5, "x"))) == 5


def test_take_stops_without_a_bar_too(monkeypatch):
    monkeypatch.setattr(prepare, "tqdm", partial(tqdm, disable=True))
    lists = itertools.chain(itertools.repeat([1, 2, 3], 9), iter(lambda: pytest.fail("it does not stop"), None))
    assert len(list(take(lists, 10, None, "x"))) == 4 and len(list(take(lists, 9, 5, "x"))) == 5


def images_with_captions(folder: Path, n: int) -> None:
    folder.mkdir()
    for i in range(n):
        PIL.Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(folder / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "text": "red"} for i in range(n + 1)]  # the last image is not there
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_empty_split_is_found_at_once_and_the_list_of_what_was_skipped_is_named(tmp_path, capsys):
    def store(n: int) -> Path:
        path = tmp_path / f"mine{n}"
        if not path.exists():
            images_with_captions(path, n)
        cfg = replace(CFG, data=replace(CFG.data, source="folder", path=path), stages=mixed(pairs=1.0))
        store_images(cfg, tmp_path / f"run{n}")
        return tmp_path / f"run{n}" / "images" / "skipped.jsonl"

    listed = store(2)
    assert f"1 missing images; listed in {listed}\n" in capsys.readouterr().out and listed.is_file()
    for _ in range(2):  # stored by the first try, opened by the second
        with pytest.raises(UserError, match="no image in its test split"):
            store(1)


def test_the_same_run_writes_the_same_bytes_and_another_seed_others(tmp_path, tokenizer):
    def data(name: str, cfg) -> dict[str, bytes]:
        write(tmp_path / name, tokenizer, cfg)
        files = [path for path in (tmp_path / name / "data").rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    first = data("a", CFG)
    assert data("b", CFG) == first and data("c", replace(CFG, seed=1)) != first


def test_data_that_is_there_is_not_made_again(tmp_path, tokenizer):
    first, image_tokenizer = write(tmp_path, tokenizer), Mosaic()
    again = write(tmp_path, tokenizer, image_tokenizer=image_tokenizer)
    assert image_tokenizer.n_images == 0 and {k: len(x) for k, x in again.items()} == {
        k: len(x) for k, x in first.items()
    }


def test_every_document_parses_back_to_what_the_source_gave(tmp_path, tokenizer):
    for name, shards in write(tmp_path, tokenizer).items():
        source = open_sources(CFG, tmp_path)(name)
        for i in range(len(shards)):
            expected = [
                Image(tuple(Mosaic().encode(s.pixels[None])[0].tolist())) if isinstance(s, RawImage) else s
                for s in source.document(i)
            ]
            assert parse(shards[i].tolist(), tokenizer, VOCAB) == expected


def test_the_mixture_has_its_fractions_over_all_stages():
    stages = (StageConfig("a", 3.0, (("pairs", 1.0), ("text", 1.0))), StageConfig("b", 1.0, (("questions", 5.0),)))
    docs = mixture(replace(CFG, stages=stages), Path())
    counts = Counter(docs.names[docs.draw(i)[0]] for i in range(1_000))
    assert counts == {"pairs": 375, "text": 375, "questions": 250}


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"text"}))
def test_training_shows_no_image_of_the_test_split(form):
    """The second image of an interleaved document varies the first by a word, and only the first decides its split.

    In a world this small (some 60,000 images) hundreds of drawn ones would meet by chance.
    """
    train, test = (open_sources(CFG, Path(), split)(form) for split in ("train", "test"))
    seen = {digest(s.pixels) for i in range(400) for s in train.document(i) if isinstance(s, RawImage)}
    held_out = {digest(next(s.pixels for s in test.document(i) if isinstance(s, RawImage))) for i in range(200)}
    assert len(seen) > 200 and len(held_out) > 100 and seen.isdisjoint(held_out)


def test_an_image_of_a_finite_source_is_encoded_once():
    class Five:
        size = 5

        def document(self, index):
            return [RawImage(np.full((32, 32, 3), 40 * (index % 5), np.uint8)), Text(str(index))]

    image_tokenizer = Mosaic()
    text = TextTokenizer([], VOCAB)
    lists = list(itertools.islice(tokenize(InEpochs(Five(), 0, "x"), image_tokenizer, text), 2 * CHUNK + 5))
    assert image_tokenizer.n_images == 5
    said = [int(parse(ids, text, VOCAB)[1].text) for ids in lists]
    assert sorted(said) == list(range(2 * CHUNK + 5)) or sorted(said[:-5]) == list(range(2 * CHUNK - 2))


def test_what_cannot_be_is_said_by_the_options_name(tmp_path):
    with pytest.raises(UserError, match=r"drawn at 32 pixels: set --vqgan\.resolution"):
        open_sources(replace(CFG, vqgan=replace(CFG.vqgan, resolution=64)), tmp_path)
    with pytest.raises(UserError, match=r"--data\.path"):
        store_images(replace(CFG, data=replace(CFG.data, source="folder"), stages=mixed(pairs=1.0)), tmp_path)
    with pytest.raises(UserError, match=r"stages\.0\.weights names 'questions'"):
        store_images(replace(CFG, data=replace(CFG.data, source="folder", path=tmp_path)), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert World().resolution == CFG.vqgan.resolution
