"""Talking: what a body may ask for, and that the samples are those of sample.py."""

import json

import pytest
import tiny
from starlette.testclient import TestClient
from tiny_site import tiny_run, tiny_site

from nanochameleon.documents import Text
from nanochameleon.generation.engine import generate
from nanochameleon.generation.events import Detokenizer
from nanochameleon.generation.prompts import MODALITY, stop_tokens
from nanochameleon.web.app import application
from nanochameleon.web.conversation import prompt_tokens
from nanochameleon.web.talk import make_requests

TURNS = [{"role": "user", "segments": [{"text": "a red star"}]}]
BASE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def client():
    with TestClient(application(tiny_site()), base_url=BASE) as started:
        yield started


def events(client, **body) -> list[dict]:
    with client.stream("POST", "/api/generate", json={"turns": TURNS} | body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]


def of_sample(found: list[dict], sample: int) -> tuple[str, list[list[int]], dict]:
    """(text, codes of images, end)"""
    mine = [event for event in found if event.get("sample") == sample]
    images = [event["image"]["codes"] for event in mine if "image" in event and event["image"]["complete"]]
    [end] = [event["end"] for event in mine if "end" in event]
    assert "end" in mine[-1]
    return "".join(event.get("text", "") for event in mine), images, end


@pytest.mark.parametrize("mode", ["draw", "chat", "text", "free"])
def test_samples_are_those_of_sample_py(client, mode):
    site = client.app.state.site
    found = events(client, mode=mode, seed=7, samples=3, options={"temperature": 1.2})
    assert found[0] == {"mode": mode}
    [request, *_] = make_requests(site.run, mode, [Text("a red star")], {"temperature": 1.2}, 7)
    prompt = prompt_tokens([Text("a red star")], site.run, mode)
    expected = generate(
        tiny.tiny_model(), [prompt] * 3, tiny.VOCAB, tiny.N_CODES, request.params, MODALITY[mode], 7,
        stop_tokens(mode, tiny.VOCAB),
    )  # fmt: skip
    for i, tokens in enumerate(expected):
        text, images, end = of_sample(found, i)
        parts = list(Detokenizer(prompt, tiny.TOKENIZER).add(tokens, True))
        assert text == "".join(part.text for part in parts if isinstance(part, Text))
        assert images == [list(part.codes) for part in parts if type(part).__name__ == "Image"]
        stops = {} if mode == "draw" else {tiny.VOCAB.eos: "</s>", tiny.VOCAB.eot: "<eot>"}
        assert end["stop"] == stops.get(tokens[-1])
        assert end["new_tokens"] == len(tokens) and end["prompt_tokens"] == len(prompt)
    assert len({tuple(tokens) for tokens in expected}) > 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"options": {"temperature": -1}}, "options.temperature"),
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"options": {"temperature": True}}, "options.temperature"),
        ({"options": {"top_p": 0}}, "options.top_p"),
        ({"options": {"top_p": 1.5}}, "options.top_p"),
        ({"options": {"top_k": 0}}, "options.top_k"),
        ({"options": {"top_k": 1.5}}, "options.top_k"),
        ({"options": {"top_k": 10**30}}, "options.top_k"),
        ({"options": {"guidance_scale": -0.1}}, "options.guidance_scale"),
        ({"options": {"image_guidance_scale": 10**400}}, "options.image_guidance_scale"),
        ({"options": {"repetition_penalty": 0}}, "options.repetition_penalty"),
        ({"options": {"max_new_tokens": 0}}, "options.max_new_tokens"),
        ({"options": {"min_p": 0.1}}, "options.min_p"),
        ({"options": []}, "options"),
        ({"mode": "draw", "options": {"max_new_tokens": tiny.N_CODES}}, "options.max_new_tokens"),
        ({"mode": "sing"}, "mode"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"seed": True}, "seed"),
        ({"samples": 0}, "samples"),
        ({"samples": 9}, "samples"),
        ({"preview": 1}, "preview"),
        ({"prompt": "a star"}, "prompt"),
        ({"turns": []}, "turns"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(client, body, param):
    response = client.post("/api/generate", json={"turns": TURNS} | body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and param.split(".")[-1] in error["message"], error


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_must_be_one(client, number):
    content = json.dumps({"turns": TURNS, "options": {"temperature": "X"}}).replace('"X"', number)
    response = client.post("/api/generate", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_a_long_prompt_is_refused_before_the_stream(client):
    turns = [{"role": "user", "segments": [{"text": "star " * 100}]}]
    response = client.post("/api/generate", json={"turns": turns})
    assert response.status_code == 400 and "context of 64" in response.json()["error"]["message"]


def test_a_model_that_cannot_draw_says_so():
    with TestClient(application(tiny_site(run=tiny_run(can_draw=False))), base_url=BASE) as client:
        assert client.get("/api/settings").json()["modes"] == ["auto", "answer", "text"]
        response = client.post("/api/generate", json={"turns": TURNS, "mode": "draw"})
        assert response.status_code == 400 and "no image decoder" in response.json()["error"]["message"]
        assert events(client, mode="text")[0] == {"mode": "text"}


def test_settings(client):
    settings = client.get("/api/settings").json()
    assert settings["model"] == {
        "name": "tiny", "context": 64, "vocab_size": tiny.VOCAB.size, "n_codes": 8, "codes_per_image": tiny.N_CODES,
        "resolution": 4, "can_draw": True, "aligned": False,
    }  # fmt: skip
    assert settings["defaults"]["max_new_tokens"] == 16 and settings["red_team"] is False
    assert (
        settings["modes"] == ["auto", "draw", "answer", "chat", "text", "free"] and settings["limits"]["samples"] == 8
    )
    assert {example["mode"] for example in settings["examples"]} <= set(settings["modes"])


@pytest.mark.parametrize("mode", ["draw", "free"])
@pytest.mark.parametrize("name", ["temperature", "guidance_scale", "image_guidance_scale", "repetition_penalty"])
def test_an_extreme_option_is_no_error(client, mode, name):
    for value in (1e308, 1e-308):
        found = events(client, mode=mode, options={name: value})
        assert not any("error" in event for event in found) and "end" in found[-1]
