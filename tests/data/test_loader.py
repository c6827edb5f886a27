"""The loader: every batch is a pure function of seed and step, and every stage has its fractions."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from written import flip, write_two_shards

from nanochameleon.data import Fractions, Loader, PackedDocuments, Shards, write_shards
from nanochameleon.data.loader import shuffled
from nanochameleon.errors import UserError
from nanochameleon.packing import NO_DOCUMENT

PAD = 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """60 documents of 1 to 12 tokens, document i of the token 2 + i alone; ten of them are longer than 10."""
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
    return Loader(
        {"all": PackedDocuments("all", shards, seq_len, seed)}, [(0, {"all": 1.0})], batch_size, seq_len, seed, PAD
    )


@pytest.mark.parametrize("seed", range(3))
def test_every_epoch_shows_each_document_that_fits_exactly_once(shards, seed):
    loader = loader_of(shards, 1, 10, seed)
    n_rows = len(loader.sources["all"])
    short = sorted(ids.tolist() for ids in shards if len(ids) <= 10)
    epochs = [[documents_in(loader.batch(e * n_rows + r)) for r in range(n_rows)] for e in range(3)]
    for epoch in epochs:
        assert sorted(ids for row in epoch for ids in row) == short
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.sources["all"].n_too_long == 10


@given(st.integers(1, 40), st.integers(0, 3), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_step_alone(shards, batch_size, seed, steps):
    one_by_one = loader_of(shards, 1, 12, seed)
    used = loader_of(shards, batch_size, 12, seed)
    for step in steps:
        resumed = loader_of(shards, batch_size, 12, seed).batch(step)
        for name in ("tokens", "targets", "doc_ids", "positions"):
            assert torch.equal(getattr(used.batch(step), name), getattr(resumed, name))
        # the order of sequences does not depend on the batch size
        rows = [one_by_one.batch(step * batch_size + b).tokens for b in range(batch_size)]
        assert torch.equal(torch.cat(rows), resumed.tokens)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9))
def test_the_slices_of_all_ranks_make_the_batch(shards, ranks, each, step):
    loader = loader_of(shards, ranks * each, 12, 0)
    slices = [loader.batch(step, slice(r * each, (r + 1) * each)).tokens for r in range(ranks)]
    assert torch.equal(torch.cat(slices), loader.batch(step).tokens)


def test_another_seed_shuffles_sequences_and_packs_other_documents_together(shards):
    loaders = [loader_of(shards, 1, 12, seed) for seed in (0, 1)]
    rows = [[next(x.sequences(step))[1] for step in range(len(x.sources["all"]))] for x in loaders]
    rows = [[tuple(row) for row in each] for each in rows]
    assert rows[0] != rows[1] and {frozenset(row) for row in rows[0]} != {frozenset(row) for row in rows[1]}


def test_sequences_hold_padding_only_at_their_end(shards):
    batch = loader_of(shards, 20, 12, 0).batch(0)
    padded = batch.doc_ids == NO_DOCUMENT
    assert (batch.tokens[padded] == PAD).all() and (batch.tokens[~padded] != PAD).all()
    assert (padded[:, 1:] >= padded[:, :-1]).all()


def test_a_loader_with_nothing_that_fits_says_so(tmp_path):
    write_shards(tmp_path / "none", [])
    write_shards(tmp_path / "long", [[1] * 9])
    for name in ("none", "long"):
        with pytest.raises(UserError, match=rf"{name}.*raise train\.seq_len"):
            PackedDocuments(name, Shards(tmp_path / name), 8, 0)


def test_documents_are_packed_once_and_kept_next_to_the_shards(tmp_path, monkeypatch):
    path = write_two_shards(tmp_path / "tokens")
    first = PackedDocuments("x", Shards(path), 4, 0, path)
    monkeypatch.setattr("nanochameleon.data.loader.pack_all", None)
    again = PackedDocuments("x", Shards(path), 4, 0, path)
    assert [again.sequence(i) for i in range(9)] == [first.sequence(i) for i in range(9)]
    (path / "packed-4-0-starts.npy").unlink()  # as if killed between the two files
    with pytest.raises(TypeError):
        PackedDocuments("x", Shards(path), 4, 0, path)


@given(st.integers(1, 300), st.lists(st.integers(0, 2**32), max_size=3))
def test_shuffled_is_a_permutation(n, seed):
    assert sorted(shuffled(i, n, *seed) for i in range(n)) == list(range(n))


def test_shuffled_orders_look_random():
    """Each place is reached about equally often over many seeds, and neighbours stay together as often as by chance."""
    n, orders = 8, np.array([[shuffled(i, 8, seed) for i in range(8)] for seed in range(4_000)])
    for place in range(n):
        counts = np.bincount(orders[:, place], minlength=n)
        assert abs(counts - 500).max() < 5 * (500 * 7 / 8) ** 0.5
    followed = (orders[:, 1:] - orders[:, :-1] == 1).mean()
    assert abs(followed - 1 / n) < 5 * (1 / n / (4_000 * 7)) ** 0.5


def cut_to_26_bytes(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:26])


@pytest.mark.parametrize("name", ["packed-4-0-starts.npy", "packed-4-0-documents.npy", "packed-4-0.json"])
@pytest.mark.parametrize("damage", [cut_to_26_bytes, lambda file: flip(file, 9), lambda file: flip(file, -1, 4)])
def test_damaged_sequences_are_packed_again_with_a_warning(name, damage, tmp_path, capsys):
    path = write_two_shards(tmp_path / "tokens")
    packed = PackedDocuments("x", Shards(path), 4, 0, path)
    expected = [packed.sequence(i) for i in range(9)]
    damage(path / name)
    again = PackedDocuments("x", Shards(path), 4, 0, path)
    assert [again.sequence(i) for i in range(9)] == expected
    assert f"packing documents again: {path / name}" in capsys.readouterr().err
    PackedDocuments("x", Shards(path), 4, 0, path)
    assert capsys.readouterr().err == ""


def test_sequences_of_other_shards_are_packed_again(tmp_path):
    path = write_two_shards(tmp_path / "tokens")
    PackedDocuments("x", Shards(path), 4, 0, path)
    kept = {file.name: file.read_bytes() for file in path.glob("packed-*")}
    write_shards(path, [[1], [2]], shard_tokens=4)
    for name, content in kept.items():
        (path / name).write_bytes(content)
    assert PackedDocuments("x", Shards(path), 4, 0, path).sequence(0) in ([0, 1], [1, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Stages


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """Sequences of one document each, of the token 2 + its number, or 1000 + its number."""
    place = tmp_path_factory.mktemp("two")
    write_shards(place / "a", [[2 + i] * 4 for i in range(50)])
    write_shards(place / "b", [[1_000 + i] * 4 for i in range(30)])
    return {name: PackedDocuments(name, Shards(place / name), 4, 0) for name in "ab"}


def of_each(loader: Loader, first: int, last: int) -> Counter:
    rows = (loader.batch(step).tokens[:, 0].tolist() for step in range(first, last))
    return Counter("a" if token < 1_000 else "b" for row in rows for token in row)


def test_each_stage_has_its_fractions_of_the_sequences(two_sources):
    stages = [(0, {"a": 3.0, "b": 1.0}), (500, {"b": 1.0}), (600, {"a": 0.5, "b": 0.5})]
    loader = Loader(two_sources, stages, 2, 4, 7, PAD)
    assert of_each(loader, 0, 500) == {"a": 750, "b": 250}
    assert of_each(loader, 500, 600) == {"b": 200}
    assert of_each(loader, 600, 1_100) == {"a": 500, "b": 500}


def test_no_sequence_repeats_before_all_of_its_source_came_whatever_the_stage(two_sources):
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
def test_the_number_of_sequences_a_source_gave_needs_no_counting(weights, seed, n):
    fractions = Fractions({f"s{k}": w for k, w in enumerate(weights)}, seed)
    assert fractions.given(n) == {
        f"s{k}": sum(fractions.draw(i)[0] == k for i in range(n)) for k in range(len(weights))
    }


def test_stages_and_seeds_have_draws_of_their_own():
    weights, row = {"a": 0.5, "b": 0.5}, range(60)
    drawn = {
        (seed, stage): [Fractions(weights, seed, stage).draw(i)[0] for i in row] for seed in (0, 1) for stage in (0, 1)
    }
    assert len({tuple(order) for order in drawn.values()}) == len(drawn)
