"""Any JSON may come: it is answered or refused in OpenAI's form, and is never a fault of the server."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from starlette.testclient import TestClient
from tiny_site import tiny_site

from nanochameleon.images.terminal import png
from nanochameleon.web.app import application

SQUARE = Pillow.new("RGB", (1, 1))
PNG = f"data:image/png;base64,{base64.b64encode(png(SQUARE)).decode()}"
IMAGE = {"type": "image_url", "image_url": {"url": PNG}}
OWN = {"type": "image_url", "image_url": {"url": PNG}, "codes": [0, 1, 2, 3], "index": 0}
PARTS = [{"type": "text", "text": "a"}, {"type": "image", "image": 0}]
DRAWN = {"role": "assistant", "content": "a", "images": [OWN], "parts": PARTS}
USER = {"role": "user", "content": [{"type": "text", "text": "a red"}, IMAGE]}
CHAT = {
    "model": "tiny", "messages": [{"role": "system", "content": "b"}, USER, DRAWN, USER], "n": 2, "seed": 1,
    "stop": ["x", "yz"], "max_completion_tokens": 9, "max_tokens": 9, "mode": "chat", "stream": False, "top_k": 5,
    "stream_options": {"include_usage": True}, "temperature": 1, "top_p": 0.9, "guidance_scale": 2,
    "image_guidance_scale": 1, "repetition_penalty": 1, "logprobs": False, "user": "me",
}  # fmt: skip
DRAW = {"prompt": "a red", "model": "tiny", "n": 2, "size": "4x4", "seed": 1, "temperature": 1, "stream": False}

NUMBERS = [2**63, -(2**70), 1e308, 0.5, -1, 0, 9]
odd = st.one_of(
    st.sampled_from([None, True, False, "", "a", "stop", "\ud800", *NUMBERS]),
    st.lists(st.sampled_from([0, "a", None, {}]), max_size=3),
    st.dictionaries(st.sampled_from(["type", "url"]), st.none()),
)


@pytest.fixture(scope="module")
def client():
    with TestClient(application(tiny_site()), base_url="http://127.0.0.1", raise_server_exceptions=True) as client:
        yield client


def places(value, place=()):
    """Every place inside a JSON value."""
    yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inside:
        yield from places(part, (*place, name))


def replaced(value, place, new):
    """The value with what is at a place replaced, or left out where new is ... ."""
    if not place:
        return new
    copy = value.copy()
    first, *rest = place
    if rest or new is not ...:
        copy[first] = replaced(copy[first], rest, new)
    else:
        del copy[first]
    return copy


def check(client, path, body):
    answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404, 413), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert error["type"] == "invalid_request_error"
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text
    return answer


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/images/generations", DRAW)])
def test_whatever_is_wrong_with_a_body_is_the_clients_mistake(client, path, body):
    assert check(client, path, body).status_code == 200
    every = [place for place in places(body) if place]

    @given(st.sampled_from(every), st.one_of(odd, st.just(...)), st.booleans())
    def test(place, new, streamed):
        changed = replaced(body, place, new)
        if path == "/v1/chat/completions" and place[0] != "stream":
            changed["stream"] = streamed
        check(client, path, changed)

    test()


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"n": NaN}', b'{"a": 1e999}'])
def test_a_body_that_is_no_object_is_refused(client, body):
    for path in ("/v1/chat/completions", "/v1/images/generations"):
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
