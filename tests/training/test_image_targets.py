"""Drawing from words: what noise may change, how much there is, and that the rest of the batch has no say in it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.config import TrainConfig
from nanochameleon.documents import EndOfTurn, Image, Text, render
from nanochameleon.packing import IGNORE, pack
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.image_targets import (
    corrupt_image_tokens,
    next_of_other_document,
    noise_fraction,
    without_read_images,
)
from nanochameleon.vocab import Vocab

N = 16  # codes an image
VOCAB = Vocab.toy(40, 0)
TOKENIZER = TextTokenizer([], VOCAB)

images = st.lists(st.integers(0, 39), min_size=N, max_size=N).map(lambda codes: Image(tuple(codes)))
segments = images | st.just(Text("ab")) | st.just(EndOfTurn())
documents = st.lists(st.lists(segments, max_size=4), min_size=1, max_size=8)


def batch_of(docs):
    """-> the batch, and of each of its places whether it holds a code of an image that opens its document, (B, T)."""
    batch = pack([render(doc, TOKENIZER, VOCAB) for doc in docs], 96, VOCAB.pad)
    opening = torch.zeros_like(batch.tokens, dtype=torch.bool)
    for row, t in (batch.tokens == VOCAB.bos).nonzero().tolist():
        if batch.tokens[row, t + 1 : t + 2].tolist() == [VOCAB.boi]:
            opening[row, t + 2 : t + 2 + N] = True
    return batch, opening


@given(documents)
def test_codes_that_open_a_document_are_no_targets_and_all_others_stay(docs):
    batch, opening = batch_of(docs)
    alone = without_read_images(batch, N, VOCAB)
    target_opens = opening.roll(-1, 1)  # the target at t is the token at t + 1
    assert torch.equal(alone.targets, batch.targets.masked_fill(target_opens, IGNORE))
    for name in ("tokens", "doc_ids", "positions"):
        assert torch.equal(getattr(alone, name), getattr(batch, name))


@given(documents, st.integers(0, 99))
def test_noise_touches_codes_that_are_drawn_and_no_target(docs, seed):
    batch, opening = batch_of(docs)
    before = batch.tokens.clone()
    read = corrupt_image_tokens(batch, 1.0, N, VOCAB, seed, range(len(batch.tokens)))
    assert torch.equal(batch.tokens, before)
    changed = read.tokens != batch.tokens
    assert not changed[opening | ~VOCAB.is_image(batch.tokens)].any()
    assert VOCAB.is_image(read.tokens[changed]).all()
    for name in ("targets", "doc_ids", "positions"):
        assert torch.equal(getattr(read, name), getattr(batch, name))


def drawings(n, n_rows):
    """n_rows rows of n drawn images each; image k of a row has code k everywhere."""
    docs = [[Text("ab"), Image((k % n,) * N)] for k in range(n * n_rows)]
    return pack([render(doc, TOKENIZER, VOCAB) for doc in docs], n * (N + 6), VOCAB.pad)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9).map(sorted))
def test_a_partner_is_the_next_image_of_another_document(documents):
    documents = np.array(documents)
    for i, j in enumerate(next_of_other_document(documents)):
        between = (np.arange(i, i + (j - i) % len(documents))) % len(documents)
        assert (documents[between] == documents[i]).all()
        assert documents[j] != documents[i] or (j == i and len(set(documents)) == 1)


def test_a_code_is_that_of_the_rows_next_image_at_the_same_place():
    batch = drawings(3, 1)
    codes = torch.arange(3)[:, None].expand(3, N).clone()
    codes[:, 5] += 10
    batch.tokens[VOCAB.is_image(batch.tokens)] = (codes + VOCAB.first_code).flatten()
    read = corrupt_image_tokens(batch, 1.0, N, VOCAB, 0, [0])
    found = read.tokens[VOCAB.is_image(read.tokens)].view(3, N) - VOCAB.first_code
    assert ((found == codes) | (found == codes.roll(-1, 0))).all() and (found != codes).any()


def test_each_image_has_its_own_fraction_up_to_the_largest():
    """A fraction drawn from 0 to 0.8: mean 0.4, and images differ by more than 16 draws of 0.4 would."""
    batch = drawings(2, 400)
    read = corrupt_image_tokens(batch, 0.8, N, VOCAB, 0, range(400))
    kinds = VOCAB.is_image(batch.tokens)
    shares = (read.tokens != batch.tokens)[kinds].view(-1, N).float().mean(1)
    assert abs(shares.mean() - 0.4) < 0.03
    assert 0.22 < shares.std() < 0.29  # uniform 0.23 and the draws' 0.12; a fixed fraction would have 0.12 alone
    assert torch.equal(corrupt_image_tokens(batch, 0.0, N, VOCAB, 0, range(400)).tokens, batch.tokens)


@given(st.floats(0, 1), st.none() | st.floats(0, 1), st.integers(1, 50))
def test_the_fraction_goes_evenly_from_the_first_step_to_the_last(first, last, steps):
    cfg = TrainConfig(steps=steps, image_token_noise=first, image_token_noise_end=last)
    fractions = [noise_fraction(step, cfg) for step in range(steps)]
    assert fractions[0] == first
    if last is None:
        assert set(fractions) == {first}
    elif steps > 1:
        assert fractions == pytest.approx(np.linspace(first, last, steps))


@given(st.integers(0, 9), st.integers(0, 9))
def test_noise_is_a_function_of_seed_and_row_number(seed, first):
    batch = drawings(2, 6)
    whole = corrupt_image_tokens(batch, 1.0, N, VOCAB, seed, range(first, first + 6))
    part = corrupt_image_tokens(batch[2:5], 1.0, N, VOCAB, seed, range(first + 2, first + 5))
    assert torch.equal(whole.tokens[2:5], part.tokens)
    other = corrupt_image_tokens(batch, 1.0, N, VOCAB, seed + 1, range(first, first + 6))
    assert not np.array_equal(whole.tokens, other.tokens)
