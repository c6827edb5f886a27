"""A prompt that is too long keeps its start, its right end, and every image whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import N_CODES, VOCAB

from nanochameleon.errors import UserError
from nanochameleon.evaluate.fit import fit

IMAGE = [VOCAB.boi, *[VOCAB.first_code] * N_CODES, VOCAB.eoi]


def words(n: int) -> list[int]:
    return [VOCAB.first_text + i for i in range(n)]


@given(st.integers(0, 100), st.integers(1, 80))
def test_start_and_right_end_stay(length, room):
    prompt = [VOCAB.bos, *words(length)]
    kept, cut = fit(prompt, room, VOCAB)
    assert kept[0] == VOCAB.bos and len(kept) == min(length + 1, room) and cut == (length + 1 > room)
    assert kept[1:] == prompt[len(prompt) - len(kept) + 1 :]


@given(st.integers(0, 12), st.integers(0, 3), st.integers(0, 12), st.integers(1, 40))
def test_no_image_is_lost(before, images, after, room):
    prompt = [VOCAB.bos, *words(before), *IMAGE * images, *words(after)]
    if images and room < 1 + len(IMAGE) * images + after:
        with pytest.raises(UserError, match=f"has {len(prompt)} tokens, and the context has room for {room}: an image"):
            fit(prompt, room, VOCAB)
    else:
        kept, _ = fit(prompt, room, VOCAB)
        assert len(kept) <= room and kept.count(VOCAB.boi) == kept.count(VOCAB.eoi) == images


def test_nothing_is_the_start_alone_and_no_room_is_an_error():
    assert fit([], 1, VOCAB) == ([VOCAB.bos], False)
    with pytest.raises(UserError, match="nothing of it would be left"):
        fit([VOCAB.bos], 0, VOCAB)
