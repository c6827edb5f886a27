"""Conversations in JSON -> what the model reads: which turns, in which mode, and never a special token from text."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_site import tiny_run

from nanochameleon.documents import EndOfTurn, Image, Text, parse
from nanochameleon.web.conversation import ASSISTANT, USER, Turn, prompt_tokens, read_turns, resolve
from nanochameleon.web.refusals import Refused

RUN = tiny_run()
IMAGE, OTHER = Image((1, 2, 3, 4)), Image((5, 6, 7, 0))
CODES = st.lists(st.integers(0, 7), min_size=4, max_size=4)
SEGMENTS = st.lists(
    st.one_of(st.builds(lambda text: {"text": text}, st.text()), st.builds(lambda codes: {"codes": codes}, CODES)),
    max_size=4,
)
TURNS = st.lists(st.builds(lambda s: {"role": USER, "segments": s}, SEGMENTS), min_size=1, max_size=3)


def said(*segments: Text | Image | str, role: str = USER) -> Turn:
    return Turn(role, tuple(Text(s) if isinstance(s, str) else s for s in segments))


def answered(*segments: Text | Image | str) -> Turn:
    return said(*segments, role=ASSISTANT)


@given(TURNS, st.sampled_from(["draw", "chat", "text", "free"]))
def test_the_prompt_parses_back_to_what_was_said(turns, mode):
    read = read_turns(json.loads(json.dumps({"turns": turns})), RUN)
    _, document = resolve(mode, read, RUN)
    tokens = prompt_tokens(document, RUN, mode)
    tokens = tokens[:-1] if mode == "draw" else tokens  # without <boi>
    joined: list = []
    for segment in [*document, *[EndOfTurn()] * (mode == "chat")]:
        if isinstance(segment, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + segment.text)
        elif segment != Text(""):
            joined.append(segment)
    assert parse(tokens, RUN.tokenizer, RUN.vocab) == joined


@pytest.mark.parametrize("spelling", ["<boi>", "</s>", "<s>", "<eot>", "<eoi>", "<pad>", "<image>", "<racm3:break>"])
def test_no_text_spells_a_special_token(spelling):
    turns = read_turns({"turns": [{"role": USER, "segments": [{"text": spelling}]}]}, RUN)
    tokens = prompt_tokens(resolve("text", turns, RUN)[1], RUN, "text")
    assert tokens[0] == RUN.vocab.bos and all(RUN.vocab.is_text(token) for token in tokens[1:])


def test_a_chat_reads_every_turn_and_ends_each():
    _, document = resolve("chat", [said("a"), answered(IMAGE, "b"), said("c")], RUN)
    assert document == [Text("a"), EndOfTurn(), IMAGE, Text("b"), EndOfTurn(), Text("c")]


def test_text_and_free_continue_one_document():
    for mode in ("text", "free"):
        assert resolve(mode, [said("a"), answered(IMAGE), said("c")], RUN)[1] == [Text("a"), IMAGE, Text("c")]


def test_drawing_reads_the_last_message_alone():
    assert resolve("draw", [said("a"), answered(IMAGE), said("c")], RUN)[1] == [Text("c")]


def test_a_question_is_about_the_last_image_and_what_followed_it():
    turns = [said("a"), answered(OTHER), said("b"), answered(IMAGE), said("c"), answered("d"), said("e")]
    assert resolve("answer", turns, RUN)[1] == [
        IMAGE, Text("c"), EndOfTurn(), Text("d"), EndOfTurn(), Text("e"),
    ]  # fmt: skip
    assert resolve("answer", [*turns[:-1], said(OTHER, "e")], RUN)[1] == [OTHER, Text("e")]
    own = [said("x", IMAGE, "c"), answered("d"), said("e")]
    assert resolve("answer", own, RUN)[1] == [IMAGE, Text("c"), EndOfTurn(), Text("d"), EndOfTurn(), Text("e")]
    assert resolve("answer", [said("a"), answered("b"), said("c")], RUN)[1] == [Text("c")]


@pytest.mark.parametrize(
    ("turns", "mode"),
    [
        ([said("a red star")], "draw"),
        ([said("how many?")], "draw"),  # there is no image to ask about
        ([said(IMAGE, "how many?")], "answer"),
        ([said(IMAGE)], "answer"),  # what is in it
        ([said("a"), answered(IMAGE), said("how many? ")], "answer"),
        ([said("a"), answered(IMAGE), said("a blue star")], "draw"),
    ],
)
def test_auto(turns, mode):
    assert resolve("auto", turns, RUN)[0] == mode


def test_auto_chats_with_an_aligned_run():
    train = dataclasses.replace(RUN.cfg.train, assistant_only_loss=True)
    aligned = dataclasses.replace(RUN, cfg=dataclasses.replace(RUN.cfg, train=train))
    for turns in ([said("a red star")], [said(IMAGE, "how many?")], [said("a"), answered(IMAGE), said("b")]):
        assert resolve("auto", turns, aligned)[0] == "chat"


@pytest.mark.parametrize("turns", [[], [answered("a")], [said("a"), answered("b")], [said()]])
def test_auto_needs_a_message(turns):
    with pytest.raises(Refused):
        resolve("auto", turns, RUN)


def test_an_answer_needs_a_question():
    with pytest.raises(Refused, match="needs a question"):
        resolve("answer", [said()], RUN)


BAD = [
    {}, {"turns": None}, {"turns": {}}, {"turns": []}, {"turns": [3]}, {"turns": [{"role": "system", "segments": []}]},
    {"turns": [{"role": USER}]}, {"turns": [{"role": USER, "segments": [{}]}]},
    {"turns": [{"role": USER, "segments": [{"text": "a", "codes": [1, 2, 3, 4]}]}]},
    {"turns": [{"role": USER, "segments": [{"text": 3}]}]},
    {"turns": [{"role": USER, "segments": [{"text": "\ud800"}]}]},
    {"turns": [{"role": USER, "segments": [{"text": "a" * 100_001}]}]},
    {"turns": [{"role": USER, "segments": [{"text": ""}] * 257}]}, {"turns": [{"role": USER, "segments": []}] * 257},
    *({"turns": [{"role": USER, "segments": [{"codes": codes}]}]} for codes in (
        None, "abcd", [], [1, 2, 3], [1, 2, 3, 8], [1, 2, 3, -1], [1, 2, 3, 4.0], [1, 2, 3, True], [1, 2, 3, 10**30],
    )),
]  # fmt: skip


@pytest.mark.parametrize("body", BAD)
def test_a_wrong_field_is_named(body):
    with pytest.raises(Refused) as refused:
        read_turns(body, RUN)
    assert refused.value.status == 400 and refused.value.param and "turns" in refused.value.param
