"""Messages and turns: what is sent comes back as it was, and the order of turns says who speaks."""

import asyncio
import json

from hypothesis import given
from hypothesis import strategies as st
from tiny import N_CODES
from tiny_site import tiny_site

from nanochameleon.documents import Image, Text
from nanochameleon.web.conversation import Turn
from nanochameleon.web.openai.chat import add_text, message
from nanochameleon.web.openai.messages import read_messages

SITE = tiny_site()
codes = st.lists(st.integers(0, 7), min_size=N_CODES, max_size=N_CODES)
answers = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), codes), max_size=6)
USER = {"role": "user", "content": "more"}


def read(messages: list) -> list[Turn]:
    return asyncio.run(read_messages({"messages": json.loads(json.dumps(messages))}, SITE))


def joined(segments) -> list:
    """Text as one piece between images, and none where it is empty."""
    parts: list = []
    for segment in segments:
        if isinstance(segment, Image):
            parts.append(segment.codes)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += segment.text
        elif segment.text:
            parts.append(segment.text)
    return parts


def sent(answer: list) -> dict:
    """The message that says an answer."""
    parts: list[dict] = []
    for piece in answer:
        if isinstance(piece, str):
            add_text(parts, piece)
        else:
            url = {"url": "data:image/png;base64,never read"}
            parts.append({"type": "image_url", "image_url": url, "codes": piece})
    return message(parts)


@given(answers)
def test_a_message_that_is_sent_back_is_the_answer_as_it_was(answer):
    said = sent(answer)
    turns = read([USER, said, USER])
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    expected = joined([Text(piece) if isinstance(piece, str) else Image(tuple(piece)) for piece in answer])
    assert joined(turns[1].segments) == expected
    assert said["content"] == "".join(piece for piece in answer if isinstance(piece, str))
    assert ("images" in said) == any(isinstance(piece, list) for piece in answer)


@given(st.lists(st.tuples(st.sampled_from(["user", "system", "developer", "assistant"]), st.text("abc", min_size=1))))
def test_turns_alternate_and_nothing_is_lost(said):
    messages = [USER, *({"role": role, "content": text} for role, text in said), USER]
    turns = read(messages)
    assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2) + ["user"]
    texts = [segment.text for turn in turns for segment in turn.segments]
    assert [text for text in texts if text != "\n"] == ["more", *(text for _, text in said), "more"]
    assert texts.count("\n") == len(messages) - len(turns)  # a line each


def test_without_parts_the_images_come_last():
    image = {"type": "image_url", "codes": [0, 1, 2, 3]}
    [_, turn, _] = read([USER, {"role": "assistant", "content": "a", "images": [image]}, USER])
    assert turn.segments == (Text("a"), Image((0, 1, 2, 3)))
