"""Data: what is stored comes back or is refused, and every draw is a pure function of seed and index."""

import json
import math
import os
import signal
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOKENIZER

from nanochameleon.data import (
    ImageStore,
    Live,
    Loader,
    Mixture,
    RawImage,
    Rows,
    Shards,
    Shares,
    captioned,
    fuse,
    interleaved,
    pair,
    question_answer,
    write_images,
    write_shards,
)
from nanochameleon.data.index import CHECKED
from nanochameleon.data.loader import shuffled
from nanochameleon.data.mixture import BLOCK
from nanochameleon.documents import EndOfTurn, Image, Text, render
from nanochameleon.errors import OwnError, UserError
from nanochameleon.packing import NO_DOCUMENT

PAD = 1
documents = st.lists(st.lists(st.integers(0, 65_535) | st.just(65_535), min_size=1, max_size=9), max_size=12)


def plain(value):
    """Segments as tuples that compare by value."""
    return [("image", s.pixels.tobytes()) if isinstance(s, RawImage) else s for s in value]


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
    """Codes of a grey image: its level, twice. Keeps the sizes of the batches it was asked for."""

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
    assert abs(first[RawImage] - 1_000) < 100  # 4.5 standard deviations
    assert all({type(doc[0]), type(doc[1])} == {RawImage, Text} for doc in docs)


def test_the_forms_of_documents():
    image = ("image", grey(5).tobytes())
    assert plain(question_answer(grey(5), [("q", "a"), ("r", "b")])) == [
        image, Text("q"), EndOfTurn(), Text("a"), EndOfTurn(), Text("r"), EndOfTurn(), Text("b")
    ]  # fmt: skip
    assert plain(interleaved([("x", grey(5)), ("y", grey(6))])) == [
        Text("x"), image, Text("y"), ("image", grey(6).tobytes())
    ]  # fmt: skip


def test_one_captioned_image_in_three_forms():
    rng, image = np.random.default_rng(0), ("image", grey(5).tobytes())
    assert plain(captioned("drawings", "x", grey(5), rng)) == [Text("x"), image]
    assert plain(captioned("text", "x", grey(5), rng)) == [Text("x")]
    assert len(captioned("pairs", "x", grey(5), rng)) == 2


def test_fuse_puts_each_image_s_codes_in_its_place_and_encodes_it_once():
    tokenizer, known = LevelTokenizer(), {}
    docs = [
        [RawImage(grey(7)), Text("seven")],
        [Text("x"), EndOfTurn()],
        [Text("n"), RawImage(grey(9)), RawImage(grey(7))],
    ]
    seven, nine = Image((7, 7)), Image((9, 9))
    expected = [[seven, Text("seven")], [Text("x"), EndOfTurn()], [Text("n"), nine, seven]]
    assert fuse(docs, tokenizer, known) == expected
    assert fuse(docs[:1] + [[RawImage(grey(8))]], tokenizer, known) == [expected[0], [Image((8, 8))]]
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
    blocks = [[one.draw(i)[0] for i in range(b * BLOCK, (b + 1) * BLOCK)] for b in range(2)]
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
        assert shards.sizes(0, len(docs)).tolist() == [len(ids) for ids in docs]
        assert [i for first, last in shards.groups for i in range(first, last)] == list(range(len(docs)))
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


def flip(file: Path, place: int, bits: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= bits
    file.write_bytes(content)


def exchange(file: Path, a: int, b: int, size: int) -> None:
    """Two parts of a file change places."""
    content = file.read_bytes()
    parts = content[:a], content[b : b + size], content[a + size : b], content[a : a + size], content[b + size :]
    file.write_bytes(b"".join(parts))


def older(directory: Path, index: str = "index.json", **changes) -> Path:
    """What an older version wrote: the index without checksums."""
    content = json.loads((directory / index).read_text())
    content["format"] = content["format"].removesuffix(CHECKED)
    kept = {name: value for name, value in content.items() if name not in ("files", "checksum", "checksums")}
    (directory / index).write_text(json.dumps({k: v for k, v in (kept | changes).items() if v != "left out"}))
    (directory / "checksums.bin").unlink(missing_ok=True)
    return directory


@pytest.mark.parametrize("place", range(14))
def test_a_flipped_bit_in_a_shard_is_noticed_by_whoever_reads_its_document(place, tmp_path):
    """The shards hold [1, 2, 3] and [4, 5], [6, 65535]."""
    path = write_two_shards(tmp_path / "tokens")
    name, document = ("shard-00000.bin", 0) if place < 6 else ("shard-00001.bin", 1 + (place - 6) // 4)
    flip(path / name, place if place < 6 else place - 6)
    shards = Shards(path)
    with pytest.raises(OwnError, match=rf"{name} has changed since it was written: delete .*tokens, and the command"):
        shards.fetch([document])
    others = [number for number in range(3) if number != document]
    assert [ids.tolist() for ids in shards.fetch(others)] == [[[1, 2, 3], [4, 5], [6, 65_535]][n] for n in others]


@pytest.mark.parametrize("name", ["offsets.bin", "checksums.bin", "index.json"])
def test_a_changed_byte_of_what_is_beside_the_shards_is_refused(name, tmp_path):
    path = write_two_shards(tmp_path / "tokens")
    content = (path / name).read_bytes()
    for place in range(len(content)):
        flip(path / name, place)
        with pytest.raises(UserError, match=rf"{name} (is broken|has changed since it was written): delete"):
            Shards(path)
        (path / name).write_bytes(content)
    assert len(Shards(path)) == 3


@pytest.mark.parametrize("make", [lambda path: path, older])
def test_exchanged_offsets_are_refused_with_checksums_and_without(make, tmp_path):
    path = make(write_two_shards(tmp_path / "tokens"))
    exchange(path / "offsets.bin", 8, 16, 8)
    with pytest.raises(UserError, match=r"offsets\.bin (has changed|is not in order)"):
        Shards(path)


def test_shards_that_change_places_are_noticed(tmp_path):
    write_shards(tmp_path / "tokens", [[1, 2], [3, 4]], shard_tokens=2)
    names = [tmp_path / "tokens" / f"shard-0000{number}.bin" for number in (0, 1)]
    first, second = (file.read_bytes() for file in names)
    names[0].write_bytes(second)
    names[1].write_bytes(first)
    with pytest.raises(OwnError, match="has changed"):
        Shards(tmp_path / "tokens").fetch([1])


def test_data_of_an_older_version_opens_without_checksums(tmp_path):
    path = older(write_two_shards(tmp_path / "tokens"))
    assert [ids.tolist() for ids in Shards(path)] == [[1, 2, 3], [4, 5], [6, 65_535]]
    rows = Rows("x", Shards(path), 4, 0, path)
    assert sorted(rows.documents(i) for i in range(len(rows))) == [[0], [1, 2]]


def test_an_id_beyond_the_vocabulary_is_refused_where_no_checksum_could(tmp_path):
    path = older(write_two_shards(tmp_path / "tokens"))
    shards = Shards(path, vocab_size=100)
    assert shards.fetch([0, 1])[1].tolist() == [4, 5]
    with pytest.raises(OwnError, match=r"shard-00001\.bin has the id 65535, which a vocabulary of 100 has not: delete"):
        shards.fetch([0, 2])


COUNTS = [
    "left out", None, "x", ["1", "2"], [None], [math.inf], [1.5, 1.5], [True, 2], [-1, 4], [2**63, 2**63], [1, 2, 3], {}
]  # fmt: skip


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_an_index_with_odd_fields_is_one_sentence_that_says_what_to_delete(counts, tmp_path):
    path = older(write_two_shards(tmp_path / "tokens"), documents_per_shard=counts)
    with pytest.raises(UserError, match=r"tokens/(index\.json|offsets\.bin) .*: delete .*tokens, and the command that"):
        Shards(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"format": []}', '{"format": "a folder of token shards, with"}']
)
def test_an_index_that_is_cut_or_odd_is_one_sentence(text, tmp_path):
    path = write_two_shards(tmp_path / "tokens")
    (path / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is broken: delete .*tokens, and the command that wrote it makes"):
        Shards(path)


@pytest.mark.parametrize("files", [None, ["offsets.bin"], "x", 1])
def test_an_index_with_its_checksum_mended_and_odd_files_is_one_sentence(files, tmp_path):
    path = write_two_shards(tmp_path / "tokens")
    index = json.loads((path / "index.json").read_text()) | {"files": files}
    rest = {name: value for name, value in index.items() if name != "checksum"}
    index["checksum"] = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json is broken: delete .*tokens, and the command that"):
        Shards(path)


def cut_to_26_bytes(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:26])


@pytest.mark.parametrize("name", ["rows-4-0-edges.npy", "rows-4-0-documents.npy", "rows-4-0.json"])
@pytest.mark.parametrize("damage", [cut_to_26_bytes, lambda file: flip(file, 9), lambda file: flip(file, -1, 4)])
def test_damaged_rows_are_packed_again_with_a_warning(name, damage, tmp_path, capsys):
    path = write_two_shards(tmp_path / "tokens")
    rows = Rows("x", Shards(path), 4, 0, path)
    expected = [rows.documents(i) for i in range(9)]
    damage(path / name)
    again = Rows("x", Shards(path), 4, 0, path)
    assert [again.documents(i) for i in range(9)] == expected
    assert f"packing rows again: {path / name}" in capsys.readouterr().err
    Rows("x", Shards(path), 4, 0, path)
    assert capsys.readouterr().err == ""


def test_rows_of_other_shards_are_packed_again(tmp_path):
    path = write_two_shards(tmp_path / "tokens")
    Rows("x", Shards(path), 4, 0, path)
    kept = {file.name: file.read_bytes() for file in path.glob("rows-*")}
    write_shards(path, [[1], [2]], shard_tokens=4)
    for name, content in kept.items():
        (path / name).write_bytes(content)
    assert Rows("x", Shards(path), 4, 0, path).documents(0) in ([0, 1], [1, 0])


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


def test_a_changed_image_is_noticed_and_one_of_an_older_version_is_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    write_images(tmp_path, ((p, {}) for p in pixels), 4)
    flip(tmp_path / "pictures.bin", 50)
    assert (ImageStore(tmp_path)[0] == pixels[0]).all()
    with pytest.raises(OwnError, match=r"images\.bin has changed since it was written"):
        ImageStore(tmp_path)[1]
    flip(tmp_path / "pictures.bin", 50)
    assert (ImageStore(older(tmp_path, "pictures.json"))[1] == pixels[1]).all()


def test_stored_images_come_back_with_what_was_said_of_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    assert write_images(tmp_path, ((p, {"n": i}) for i, p in enumerate(pixels)), 4) == 3
    stored = ImageStore(tmp_path)
    assert (stored.pixels == pixels).all() and stored.items == [{"n": 0}, {"n": 1}, {"n": 2}] and stored.resolution == 4
    (tmp_path / "pictures.bin").write_bytes(pixels.tobytes()[:-1])
    with pytest.raises(UserError, match=r"images\.bin has 143 bytes where 144 were written"):
        ImageStore(tmp_path)


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


def loader_of(shards: Shards, batch_size: int, seq_len: int, seed: int) -> Loader:
    """Of one source."""
    return Loader({"all": Rows("all", shards, seq_len, seed)}, [(0, {"all": 1.0})], batch_size, seq_len, seed, PAD)


@pytest.mark.parametrize("seed", range(3))
def test_every_epoch_shows_each_document_that_fits_exactly_once(shards, seed):
    loader = loader_of(shards, 1, 10, seed)
    n_rows = len(loader.rows["all"])
    short = sorted(ids.tolist() for ids in shards if len(ids) <= 10)
    epochs = [[documents_in(loader.batch(e * n_rows + r)) for r in range(n_rows)] for e in range(3)]
    for epoch in epochs:
        assert sorted(ids for row in epoch for ids in row) == short
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.rows["all"].n_too_long == 10


@given(st.integers(1, 40), st.integers(0, 3), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_step_alone(shards, batch_size, seed, steps):
    one_by_one = loader_of(shards, 1, 12, seed)
    used = loader_of(shards, batch_size, 12, seed)
    for step in steps:
        resumed = loader_of(shards, batch_size, 12, seed).batch(step)
        for name in ("tokens", "targets", "doc_ids", "positions"):
            assert torch.equal(getattr(used.batch(step), name), getattr(resumed, name))
        # the order of rows does not depend on how many a step takes
        rows = [one_by_one.batch(step * batch_size + b).tokens for b in range(batch_size)]
        assert torch.equal(torch.cat(rows), resumed.tokens)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9))
def test_the_shares_of_all_ranks_make_the_batch(shards, ranks, each, step):
    loader = loader_of(shards, ranks * each, 12, 0)
    shares = [loader.batch(step, slice(r * each, (r + 1) * each)).tokens for r in range(ranks)]
    assert torch.equal(torch.cat(shares), loader.batch(step).tokens)


def test_another_seed_is_another_order_and_puts_other_documents_side_by_side(shards):
    loaders = [loader_of(shards, 1, 12, seed) for seed in (0, 1)]
    rows = [[next(x.numbers(step))[1] for step in range(len(x.rows["all"]))] for x in loaders]
    rows = [[tuple(row) for row in each] for each in rows]
    assert rows[0] != rows[1] and {frozenset(row) for row in rows[0]} != {frozenset(row) for row in rows[1]}


def test_rows_of_a_batch_hold_padding_only_at_their_end(shards):
    batch = loader_of(shards, 20, 12, 0).batch(0)
    padded = batch.doc_ids == NO_DOCUMENT
    assert (batch.tokens[padded] == PAD).all() and (batch.tokens[~padded] != PAD).all()
    assert (padded[:, 1:] >= padded[:, :-1]).all()


def test_a_loader_with_nothing_that_fits_says_so(tmp_path):
    write_shards(tmp_path / "none", [])
    write_shards(tmp_path / "long", [[1] * 9])
    for name in ("none", "long"):
        with pytest.raises(UserError, match=rf"{name}.*raise train\.seq_len"):
            Rows(name, Shards(tmp_path / name), 8, 0)


def test_rows_are_packed_once_and_found_beside_the_shards(tmp_path, monkeypatch):
    path = write_two_shards(tmp_path / "tokens")
    first = Rows("x", Shards(path), 4, 0, path)
    monkeypatch.setattr("nanochameleon.data.loader.pack_all", None)
    again = Rows("x", Shards(path), 4, 0, path)
    assert [again.documents(i) for i in range(9)] == [first.documents(i) for i in range(9)]
    (path / "rows-4-0-edges.npy").unlink()  # as if killed between the two files
    with pytest.raises(TypeError):
        Rows("x", Shards(path), 4, 0, path)


@given(st.integers(1, 300), st.lists(st.integers(0, 2**32), max_size=3))
def test_shuffled_is_a_permutation(n, seed):
    assert sorted(shuffled(i, n, *seed) for i in range(n)) == list(range(n))


def test_shuffled_orders_look_drawn():
    """Each place is reached about equally often over many seeds, and no neighbour stays one more often than by luck."""
    n, orders = 8, np.array([[shuffled(i, 8, seed) for i in range(8)] for seed in range(4_000)])
    for place in range(n):
        counts = np.bincount(orders[:, place], minlength=n)
        assert abs(counts - 500).max() < 5 * (500 * 7 / 8) ** 0.5
    followed = (orders[:, 1:] - orders[:, :-1] == 1).mean()
    assert abs(followed - 1 / n) < 5 * (1 / n / (4_000 * 7)) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Stages


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """Rows of documents of one id each, 2 + their number, or 1000 + their number."""
    place = tmp_path_factory.mktemp("two")
    write_shards(place / "a", [[2 + i] * 4 for i in range(50)])
    write_shards(place / "b", [[1_000 + i] * 4 for i in range(30)])
    return {name: Rows(name, Shards(place / name), 4, 0) for name in "ab"}


def of_each(loader: Loader, first: int, last: int) -> Counter:
    rows = (loader.batch(step).tokens[:, 0].tolist() for step in range(first, last))
    return Counter("a" if token < 1_000 else "b" for row in rows for token in row)


def test_each_stage_has_its_shares_of_the_rows(two_sources):
    stages = [(0, {"a": 3.0, "b": 1.0}), (500, {"b": 1.0}), (600, {"a": 0.5, "b": 0.5})]
    loader = Loader(two_sources, stages, 2, 4, 7, PAD)
    assert of_each(loader, 0, 500) == {"a": 750, "b": 250}
    assert of_each(loader, 500, 600) == {"b": 200}
    assert of_each(loader, 600, 1_100) == {"a": 500, "b": 500}


def test_no_row_comes_again_before_all_of_its_source_came_whatever_the_stage(two_sources):
    stages = [(0, {"a": 0.5, "b": 0.5}), (13, {"a": 1.0}), (20, {"b": 0.3, "a": 0.7})]
    loader = Loader(two_sources, stages, 3, 4, 7, PAD)
    seen = {"a": [], "b": []}
    for row in range(400):
        name, count = loader.place(row)
        assert count == len(seen[name])
        seen[name].append(int(loader.batch(row // 3, slice(row % 3, row % 3 + 1)).tokens[0, 0]))
    for name, size in (("a", 50), ("b", 30)):
        for epoch in range(len(seen[name]) // size):
            assert len(set(seen[name][epoch * size : (epoch + 1) * size])) == size


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=4), st.integers(0, 9), st.integers(0, 3_000))
@settings(max_examples=30)
def test_what_a_source_has_given_is_counted_without_drawing(weights, seed, n):
    shares = Shares({f"s{k}": w for k, w in enumerate(weights)}, seed)
    assert shares.given(n) == {f"s{k}": sum(shares.draw(i)[0] == k for i in range(n)) for k in range(len(weights))}


def test_stages_and_seeds_do_not_share_their_draws():
    weights, row = {"a": 0.5, "b": 0.5}, range(60)
    drawn = {
        (seed, stage): [Shares(weights, seed, stage).draw(i)[0] for i in row] for seed in (0, 1) for stage in (0, 1)
    }
    assert len({tuple(order) for order in drawn.values()}) == len(drawn)


# ---------------------------------------------------------------------------------------------------------------------
# Documents that are made when they are asked for


def test_live_documents_are_those_of_the_shards(tmp_path):
    class Levels:
        size = None

        def document(self, i):
            doc = [RawImage(grey(i % 7)), Text("a" * (i % 5)), EndOfTurn(), Text("ta")]
            return doc[i % 2 :]

    image_tokenizer = LevelTokenizer()
    image_tokenizer.n_codes_per_image = 2
    live = Live(Levels(), image_tokenizer, TOKENIZER, 120, None)
    expected = [render(fuse([Levels().document(i)], image_tokenizer)[0], TOKENIZER, TOKENIZER.vocab) for i in range(40)]
    assert [ids.tolist() for ids in live.fetch(range(len(live.lengths)))] == expected[: len(live.lengths)]
    assert live.sizes(0, 99).tolist() == [len(ids) for ids in expected[: len(live.lengths)]]
    assert live.lengths[:-1].sum() < 120 <= live.lengths.sum()
    assert Live(Levels(), image_tokenizer, TOKENIZER, 1, 3).groups == [(0, 3)]
