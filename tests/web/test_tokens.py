"""The sequence as the model sees it: tokens, pieces, probabilities, patches."""

import base64
import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image as Pillow
from starlette.testclient import TestClient
from strategies import any_text
from tiny import VOCAB
from tiny_site import tiny_run, tiny_site

from nanochameleon.documents import EndOfTurn, Image, Text, render
from nanochameleon.generation.prompts import Mode
from nanochameleon.web import tokens as see
from nanochameleon.web.app import application
from nanochameleon.web.conversation import Turn, prompt_tokens, resolve

RUN = tiny_run()
# Any text that hypothesis draws fits into this context.
LONG = dataclasses.replace(tiny.TINY_MODEL, max_seq_len=10_000)
BIG = dataclasses.replace(RUN, cfg=dataclasses.replace(RUN.cfg, model=LONG))
MODES: tuple[Mode, ...] = ("draw", "answer", "chat", "text", "free")
texts = st.text("a red\u00e9\U0001f600<", max_size=5).map(Text)
images = st.lists(st.integers(0, 7), min_size=4, max_size=4).map(lambda codes: Image(tuple(codes)))
segments = st.lists(texts | images, min_size=1, max_size=3).map(tuple)


@st.composite
def conversations(draw) -> list[Turn]:
    """One to four turns, the user's first and the two by turns; the user's end with words, as an answer needs."""
    roles = ["user", "assistant"] * 2
    return [Turn(role, draw(segments) + (Text("a"),) * (role == "user")) for role in roles[: draw(st.integers(1, 4))]]


def as_json(turns: list[Turn]) -> list[dict]:
    def segment(each):
        return {"text": each.text} if isinstance(each, Text) else {"codes": list(each.codes)}

    return [{"role": turn.role, "segments": [segment(each) for each in turn.segments]} for turn in turns]


def ask(turns: list[Turn], mode: str = "auto", run=RUN, **more) -> dict:
    """The route's answer, as JSON would bring it. The run BIG has no time for probabilities."""
    found = see.read_body({"turns": as_json(turns), "mode": mode, **more}, run)
    scores = see.score(run, found.tokens) if run is not BIG and 1 < len(found.tokens) <= 64 else None
    return json.loads(json.dumps(see.answer(run, found, scores)))


def ids(answer: dict) -> list[int]:
    return [token["id"] for token in answer["tokens"]]


@pytest.fixture(scope="module")
def client():
    with TestClient(application(tiny_site()), base_url="http://127.0.0.1") as client:
        yield client


# ---------------------------------------------------------------------------------------------------------------------
# The sequence


@given(conversations(), st.sampled_from(MODES))
def test_the_sequence_is_the_prompt_and_then_the_answer(turns, mode):
    *before, last = turns
    shown = ids(ask(turns, mode))
    if last.role == "user":
        assert shown == prompt_tokens(resolve(mode, turns, RUN)[1], RUN, mode)
        return
    prompt = prompt_tokens(resolve(mode, before, RUN)[1], RUN, mode)
    if mode == "draw":
        assert prompt.pop() == VOCAB.boi  # the answer's image brings it
    said = render(list(last.segments), tiny.TOKENIZER, VOCAB, end=False)[1:]
    assert shown == prompt + said
    assert ids(ask(turns, mode, stop="<eot>")) == [*shown, VOCAB.eot]


@given(conversations(), st.sampled_from(MODES))
def test_what_a_mode_does_not_read_is_counted(turns, mode):
    asked = turns if turns[-1].role == "user" else turns[:-1]
    read = [each for each in resolve(mode, asked, RUN)[1] if each != EndOfTurn()]
    assert ask(turns, mode)["left_out"] == sum(len(turn.segments) for turn in asked) - len(read)


@given(any_text)
def test_text_stays_text_whatever_it_spells(text):
    text = text.encode("utf-8", "replace").decode()
    answer = ask([Turn("user", (Text(text),))], "text", BIG)
    assert answer["counts"]["special"] == 1 and answer["counts"]["image"] == 0
    kinds = [answer["pieces"][str(each)]["kind"] for each in ids(answer)]
    assert kinds == ["special", *["text"] * (len(kinds) - 1)]


@given(any_text)
def test_pieces_and_characters_together_are_the_text(text):
    text = text.encode("utf-8", "replace").decode()
    answer = ask([Turn("user", (Text(text),))], "text", BIG)
    inside = {i for each in answer["characters"] for i in range(each["first"], each["last"] + 1)}
    ends = {each["last"]: each["text"] for each in answer["characters"]}
    shown = ""
    for i, each in enumerate(ids(answer)[1:], 1):
        piece = answer["pieces"][str(each)]
        assert ("bytes" in piece) <= (i in inside)  # bytes are never left alone where the text is whole
        shown += ends.get(i, "") if i in inside else piece["text"]
    assert shown == text


@given(st.lists(st.sampled_from([0x61, 0xC3, 0xA9, 0xE2, 0x98, 0x85, 0xF0, 0x9F, 0x80, 0xFF, None]), max_size=12))
@example([0xC3, None, 0xA9])
@example([0xE2, 0x98, None, 0x85, 0xE2, 0xC3, 0xA9])
@example([0xF0, 0x9F, 0x98, 0x80, 0x61])
def test_characters_are_those_of_the_bytes(data):
    """Byte tokens in any order, None a special token. Python's own decoder says which bytes are whole characters."""
    tokens = [VOCAB.eot if byte is None else VOCAB.first_text + byte for byte in data]
    expected, at = [], 0
    for run in bytes_between(data):
        for letter in run.decode("utf-8", "surrogateescape"):
            size = 1 if "\udc80" <= letter <= "\udcff" else len(letter.encode())
            expected += [{"first": at, "last": at + size - 1, "text": letter}] * (size > 1)
            at += size
        at += 1  # the special token
    assert see.split_characters(tokens, tiny.TOKENIZER) == expected


def bytes_between(data: list[int | None]) -> list[bytes]:
    """Split at None."""
    parts: list[list[int]] = [[]]
    for byte in data:
        if byte is None:
            parts.append([])
        else:
            parts[-1].append(byte)
    return [bytes(part) for part in parts]


@pytest.mark.parametrize(
    ("token", "name"),
    [(VOCAB.bos, "<s>"), (VOCAB.pad, "<pad>"), (VOCAB.eos, "</s>"), (VOCAB.boi, "<boi>"), (VOCAB.eoi, "<eoi>"),
     (VOCAB.eot, "<eot>"), (VOCAB.unk, "<unk>"), (VOCAB.eoi + 5, "<reserved00013>")],
)  # fmt: skip
def test_specials_have_names(token, name):
    assert see.piece(token, tiny.TOKENIZER) == {"kind": "special", "name": name}


def test_pieces_of_text_and_images():
    assert see.piece(VOCAB.code_to_token(7), tiny.TOKENIZER) == {"kind": "image", "code": 7}
    [re] = tiny.TOKENIZER.encode("re")
    assert see.piece(re, tiny.TOKENIZER) == {"kind": "text", "text": "re"}
    assert see.piece(VOCAB.first_text + 0xC3, tiny.TOKENIZER) == {"kind": "text", "bytes": "c3"}


def test_images_of_all_turns_are_numbered():
    one, two, three = (Image((n, 1, 2, 3)) for n in (5, 6, 7))
    answer = ask([Turn("user", (one, Text("a"), two)), Turn("assistant", (three,))], "chat")
    places = [
        (token["image"], answer["pieces"][str(token["id"])]["code"]) for token in answer["tokens"] if "image" in token
    ]
    assert places == [
        ([number, i // 2, i % 2], code)
        for number, image in enumerate((one, two, three))
        for i, code in enumerate(image.codes)
    ]
    assert answer["counts"] == {"text": 1, "image": 12, "special": 8}


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities


@given(conversations(), st.sampled_from(MODES), st.integers(1, 3000))
def test_probabilities_are_those_of_a_plain_forward(turns, mode, chunk):
    found = see.sequence(turns, mode, RUN)
    tokens = torch.tensor(found.tokens)
    with torch.no_grad():
        expected = RUN.model.logits(RUN.model(tokens[None]))[0].double().softmax(-1)  # (T, V)
    scores = see.score(RUN, found.tokens, chunk)
    answer = see.answer(RUN, found, scores)
    first, *others = answer["tokens"]
    assert first["probability"] is None and first["rank"] is None and first["alternatives"] == []
    for token, p in zip(others, expected, strict=False):
        own = token["id"]
        assert token["probability"] == pytest.approx(float(p[own]), rel=1e-4, abs=1e-12)
        best = [each for each in p.argsort(descending=True).tolist() if each != own][:5]
        assert [each for each, _ in token["alternatives"]] == best
        assert [q for _, q in token["alternatives"]] == pytest.approx(p[best].tolist(), rel=1e-4, abs=1e-12)
        assert token["rank"] == 1 + int((p > p[own]).sum())


@given(conversations())
def test_every_token_that_is_mentioned_has_a_piece(turns):
    answer = ask(turns, "chat")
    mentioned = {each for token in answer["tokens"] for each in (token["id"], *(a for a, _ in token["alternatives"]))}
    assert answer["pieces"].keys() == {str(each) for each in mentioned}
    assert answer["counts"] == {kind: kinds(answer).count(kind) for kind in ("text", "image", "special")}


def kinds(answer: dict) -> list[str]:
    return [answer["pieces"][str(each)]["kind"] for each in ids(answer)]


def test_one_token_has_no_probability():
    [token] = ask([Turn("user", ())], "text")["tokens"]
    assert token == {"id": VOCAB.bos, "probability": None, "rank": None, "alternatives": []}


@pytest.mark.parametrize("length", [63, 64, 65, 128])
def test_a_sequence_longer_than_the_context_has_no_probabilities(length):
    answer = ask([Turn("user", (Text("r" * (length - 1)),))], "text")
    assert len(answer["tokens"]) == length and answer["context"] == 64
    assert (answer["tokens"][-1]["probability"] is None) == (length > 64)


def test_a_sequence_of_more_than_two_contexts_is_refused(client):
    turns = as_json([Turn("user", (Text("r" * 128),))])
    response = client.post("/api/tokens", json={"turns": turns, "mode": "text"})
    assert response.status_code == 400 and response.json()["error"]["code"] == "too_long"
    assert response.json()["error"]["message"] == (
        "the conversation has 129 tokens: at most 128 are shown, and the model reads 64"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Patches


@given(
    st.lists(st.integers(0, 7), min_size=4, max_size=4),
    st.integers(0, 3),
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
)
def test_a_patch_is_that_of_the_image_with_one_code_exchanged(codes, place, others):
    """Exactly where the window holds the whole image."""
    for patch, code in zip(see.decode_patches(RUN, codes, place, others), others, strict=True):
        changed = torch.tensor([*codes[:place], code, *codes[place + 1 :]])
        image = RUN.image_tokenizer.decode(changed[None])[0]
        y, x = 2 * (place // 2), 2 * (place % 2)
        assert (patch == image[y : y + 2, x : x + 2]).all()


@given(st.integers(1, 20), st.data())
def test_a_patch_is_at_its_place_in_the_window(grid, data):
    """An image tokenizer whose patch of a code is that level of grey, whatever its neighbours are."""
    codes = data.draw(st.lists(st.integers(0, 255), min_size=grid**2, max_size=grid**2))
    place, others = data.draw(st.integers(0, grid**2 - 1)), data.draw(st.lists(st.integers(0, 255), min_size=1))
    patches = see.decode_patches(grey_run(grid), codes, place, others)
    assert patches.shape == (len(others), 2, 2, 3)
    assert (patches == np.array(others)[:, None, None, None]).all()


def grey_run(grid: int) -> SimpleNamespace:
    def pixels(levels):  # (n, side, side) -> (n, 3, 2 side, 2 side) in [-1, 1]
        return levels.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1) / 127.5 - 1

    def lookup(codes, side):
        return codes.view(-1, side, side)

    vqgan = SimpleNamespace(quantize=SimpleNamespace(lookup=lookup), pixels=pixels)
    images = SimpleNamespace(vqgan=vqgan, device=torch.device("cpu"))
    return SimpleNamespace(image_tokenizer=images, cfg=SimpleNamespace(vqgan=SimpleNamespace(resolution=2 * grid)))


# ---------------------------------------------------------------------------------------------------------------------
# Routes


def test_the_route_answers_what_the_functions_say(client):
    turns = [Turn("user", (Text("a r\u00e9d"), Image((1, 2, 3, 4)))), Turn("assistant", (Text("<boi>"),))]
    response = client.post("/api/tokens", json={"turns": as_json(turns), "mode": "chat"})
    assert response.status_code == 200
    assert response.json() == ask(turns, "chat", client.app.state.site.run)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "turns"),
        ({"turns": []}, "turns"),
        ({"turns": as_json([Turn("user", (Text("a"),))]), "mode": "sing"}, "mode"),
        ({"turns": as_json([Turn("user", (Text("a"),))]), "stop": "<boi>"}, "stop"),
        ({"turns": as_json([Turn("user", (Text("a"),))]), "seed": 1}, "seed"),
        ({"turns": as_json([Turn("assistant", (Text("a"),))])}, "turns"),
        ({"turns": as_json([Turn("user", (Text("a"),)), *[Turn("assistant", (Text("a"),))] * 2])}, "turns"),
    ],
)
def test_what_is_wrong_is_named(client, body, param):
    response = client.post("/api/tokens", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_patches_are_images(client):
    body = {"codes": [1, 2, 3, 4], "place": 3, "alternatives": [0, 7]}
    urls = client.post("/api/tokens/patches", json=body).json()["urls"]
    expected = see.decode_patches(client.app.state.site.run, [1, 2, 3, 4], 3, [0, 7])
    for url, pixels in zip(urls, expected, strict=True):
        data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
        assert (np.asarray(Pillow.open(io.BytesIO(data))) == pixels).all()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"codes": [1, 2, 3]}, "codes"),
        ({"codes": [1, 2, 3, 8]}, "codes"),
        ({"place": 4}, "place"),
        ({"place": -1}, "place"),
        ({"place": True}, "place"),
        ({"alternatives": []}, "alternatives"),
        ({"alternatives": [1] * 7}, "alternatives"),
        ({"alternatives": [8]}, "alternatives"),
        ({"alternatives": [True]}, "alternatives"),
    ],
)
def test_wrong_patches_are_named(client, change, param):
    body = {"codes": [1, 2, 3, 4], "place": 3, "alternatives": [0, 7]} | change
    response = client.post("/api/tokens/patches", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_a_model_without_a_decoder_shows_codes_alone():
    with TestClient(application(tiny_site(run=tiny_run(can_draw=False))), base_url="http://127.0.0.1") as client:
        turns = as_json([Turn("user", (Image((1, 2, 3, 4)), Text("a")))])
        assert client.post("/api/tokens", json={"turns": turns, "mode": "chat"}).status_code == 200
        body = {"codes": [1, 2, 3, 4], "place": 3, "alternatives": [0]}
        assert client.post("/api/tokens/patches", json=body).json()["error"]["code"] == "no_decoder"
