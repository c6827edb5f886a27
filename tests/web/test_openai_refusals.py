"""What the API refuses, as OpenAI's own client hears it: each time the field, and what to do."""

import socket

import openai
import pytest
from api_messages import STAR, USER, part
from serving import served

from nanochameleon.web.app import application
from nanochameleon.web.head import Access
from nanochameleon.web.site import Site
from nanochameleon.web.worker import Worker


@pytest.mark.parametrize(
    ("how", "param", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "calls no tools"),
        ({"logprobs": True}, "logprobs", "log probabilities"),
        ({"response_format": {"type": "json_object"}}, "response_format", "no other form"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "repetition_penalty"),
        ({"extra_body": {"best_of": 2}}, "best_of", "not known"),
        ({"extra_body": {"moderation": {"model": "m"}}}, "moderation", "not known"),
        ({"extra_body": {"mode": "sing"}}, "mode", "auto, draw"),
        ({"extra_body": {"mode": "draw"}, "modalities": ["text"]}, "mode", "one of them"),
        ({"modalities": ["audio"]}, "modalities", '["text", "image"]'),
        ({"n": 9}, "n", "1 to 8"),
        ({"n": 0}, "n", "1 to 8"),
        ({"seed": -1}, "seed", "0 to"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_tokens": 64, "modalities": ["image"]}, "max_completion_tokens", "at least 65"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": [""]}, "stop", "1 to 100"),
        ({"stream": "yes"}, "stream", "true or false"),
    ],
)
def test_options_that_cannot_be_carried_out_are_refused_by_name(ask, how, param, words):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(STAR, **how)
    error = refused.value
    assert (error.param, error.type, error.status_code) == (param, "invalid_request_error", 400)
    assert words in error.body["message"]


def test_fields_without_a_meaning_here_and_those_that_ask_for_nothing_are_taken(ask):
    for how in (
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x"},
        {"logprobs": False, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "extra_body": {"mode": None}},
    ):
        assert ask(STAR, modalities=["image"], **how).choices


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([], "messages", "1 to 256"),
        ([{"role": "tool", "content": "a", "tool_call_id": "b"}], "messages[0].role", "no tools"),
        ([{"role": "user", "content": ""}], "messages[0].content", "empty"),
        ([{"role": "user", "content": 1}], "messages[0].content", "a list"),
        ([{"role": "assistant", "content": "a"}, USER], "messages", "first and the last"),
        ([USER, {"role": "assistant", "content": "a"}], "messages", "first and the last"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}, USER], "messages[1].tool_calls", "no tools"),
        (
            [USER, {"role": "assistant", "content": "a", "parts": [{"type": "text", "text": "b"}]}, USER],
            "messages[1].parts",
            "left out",
        ),
        ([USER, {"role": "assistant", "images": [{"codes": [1]}]}, USER], "messages[1].images[0].codes", "64 codes"),
        ([{"role": "user", "content": [{"type": "text", "text": ""}] * 257}], "messages[0].content", "at most 256"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0]", "text or image_url"),
        ([{"role": "user", "content": "a" * 100_001}], "messages", "100,000"),
        (part("http://127.0.0.1:1/a.png"), "messages[0].content[0].image_url.url", "fetches nothing"),
        (part("file:///etc/passwd"), "messages[0].content[0].image_url.url", "fetches nothing"),
        (part("data:image/png;base64,!!!"), "messages[0].content[0].image_url.url", "base64"),
        (part("data:image/png;base64,iVBORw0KGgo="), "messages[0].content[0].image_url.url", "not an image"),
        (part("data:image/png;base64,AA==", 8), "messages", "8 images"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_by_place(ask, messages, param, words):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(messages)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert words in refused.value.body["message"]


def test_an_address_is_never_fetched(ask):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        with pytest.raises(openai.BadRequestError):
            ask(part(f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"))
        with pytest.raises(BlockingIOError):  # nobody has called
            listening.accept()


@pytest.mark.parametrize(
    ("how", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "1 to"),
        ({"prompt": STAR, "size": "1024x1024"}, "size", "32x32"),
        ({"prompt": STAR, "response_format": "url"}, "response_format", "b64_json"),
        ({"prompt": STAR, "output_format": "webp"}, "output_format", "png"),
        ({"prompt": STAR, "background": "transparent"}, "background", "opaque"),
        ({"prompt": STAR, "stream": True}, "stream", "whole"),
        ({"prompt": STAR, "extra_body": {"messages": []}}, "messages", "not known"),
    ],
)
def test_images_that_cannot_be_made_are_refused_by_name(api, how, param, words):
    with pytest.raises(openai.BadRequestError) as refused:
        api.images.generate(**how)
    assert refused.value.param == param and words in refused.value.body["message"]


def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(api, ask):
    for param, too_long in (
        ("messages", lambda: ask("a star " * 600)),
        ("prompt", lambda: api.images.generate(prompt="a star " * 600)),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            too_long()
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", param)


def test_a_wrong_model_is_not_found(api):
    for ask in (
        lambda: api.chat.completions.create(model="gpt-5", messages=[USER]),
        lambda: api.images.generate(model="gpt-5", prompt=STAR),
        lambda: api.models.retrieve("gpt-5"),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            ask()
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        assert "toy" in refused.value.body["message"]


@pytest.fixture(scope="module")
def guarded_address(toy_run):
    """A server that wants a token."""
    with served(application(Site("toy", toy_run, Worker(toy_run)), Access(token="s3cret"))) as address:
        yield f"{address}/v1"


def test_the_api_key_is_the_token(guarded_address):
    with openai.OpenAI(base_url=guarded_address, api_key="s3cret", max_retries=0) as client:
        assert client.models.list().data and client.images.generate(prompt=STAR).data
    with (
        openai.OpenAI(base_url=guarded_address, api_key="secret", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.images.generate(prompt=STAR)
    assert refused.value.code == "invalid_api_key" and "s3cret" not in str(refused.value)
