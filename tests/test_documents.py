"""Documents of text and images become tokens and come back; what no document renders to is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import any_text, tokenizers

from nanochameleon.documents import EndOfTurn, Image, Text, parse, render
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab


@st.composite
def documents(draw):
    """(document, tokenizer): texts that may be empty or neighbours, images of any length, turns."""
    tokenizer = draw(tokenizers())
    codes = st.lists(st.integers(0, tokenizer.vocab.n_codes - 1), max_size=9).map(tuple)
    segments = any_text.map(Text) | codes.map(Image) | st.just(EndOfTurn()) | st.just(Text(""))
    return draw(st.lists(segments, max_size=8)), tokenizer


def normal(doc):
    """Neighbouring texts joined, empty ones dropped."""
    out = []
    for segment in doc:
        if isinstance(segment, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + segment.text)
        elif segment != Text(""):
            out.append(segment)
    return out


@given(documents(), st.booleans(), st.integers(0, 3))
def test_parse_inverts_render(case, end, padding):
    doc, tokenizer = case
    vocab = tokenizer.vocab
    tokens = render(doc, tokenizer, vocab, end)
    assert parse(tokens + [vocab.pad] * padding, tokenizer, vocab) == normal(doc)


@given(documents())
def test_special_tokens_come_from_segments_alone(case):
    doc, tokenizer = case
    vocab = tokenizer.vocab
    tokens = render(doc, tokenizer, vocab)
    images = [segment.codes for segment in doc if isinstance(segment, Image)]
    assert tokens.count(vocab.bos) == tokens.count(vocab.eos) == 1 and (tokens[0], tokens[-1]) == (vocab.bos, vocab.eos)
    assert tokens.count(vocab.boi) == tokens.count(vocab.eoi) == len(images)
    assert tokens.count(vocab.eot) == doc.count(EndOfTurn())
    assert sum(vocab.modality(token) == "image" for token in tokens) == sum(map(len, images))


VOCAB = Vocab.toy(16, 0)
PLAIN = TextTokenizer([], VOCAB)
A = VOCAB.first_text + ord("a")


def test_the_order_of_tokens():
    doc = [Text("a"), Image((3, 0)), EndOfTurn(), Text("b")]
    expected = [0, A, VOCAB.boi, 4 + 3, 4 + 0, VOCAB.eoi, VOCAB.eot, A + 1, 2]
    assert render(doc, PLAIN, VOCAB) == expected
    assert render(doc, PLAIN, VOCAB, end=False) == expected[:-1]


def test_what_follows_the_end_is_not_read():
    assert parse([VOCAB.bos, A, VOCAB.eos, VOCAB.boi, A], PLAIN, VOCAB) == [Text("a")]


@given(documents(), st.data())
def test_a_document_that_breaks_off_inside_an_image_is_refused(case, data):
    doc, tokenizer = case
    vocab = tokenizer.vocab
    broken = render([*doc, Image((0, 0))], tokenizer, vocab, end=False)
    with pytest.raises(ValueError, match="no end"):
        parse(broken[: -data.draw(st.integers(1, 3))], tokenizer, vocab)


WRONG = {
    "a code outside an image": [VOCAB.bos, 4],
    "an end of image outside an image": [VOCAB.bos, VOCAB.eoi],
    "an unknown token": [VOCAB.bos, VOCAB.unk],
    "a reserved token": [VOCAB.bos, VOCAB.eot + 1],
    "an image in an image": [VOCAB.boi, 4, VOCAB.boi, 4, VOCAB.eoi],
    "text in an image": [VOCAB.boi, A, VOCAB.eoi],
    "padding in an image": [VOCAB.boi, VOCAB.pad, VOCAB.eoi],
    "a document's end in an image": [VOCAB.boi, 4, VOCAB.eos],
    "an open image": [VOCAB.boi, 4, 4],
    "a token beyond the vocabulary": [VOCAB.size],
    "a negative token": [-1],
}


@pytest.mark.parametrize("tokens", WRONG.values(), ids=WRONG)
def test_what_no_document_renders_to_is_refused(tokens):
    with pytest.raises(ValueError):
        parse(tokens, PLAIN, VOCAB)


@pytest.mark.parametrize("code", [-1, 16])
def test_a_code_that_is_none_is_refused(code):
    with pytest.raises(ValueError, match="outside"):
        render([Image((code,))], PLAIN, VOCAB)
