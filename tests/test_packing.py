"""Packing: every document whole, exactly once, kept apart from its neighbours; targets never cross a boundary."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.packing import IGNORE, NO_DOCUMENT, best_fit, collate, pack

PAD = 1


@st.composite
def documents_and_seq_len(draw):
    """Documents whose tokens are all different, so that each tells where it came from, and a sequence length."""
    lengths = draw(st.lists(st.integers(1, 12), max_size=30))
    seq_len = draw(st.integers(max(lengths, default=1), 40))
    ends = np.cumsum([PAD + 1, *lengths])
    return [list(range(a, b)) for a, b in itertools.pairwise(ends)], seq_len


def runs(doc_ids):
    """[0 0 1 1 1 -1] -> [(0, 0, 2), (1, 2, 5), (-1, 5, 6)]"""
    edges = [0, *(np.flatnonzero(np.diff(doc_ids)) + 1), len(doc_ids)]
    return [(int(doc_ids[a]), int(a), int(b)) for a, b in itertools.pairwise(edges)]


@given(documents_and_seq_len())
def test_each_document_is_whole_in_order_and_exactly_once(case):
    docs, seq_len = case
    batch = pack(docs, seq_len, PAD)
    found = []
    for tokens, doc_ids, positions in zip(batch.tokens, batch.doc_ids, batch.positions, strict=True):
        in_sequence = []
        for number, a, b in runs(doc_ids.numpy()):
            if number == NO_DOCUMENT:
                assert b == seq_len and (tokens[a:b] == PAD).all()
                continue
            assert number == len(in_sequence)
            assert positions[a:b].tolist() == list(range(b - a))
            in_sequence.append(tokens[a:b].tolist())
        assert in_sequence == sorted(
            in_sequence
        )  # tokens grow from document to document: the order given is kept within a sequence
        found += in_sequence
    assert sorted(found) == docs
    assert batch.tokens.shape[1:] == (seq_len,) and (batch.tokens == PAD).sum() == (batch.doc_ids == NO_DOCUMENT).sum()


@given(documents_and_seq_len())
def test_a_target_is_the_next_token_of_the_same_document_or_ignored(case):
    docs, seq_len = case
    batch = pack(docs, seq_len, PAD)
    follows = {a: b for doc in docs for a, b in itertools.pairwise(doc)}
    for token, target in zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True):
        assert target == follows.get(token, IGNORE)
    assert (batch.targets != IGNORE).sum() == sum(len(doc) - 1 for doc in docs)


@given(documents_and_seq_len())
def test_no_two_sequences_would_have_fitted_in_one(case):
    docs, seq_len = case
    lengths = [len(doc) for doc in docs]
    sequences = best_fit(lengths, seq_len)
    used = np.bincount(sequences, lengths)
    assert sorted(set(sequences.tolist())) == list(range(len(used))) and (used <= seq_len).all()
    assert all(used[i] + used[j] > seq_len for j in range(len(used)) for i in range(j))


def test_a_document_goes_where_it_fills_most():
    assert best_fit([7, 5, 3, 4, 1], 10).tolist() == [0, 1, 0, 1, 1]


@pytest.mark.parametrize("docs", [[[5, 6], []], [[5] * 9]])
def test_a_document_that_is_empty_or_longer_than_a_sequence_is_refused(docs):
    with pytest.raises(ValueError, match=f"document {len(docs) - 1} has {len(docs[-1])} tokens"):
        pack(docs, 8, PAD)


def test_sequences_of_a_batch_can_be_taken_apart():
    batch = pack([[5, 6, 7], [8, 9, 10], [11, 12]], 4, PAD)
    part = batch[1:3]
    assert part.tokens.tolist() == [[8, 9, 10, 1], [11, 12, 1, 1]]
    assert part.targets[0].tolist() == [9, 10, IGNORE, IGNORE]


@given(st.lists(st.lists(st.integers(10, 20), max_size=4), min_size=1, max_size=7))
def test_only_the_answers_of_a_conversation_are_learnt_up_to_their_end(turns):
    """Turns end with 3, the last one with 2: the second, fourth, ... is an answer, and its end is learnt with it."""
    tokens, learnt = [0], []
    for number, turn in enumerate(turns):
        end = 2 if number == len(turns) - 1 else 3
        tokens += [*turn, end]
        learnt += [*turn, end] if number % 2 else []
    batch = collate([[tokens]], 40, PAD, assistant_eot=3)
    targets = batch.targets[0]
    assert targets[targets != IGNORE].tolist() == learnt
    everything = collate([[tokens]], 40, PAD).targets[0]
    assert torch.equal(targets[targets != IGNORE], everything[targets != IGNORE])


# ---------------------------------------------------------------------------------------------------------------------
# Where documents begin


@given(st.lists(st.lists(st.integers(1, 7), max_size=4), min_size=1, max_size=5), st.integers(28, 40))
def test_documents_are_runs_of_one_id(lengths, seq_len):
    batch = collate([[[9] * n for n in row] for row in lengths], seq_len, PAD)
    ids, cu_seqlens, max_len = batch.to("cpu").documents
    expected = [seq_len * row + a for row, of_row in enumerate(batch.doc_ids.numpy()) for _, a, _ in runs(of_row)]
    assert torch.equal(ids, batch.doc_ids) and cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist()[: len(expected)] == expected
    assert set(cu_seqlens.tolist()[len(expected) :]) == {len(lengths) * seq_len}  # where the last one ends
    longest = int(cu_seqlens.diff().max())
    assert longest <= max_len <= min(2 * longest, seq_len) and int(cu_seqlens.diff().sum()) == ids.numel()
    one_each = len(expected) == len(lengths)
    assert batch.to("cpu").documents.one_a_sequence() == one_each
    for number in [] if one_each else [len(cu_seqlens)] + [max_len] * (max_len < seq_len):
        assert number & (number - 1) == 0  # a power of two: few shapes, so a compiled model is compiled few times


def test_documents_follow_their_batch():
    batch = pack([[5] * 3, [6] * 5, [7] * 6], 8, PAD)
    assert batch.documents is None  # nobody has asked yet
    moved = batch.to("cpu")
    assert moved.to("cpu").documents is not None and moved[:1].documents is None  # they would be the whole batch's
    assert moved[:1].to("cpu").documents.cu_seqlens.tolist() == [0, 3, 8, 8]


def test_an_id_that_comes_back_needs_a_mask():
    assert Documents.of(torch.tensor([[0, 1, 0], [2, 2, 2]])).cu_seqlens is None
    assert Documents.of(torch.tensor([[0, 0, 1], [1, 0, 0]])).cu_seqlens.tolist() == [0, 2, 3, 4, 6, 6, 6, 6]


@given(st.lists(st.lists(st.sampled_from([-1, 0, 1, 2, 1_000_003]), min_size=6, max_size=6), min_size=1, max_size=4))
def test_documents_are_known_where_no_id_comes_back(rows):
    comes_back = any(len(set(row)) < len(list(runs(np.array(row)))) for row in rows)
    assert (Documents.of(torch.tensor(rows)).cu_seqlens is None) == comes_back


def test_ids_elsewhere_are_not_read():
    """Reading them would wait for the GPU."""
    documents = Documents.of(torch.zeros(2, 8, dtype=torch.long, device="meta"))
    assert documents.cu_seqlens is None and documents.max_len == 8
