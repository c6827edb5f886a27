"""Streaming: the events of a sample are what generate returns, and no piece of text splits a character."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import MODEL, PARAMS, prompts
from tiny import N_CODES, TOKENIZER, VOCAB

from nanochameleon.documents import Image, Text, parse
from nanochameleon.generation.engine import generate
from nanochameleon.generation.events import Detokenizer, End, ImageStarted, PartialImage, stream


@settings(max_examples=25)
@given(prompts(), st.sampled_from(["text", "image", "both"]), st.integers(0, 99), st.sampled_from([None, 1, 3]))
def test_a_stream_yields_what_generate_returns(prompt, modality, seed, preview):
    params = replace(PARAMS, temperature=100.0, top_p=1.0)
    streamed = list(stream(MODEL, prompt, TOKENIZER, N_CODES, params, modality, seed, row=2, preview=preview))
    new = generate(MODEL, [prompt] * 3, VOCAB, N_CODES, params, modality, seed)[2]
    assert streamed[-1] == End(tuple(new)) and End not in map(type, streamed[:-1])
    segments = [event for event in streamed if isinstance(event, Text | Image)]
    joined = [segments[0]] if segments else []
    for segment in segments[1:]:
        if isinstance(segment, Text) and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + segment.text)
        else:
            joined.append(segment)
    before = [s for s in parse_open(prompt) if isinstance(s, Image)]
    everything = [s for s in parse(prompt + new, TOKENIZER, VOCAB) if isinstance(s, Image)]
    assert [s for s in joined if isinstance(s, Image)] == everything[len(before) :]
    letters = [token for token in new if VOCAB.is_text(token)]
    if not any(isinstance(s, Image) for s in joined):
        assert "".join(s.text for s in joined) == TOKENIZER.decode(letters)
    assert streamed.count(ImageStarted()) == len(everything) - len(before)


def test_an_image_is_streamed_while_it_grows():
    streamed = list(stream(MODEL, [VOCAB.bos, VOCAB.boi], TOKENIZER, N_CODES, PARAMS, "image", preview=2))
    assert [type(event) for event in streamed] == [ImageStarted, PartialImage, PartialImage, Image, End]
    assert streamed[1].codes == streamed[3].codes[:2] and streamed[2].codes == streamed[3].codes


def parse_open(prompt):
    """The prompt's segments, an open image at its end left out."""
    start = max((i for i, token in enumerate(prompt) if token == VOCAB.boi), default=0)
    return parse(prompt if VOCAB.eoi in prompt[start:] or not start else prompt[:start], TOKENIZER, VOCAB)


def test_pieces_of_text_never_split_a_character():
    """Each byte is a token; a character appears with its last byte, a broken one where it breaks."""
    words = "é日\U0001f44d".encode() + b"\xe6\x97" + b"a"
    tokens = [VOCAB.first_text + byte for byte in words]
    tokens += [VOCAB.boi, *range(4, 8), VOCAB.eoi, VOCAB.first_text + 0xC3, VOCAB.eos]
    detokenizer = Detokenizer([VOCAB.bos], TOKENIZER)
    streamed = [event for i, token in enumerate(tokens) for event in detokenizer.add([token], i == len(tokens) - 1)]
    texts = [event.text for event in streamed if isinstance(event, Text)]
    assert texts == ["é", "日", "\U0001f44d", "\ufffda", "\ufffd"]
    assert [type(event) for event in streamed[-4:]] == [ImageStarted, Image, Text, End]


def test_boi_as_a_stop_starts_no_image():
    detokenizer, letter = Detokenizer([VOCAB.bos], TOKENIZER), VOCAB.first_text + 65
    streamed = [*detokenizer.add([letter], False), *detokenizer.add([letter, VOCAB.boi], True)]
    assert streamed == [Text("A"), Text("A"), End((letter, letter, VOCAB.boi))]
