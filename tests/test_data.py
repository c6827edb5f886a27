"""Data: what is stored comes back or is refused, and every draw is a pure function of seed and index."""

import os
import signal
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochameleon.data import (
    Loader,
    Mixture,
    Picture,
    Pictures,
    Shards,
    fuse,
    interleaved,
    pair,
    question_answer,
    write_pictures,
    write_shards,
)
from nanochameleon.documents import EndOfTurn, Image, Text
from nanochameleon.errors import UserError
from nanochameleon.packing import NO_DOCUMENT

PAD = 1
documents = st.lists(st.lists(st.integers(0, 65_535) | st.just(65_535), min_size=1, max_size=9), max_size=12)


def plain(value):
    """Segments as tuples that compare by value."""
    return [("picture", s.pixels.tobytes()) if isinstance(s, Picture) else s for s in value]


def grey(level: int) -> np.ndarray:
    return np.full((2, 2, 3), level, np.uint8)


class Numbered:
    """A source whose document says its name and the index it was asked for."""

    def __init__(self, name: str, size: int | None):
        self.name, self.size = name, size

    def document(self, index):
        return [Text(f"{self.name} {index}")]

    def captions(self, n):
        return (f"{self.name} {i}" for i in range(n))


class LevelTokenizer:
    """Codes of a grey picture: its level, twice. Keeps the sizes of the batches it was asked for."""

    def __init__(self):
        self.batches = []

    def encode(self, pixels):
        self.batches.append(len(pixels))
        return torch.from_numpy(pixels[:, 0, :2, 0].astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Forms


def test_either_half_of_a_pair_comes_first_half_the_time():
    docs = [pair("a", grey(0), np.random.default_rng((3, i))) for i in range(2_000)]
    first = Counter(type(doc[0]) for doc in docs)
    assert abs(first[Picture] - 1_000) < 100  # 4.5 standard deviations
    assert all({type(doc[0]), type(doc[1])} == {Picture, Text} for doc in docs)


def test_the_forms_of_documents():
    picture = ("picture", grey(5).tobytes())
    assert plain(question_answer(grey(5), [("q", "a"), ("r", "b")])) == [
        picture, Text("q"), EndOfTurn(), Text("a"), EndOfTurn(), Text("r"), EndOfTurn(), Text("b")
    ]  # fmt: skip
    assert plain(interleaved([("x", grey(5)), ("y", grey(6))])) == [
        Text("x"), picture, Text("y"), ("picture", grey(6).tobytes())
    ]  # fmt: skip


def test_fuse_puts_each_picture_s_codes_in_its_place_and_encodes_it_once():
    tokenizer, known = LevelTokenizer(), {}
    docs = [
        [Picture(grey(7)), Text("seven")],
        [Text("x"), EndOfTurn()],
        [Text("n"), Picture(grey(9)), Picture(grey(7))],
    ]
    seven, nine = Image((7, 7)), Image((9, 9))
    expected = [[seven, Text("seven")], [Text("x"), EndOfTurn()], [Text("n"), nine, seven]]
    assert fuse(docs, tokenizer, known) == expected
    assert fuse(docs[:1] + [[Picture(grey(8))]], tokenizer, known) == [expected[0], [Image((8, 8))]]
    assert tokenizer.batches == [2, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=4), st.integers(0, 2**32), st.integers(0, 10_000))
@settings(max_examples=20)
def test_every_thousand_documents_hold_each_source_s_share(weights, seed, block):
    mixture = Mixture({f"s{k}": (Numbered(f"s{k}", None), w) for k, w in enumerate(weights)}, seed)
    counts = Counter(mixture.draw(i)[0] for i in range(block * 1_000, (block + 1) * 1_000))
    for k, weight in enumerate(weights):
        assert abs(counts[k] - 1_000 * weight / sum(weights)) <= 1


@given(st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=20)
def test_a_source_in_a_mixture_gives_every_item_before_any_again(size, seed):
    mixture = Mixture({"endless": (Numbered("endless", None), 2), "finite": (Numbered("finite", size), 1)}, seed)
    drawn = [mixture.document(i)[0].text.split() for i in range(1_500)]
    finite = [int(index) for name, index in drawn if name == "finite"]
    assert [int(index) for name, index in drawn if name == "endless"] == list(range(1_500 - len(finite)))
    for epoch in range(len(finite) // size):
        assert sorted(finite[epoch * size : (epoch + 1) * size]) == list(range(epoch * size, (epoch + 1) * size))


def test_a_mixture_depends_on_seed_and_index_alone():
    def make(seed):
        return Mixture({"a": (Numbered("a", 5), 1), "b": (Numbered("b", 7), 1)}, seed)

    forwards = [make(4).document(i) for i in range(300)]
    one = make(4)
    assert [one.document(i) for i in reversed(range(300))][::-1] == forwards
    assert [make(5).document(i) for i in range(300)] != forwards
    blocks = [[one.draw(i)[0] for i in range(b * Mixture.BLOCK, (b + 1) * Mixture.BLOCK)] for b in range(2)]
    assert blocks[0] != blocks[1]
    in_epoch = [[t for d in forwards if (t := d[0].text).startswith("a")][5 * e : 5 * e + 5] for e in range(20)]
    assert len({tuple(int(t.split()[1]) % 5 for t in texts) for texts in in_epoch}) > 10  # each epoch its own order


def test_captions_of_a_mixture_come_from_each_source():
    mixture = Mixture({"a": (Numbered("a", None), 3), "b": (Numbered("b", None), 1)}, 0)
    assert Counter(text[0] for text in mixture.captions(100)) == {"a": 75, "b": 25}


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, 1e-5]])
def test_a_mixture_with_an_impossible_share_is_refused(weights):
    with pytest.raises(UserError, match="mixture"):
        Mixture({f"s{k}": (Numbered("s", None), w) for k, w in enumerate(weights)}, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Shards


@given(documents, st.integers(1, 20))
def test_shards_give_back_every_document(docs, shard_tokens):
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "tokens", docs, shard_tokens)
        shards = Shards(Path(folder) / "tokens")
        assert [ids.tolist() for ids in shards] == docs and len(shards) == len(docs)
        assert all(ids.dtype == np.uint16 for ids in shards)
        assert shards.lengths.tolist() == [len(ids) for ids in docs]
        sizes = [f.stat().st_size // 2 for f in (Path(folder) / "tokens").glob("shard-*.bin")]
        assert sum(sizes) == sum(map(len, docs)) and all(n <= max(shard_tokens, *map(len, docs)) for n in sizes)


@pytest.mark.parametrize("ids", [[], [65_536], [-1]])
def test_an_id_that_two_bytes_do_not_hold_is_refused_and_leaves_nothing(ids, tmp_path):
    with pytest.raises(ValueError, match="document 1 is empty or has ids outside"):
        write_shards(tmp_path / "tokens", [[5], ids])
    assert list(tmp_path.iterdir()) == []


def write_two_shards(path: Path) -> Path:
    write_shards(path, [[1, 2, 3], [4, 5], [6, 65_535]], shard_tokens=4)
    return path


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00001.bin", "offsets.bin", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "missing"])
def test_a_damaged_shard_folder_is_refused_by_the_file_s_name(name, damage, tmp_path):
    file = write_two_shards(tmp_path / "tokens") / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:-1] if damage == "cut" else content + b"x")
    with pytest.raises(UserError, match=name):
        Shards(tmp_path / "tokens")


def test_what_is_no_shard_folder_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("hello")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text('{"format": "a cook book"}')
    for name in ("absent", "file", "other"):
        with pytest.raises(UserError, match=name):
            Shards(tmp_path / name)


@given(st.integers(0, 5), st.booleans())
@settings(max_examples=12)
def test_a_killed_or_failing_writer_leaves_what_was_there_before(stop, killed):
    def docs():
        for i in range(6):
            if i == stop:
                if killed:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
            yield [i, i]

    with tempfile.TemporaryDirectory() as folder:
        fresh, earlier = Path(folder) / "fresh", write_two_shards(Path(folder) / "earlier")
        for path in (fresh, earlier):
            if killed:
                if (child := os.fork()) == 0:
                    try:
                        write_shards(path, docs(), shard_tokens=2)
                    finally:
                        os._exit(1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            else:
                with pytest.raises(KeyboardInterrupt):
                    write_shards(path, docs(), shard_tokens=2)
        with pytest.raises(UserError):
            Shards(fresh)
        assert [ids.tolist() for ids in Shards(earlier)] == [[1, 2, 3], [4, 5], [6, 65_535]]
        write_shards(fresh, [[7]])
        write_shards(earlier, [[8]])
        assert (Shards(fresh)[0], Shards(earlier)[0]) == (7, 8)
        assert {p.name for p in Path(folder).iterdir()} == {"fresh", "earlier"}


def test_a_folder_left_aside_by_a_kill_between_two_renames_comes_back(tmp_path):
    write_two_shards(tmp_path / "tokens").rename(tmp_path / ".tokens.old")
    with pytest.raises(ValueError, match="document 0"):
        write_shards(tmp_path / "tokens", [[]])
    assert len(Shards(tmp_path / "tokens")) == 3 and len(list(tmp_path.iterdir())) == 1


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(UserError, match="is in the way"):
        write_shards(tmp_path, [[1]])
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


def test_stored_pictures_come_back_with_what_was_said_of_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    assert write_pictures(tmp_path, ((p, {"n": i}) for i, p in enumerate(pixels)), 4) == 3
    stored = Pictures(tmp_path)
    assert (stored.pixels == pixels).all() and stored.items == [{"n": 0}, {"n": 1}, {"n": 2}] and stored.resolution == 4
    (tmp_path / "pictures.bin").write_bytes(pixels.tobytes()[:-1])
    with pytest.raises(UserError, match=r"pictures\.bin is 143 bytes long where 144 were written"):
        Pictures(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The loader


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """60 documents of 1 to 12 ids, document i made of the id 2 + i alone; ten of them are longer than 10."""
    path = tmp_path_factory.mktemp("shards") / "tokens"
    lengths = np.random.default_rng(1).permutation(np.repeat(np.arange(1, 13), 5))
    write_shards(path, [[2 + i] * int(n) for i, n in enumerate(lengths)], shard_tokens=100)
    return Shards(path)


def documents_in(batch) -> list[list[int]]:
    """The documents of a batch, read from its tokens and doc_ids."""
    found = []
    for tokens, doc_ids in zip(batch.tokens, batch.doc_ids, strict=True):
        found += [tokens[doc_ids == d].tolist() for d in range(int(doc_ids.max()) + 1)]
    return found


@pytest.mark.parametrize("seed", range(3))
def test_every_epoch_shows_each_document_that_fits_exactly_once(shards, seed):
    loader = Loader(shards, 1, 10, seed, PAD)
    short = sorted(ids.tolist() for ids in shards if len(ids) <= 10)
    epochs = [[documents_in(loader.batch(e * loader.n_rows + r)) for r in range(loader.n_rows)] for e in range(3)]
    for epoch in epochs:
        assert sorted(ids for row in epoch for ids in row) == short
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.n_too_long == 10


@given(st.integers(1, 40), st.integers(0, 3), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_step_alone(shards, batch_size, seed, steps):
    one_by_one = Loader(shards, 1, 12, seed, PAD)
    used = Loader(shards, batch_size, 12, seed, PAD)
    for step in steps:
        resumed = Loader(shards, batch_size, 12, seed, PAD).batch(step)
        for name in ("tokens", "targets", "doc_ids", "positions"):
            assert torch.equal(getattr(used.batch(step), name), getattr(resumed, name))
        # the order of rows does not depend on how many a step takes
        rows = [one_by_one.batch(step * batch_size + b).tokens for b in range(batch_size)]
        assert torch.equal(torch.cat(rows), resumed.tokens)


def test_another_seed_is_another_order_and_puts_other_documents_side_by_side(shards):
    loaders = [Loader(shards, 1, 12, seed, PAD) for seed in (0, 1)]
    rows = [[tuple(loader.documents(step)[0]) for step in range(loader.n_rows)] for loader in loaders]
    assert rows[0] != rows[1] and {frozenset(row) for row in rows[0]} != {frozenset(row) for row in rows[1]}


def test_rows_of_a_batch_hold_padding_only_at_their_end(shards):
    batch = Loader(shards, 20, 12, 0, PAD).batch(0)
    padded = batch.doc_ids == NO_DOCUMENT
    assert (batch.tokens[padded] == PAD).all() and (batch.tokens[~padded] != PAD).all()
    assert (padded[:, 1:] >= padded[:, :-1]).all()


def test_a_loader_with_nothing_that_fits_says_so(tmp_path):
    write_shards(tmp_path / "none", [])
    write_shards(tmp_path / "long", [[1] * 9])
    for name in ("none", "long"):
        with pytest.raises(UserError, match="raise seq_len"):
            Loader(Shards(tmp_path / name), 2, 8, 0, PAD)
