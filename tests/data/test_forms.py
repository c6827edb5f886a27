"""Raw documents: their forms, mixtures of sources, and documents that are tokenized on the fly."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOKENIZER

from nanochameleon.data import Mixture, OnTheFly, RawImage, captioned, fuse, interleaved, pair, question_answer
from nanochameleon.data.mixture import BLOCK
from nanochameleon.documents import EndOfTurn, Image, Text, render
from nanochameleon.errors import UserError


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
def test_every_thousand_documents_hold_each_source_s_fraction(weights, seed, block):
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
def test_a_mixture_with_an_impossible_fraction_is_refused(weights):
    with pytest.raises(UserError, match="mixture"):
        Mixture({f"s{k}": (Numbered("s", None), w) for k, w in enumerate(weights)}, 0)


# ---------------------------------------------------------------------------------------------------------------------
# On the fly


def test_documents_tokenized_on_the_fly_are_those_of_the_shards(tmp_path):
    class Levels:
        size = None

        def document(self, i):
            doc = [RawImage(grey(i % 7)), Text("a" * (i % 5)), EndOfTurn(), Text("ta")]
            return doc[i % 2 :]

    image_tokenizer = LevelTokenizer()
    image_tokenizer.n_codes_per_image = 2
    docs = OnTheFly(Levels(), image_tokenizer, TOKENIZER, 120, None)
    expected = [render(fuse([Levels().document(i)], image_tokenizer)[0], TOKENIZER, TOKENIZER.vocab) for i in range(40)]
    assert [ids.tolist() for ids in docs.fetch(range(len(docs.lengths)))] == expected[: len(docs.lengths)]
    assert docs.sizes(0, 99).tolist() == [len(ids) for ids in expected[: len(docs.lengths)]]
    assert docs.lengths[:-1].sum() < 120 <= docs.lengths.sum()
    assert OnTheFly(Levels(), image_tokenizer, TOKENIZER, 1, 3).groups == [(0, 3)]
