"""The API as OpenAI's own client sees it, on a real server of models/toy."""

import asyncio
import base64
import io
import re
import socket
import textwrap
import threading
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from faults import wait_for
from openai.types import CreateEmbeddingResponse, ImagesResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image as Pillow
from serving import served

from nanochameleon.documents import Text
from nanochameleon.web.app import application
from nanochameleon.web.head import Access
from nanochameleon.web.refusals import BROKEN, busy
from nanochameleon.web.site import Site
from nanochameleon.web.worker import Worker

STAR = "please draw a big red star on white"
COUNT = "how many stars are there?"


@pytest.fixture(scope="module")
def client(toy_address):
    with openai.OpenAI(base_url=f"{toy_address}/v1", api_key="none is needed", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(client):
    """ask("words", n=2, ...) or ask([messages], ...): a completion."""

    def ask(messages, **more):
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return client.chat.completions.create(model="toy", messages=messages, **more)

    return ask


def pixels(url: str) -> np.ndarray:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Pillow.open(io.BytesIO(base64.b64decode(data))))


def png_of(image: Pillow.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_of(answer: ChatCompletion) -> dict:
    [image] = answer.choices[0].message.images
    return image


def about(url: str, question: str = COUNT) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


# ---------------------------------------------------------------------------------------------------------------------
# What a client gets


def test_an_image_is_drawn_and_a_question_about_it_is_answered(ask):
    drawn = ask(STAR, modalities=["text", "image"], seed=1)
    assert drawn.choices[0].finish_reason == "stop" and drawn.choices[0].message.content == ""
    image = image_of(drawn)
    red, green, blue = pixels(image["image_url"]["url"]).reshape(-1, 3).T.astype(int)
    assert 20 < np.sum((red > 180) & (green < 90) & (blue < 90)) < 400 and np.sum(green > 200) > 400  # a star on white
    question = about(image["image_url"]["url"], "what is in the image?")
    seen = ask(question, temperature=0)
    assert seen.choices[0].message.content == "a big red star on white"
    more = [*question, seen.choices[0].message, {"role": "user", "content": COUNT}]  # a second turn about the image
    assert ask(more, modalities=["text"], temperature=0).choices[0].message.content == "one"


def test_a_stream_says_the_same_as_the_whole_answer(ask):
    for how in ({"modalities": ["image"]}, {"extra_body": {"mode": "free"}}, {"n": 3, "modalities": ["text"]}):
        whole = ask("a", seed=5, **how)
        n = len(whole.choices)
        chunks = list(ask("a", seed=5, stream=True, stream_options={"include_usage": True}, **how))
        assert {chunk.id for chunk in chunks} == {chunks[0].id} and all(chunk.seed == 5 for chunk in chunks)
        *deltas, last = chunks
        assert (last.choices, last.usage) == ([], whole.usage) and all(chunk.usage is None for chunk in deltas)
        for i in range(n):
            mine = [chunk.choices[0] for chunk in deltas if chunk.choices[0].index == i]
            assert mine[0].delta.role == "assistant"
            assert [choice.finish_reason for choice in mine if choice.finish_reason] == [mine[-1].finish_reason]
            said = whole.choices[i]
            assert mine[-1].finish_reason == said.finish_reason
            assert "".join(choice.delta.content or "" for choice in mine) == said.message.content
            images = [image for choice in mine for image in getattr(choice.delta, "images", [])]
            assert [image.pop("index") for image in images] == list(range(len(images)))
            assert images == getattr(said.message, "images", [])


def test_without_include_usage_there_is_none(ask):
    assert all(chunk.usage is None and chunk.choices for chunk in ask(STAR, stream=True))


def test_the_same_seed_gives_the_same_answer_and_each_sample_its_own(ask):
    def drawn(**how):
        several = ask("two stars", modalities=["image"], n=4, temperature=1, **how)
        return [choice.message.images[0]["codes"] for choice in several.choices]

    once = drawn(seed=7)
    assert once == drawn(seed=7) and len(set(map(tuple, once))) == 4 and once != drawn(seed=8)
    unnamed = ask(STAR, modalities=["image"])  # a random seed, which the answer names
    assert image_of(ask(STAR, modalities=["image"], seed=unnamed.seed))["codes"] == image_of(unnamed)["codes"]


def test_the_models_own_images_come_back_as_they_were(ask, toy_site, monkeypatch):
    """Free mode writes and draws in turn. Another pass through the VQGAN would change codes; the order is kept, too."""
    message = ask("a", seed=0, extra_body={"mode": "free"}).choices[0].message
    assert [part["type"] for part in message.parts] == ["text", "image"] * 2
    assert [part["image"] for part in message.parts if part["type"] == "image"] == [0, 1]
    assert "".join(part["text"] for part in message.parts if part["type"] == "text") == message.content
    prompts, opened = [], toy_site.worker.streams
    monkeypatch.setattr(
        toy_site.worker, "streams", lambda requests: prompts.append(requests[0].prompt) or opened(requests)
    )
    ask([{"role": "user", "content": "a"}, message, {"role": "user", "content": COUNT}], extra_body={"mode": "chat"})
    vocab, encode = toy_site.run.vocab, toy_site.run.tokenizer.encode
    expected = [vocab.bos, *encode("a"), vocab.eot]
    for part in message.parts:
        if part["type"] == "text":
            expected += encode(part["text"])
        else:
            codes = message.images[part["image"]]["codes"]
            expected += [vocab.boi, *map(vocab.code_to_token, codes), vocab.eoi]
    assert list(prompts[0]) == [*expected, vocab.eot, *encode(COUNT), vocab.eot]


def test_a_stop_string_ends_a_sample_and_is_not_sent(ask, toy_run):
    url = image_of(ask(STAR, modalities=["image"], seed=1))["image_url"]["url"]
    question = about(url, "what is in the image?")
    whole = ask(question, temperature=0).choices[0].message.content
    assert "red star" in whole
    for how in ({"stop": "star"}, {"stop": ["no such", "star"]}):
        cut = ask(question, temperature=0, **how)
        assert cut.choices[0].message.content == whole[: whole.index("star")]
        assert cut.choices[0].finish_reason == "stop"
        assert cut.usage.completion_tokens <= len(toy_run.tokenizer.encode(whole)) + 1
        deltas = [chunk.choices[0].delta.content or "" for chunk in ask(question, temperature=0, stream=True, **how)]
        assert "".join(deltas) == whole[: whole.index("star")]
    unmet = ask(question, temperature=0, stop="starfish").choices[0].message.content  # held back, and then sent
    assert unmet == whole


def test_usage_counts_the_prompt_once_and_every_new_token(ask, toy_run):
    answer = ask(STAR, modalities=["image"], n=3, seed=1)
    prompt = len(toy_run.tokenizer.encode(STAR)) + 2  # <s>, <boi>
    n_codes = toy_run.image_tokenizer.n_codes_per_image
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, 3 * (n_codes + 1))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    short = ask(about(png_of(Pillow.new("RGB", (9, 5)))), max_completion_tokens=1)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1


def test_system_text_comes_first_and_neighbours_are_one_turn(ask, toy_run):
    two = [{"role": "system", "content": "a red"}, {"role": "user", "content": "star"}]
    one = [{"role": "user", "content": "a red\nstar"}]
    first, second = (ask(messages, seed=1, modalities=["image"]) for messages in (two, one))
    assert image_of(first)["codes"] == image_of(second)["codes"]
    three = [{"role": "user", "content": "a"}, {"role": "developer", "content": "b"}, {"role": "user", "content": "c"}]
    assert ask(three, modalities=["image"]).usage.prompt_tokens == 2 + sum(
        len(toy_run.tokenizer.encode(text)) for text in ("a", "\n", "b", "\n", "c")
    )


def test_images_generate(client, toy_run):
    answer = client.images.generate(
        prompt=STAR, model="toy", n=2, size="32x32", response_format="b64_json", quality="high", extra_body={"seed": 3}
    )
    images = [np.asarray(Pillow.open(io.BytesIO(base64.b64decode(image.b64_json)))) for image in answer.data]
    assert [image.shape for image in images] == [(32, 32, 3)] * 2 and (answer.seed, answer.size) == (3, "32x32")
    for image, described in zip(images, answer.data, strict=True):
        decoded = toy_run.image_tokenizer.decode(torch.tensor([described.codes]))[0]
        np.testing.assert_array_equal(image, decoded)
    n_codes = toy_run.image_tokenizer.n_codes_per_image
    assert answer.usage.output_tokens == answer.usage.output_tokens_details.image_tokens == 2 * (n_codes + 1)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    # without a model, size or anything else; captions without a size confuse the toy's chat, and are drawn all the same
    assert len(client.images.generate(prompt="two yellow triangles", n=4).data) == 4


def test_the_clients_helper_for_streams_puts_the_answer_together(client, ask):
    how = {"model": "toy", "messages": [{"role": "user", "content": "a"}], "seed": 0, "extra_body": {"mode": "free"}}
    with client.chat.completions.stream(**how) as stream:
        put_together = stream.get_final_completion().choices[0].message
    message = client.chat.completions.create(**how).choices[0].message
    assert put_together.content == message.content
    assert [image["codes"] for image in put_together.images] == [image["codes"] for image in message.images]
    again = [{"role": "user", "content": "a"}, put_together, {"role": "user", "content": COUNT}]
    assert ask(again).choices


def test_the_example_of_the_documentation_runs(toy_address, capsys):
    page = (Path(__file__).parents[2] / "docs" / "web.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^    from openai .*?(?=\n\n\S)", page, re.DOTALL | re.MULTILINE)
    assert "http://127.0.0.1:8000" in example
    exec(textwrap.dedent(example).replace("http://127.0.0.1:8000", toy_address), {})
    assert capsys.readouterr().out.strip() in {"one", "two", "three", "four"}  # things in the image; it drew two


def test_models(client):
    [model] = client.models.list().data
    assert model.id == "toy" and client.models.retrieve("toy") == model


def test_the_answers_are_of_openais_types(client, ask):
    """Strictly: a number that comes as a string is wrong. Fields that OpenAI has not are ours, and just these."""
    raw = client.with_raw_response
    words = {"model": "toy", "messages": [{"role": "user", "content": STAR}], "modalities": ["image"]}
    chat = ChatCompletion.model_validate_json(raw.chat.completions.create(**words, n=2).text, strict=True)
    assert set(chat.model_extra) == {"seed"}
    assert all(set(choice.message.model_extra) == {"images", "parts"} for choice in chat.choices)
    stream = raw.chat.completions.create(**words, stream=True, stream_options={"include_usage": True})
    lines = stream.http_response.read().decode().split("\n\n")
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert lines[-2:] == ["data: [DONE]", ""]
    for line in lines[:-2]:
        chunk = ChatCompletionChunk.model_validate_json(line.removeprefix("data: "), strict=True)
        assert set(chunk.model_extra) == {"seed"}
        assert all(set(choice.delta.model_extra) <= {"images"} for choice in chunk.choices)
    images = ImagesResponse.model_validate_json(raw.images.generate(prompt=STAR).text, strict=True)
    assert set(images.model_extra) == {"seed"} and images.data[0].model_extra.keys() == {"codes"}
    assert Model.model_validate_json(raw.models.retrieve("toy").text, strict=True).model_extra == {}
    with pytest.raises(ValueError):  # the check itself can fail
        CreateEmbeddingResponse.model_validate_json(raw.models.retrieve("toy").text, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


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


def part(url, n=1):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}] * n}]


USER = {"role": "user", "content": "a"}


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
def test_images_that_cannot_be_made_are_refused_by_name(client, how, param, words):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**how)
    assert refused.value.param == param and words in refused.value.body["message"]


def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(client, ask):
    for param, too_long in (
        ("messages", lambda: ask("a star " * 600)),
        ("prompt", lambda: client.images.generate(prompt="a star " * 600)),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            too_long()
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", param)


def test_a_wrong_model_is_not_found(client):
    for ask in (
        lambda: client.chat.completions.create(model="gpt-5", messages=[USER]),
        lambda: client.images.generate(model="gpt-5", prompt=STAR),
        lambda: client.models.retrieve("gpt-5"),
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


# ---------------------------------------------------------------------------------------------------------------------
# Many, and those that leave or fail


def test_many_at_once_get_what_each_gets_alone(client, toy_address):
    how = {
        "model": "toy",
        "messages": [{"role": "user", "content": "two stars"}],
        "modalities": ["image"],
        "temperature": 1,
    }

    async def draw(client, seed):
        return image_of(await client.chat.completions.create(**how, seed=seed))["codes"]

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{toy_address}/v1", api_key="-") as many:
            return await asyncio.gather(*(draw(many, seed) for seed in range(24)))

    codes = asyncio.run(together())
    assert len({tuple(drawn) for drawn in codes}) > 20
    for seed in (0, 11, 23):
        assert codes[seed] == image_of(client.chat.completions.create(**how, seed=seed))["codes"]


class Endless:
    """A sample that says one word and never ends. `left` is set when it is closed."""

    def __init__(self, error: Exception | None = None):
        self.said, self.error, self.left = False, error, threading.Event()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.said:
            self.said = True
            return 0, Text("once")
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()

    async def aclose(self):
        self.left.set()


@pytest.fixture
def endless(toy_site, monkeypatch):
    """The samples that are opened in this test."""
    opened = []
    monkeypatch.setattr(toy_site.worker, "streams", lambda requests: opened.append(Endless()) or opened[-1])
    return opened


def test_a_client_that_leaves_a_stream_frees_all_its_samples(ask, endless):
    stream = ask(STAR, n=3, stream=True)
    assert any(chunk.choices[0].delta.content == "once" for chunk in stream)
    assert len(endless) == 3 and not any(sample.left.is_set() for sample in endless)
    stream.close()
    assert all(sample.left.wait(10) for sample in endless)


@pytest.mark.parametrize("route", ["chat", "images"])
def test_a_client_that_leaves_before_its_answer_frees_all_its_samples(toy_address, endless, route):
    async def leave():
        async with openai.AsyncOpenAI(base_url=f"{toy_address}/v1", api_key="-", max_retries=0) as hasty:
            chat = hasty.chat.completions.create(model="toy", messages=[USER], n=2)
            images = hasty.images.generate(prompt=STAR, n=2)
            chosen, other = (chat, images) if route == "chat" else (images, chat)
            other.close()
            asking = asyncio.create_task(chosen)
            await asyncio.to_thread(wait_for, lambda: len(endless) == 2)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    assert all(sample.left.wait(10) for sample in endless)


def test_a_client_that_leaves_frees_its_slots_of_the_engine(ask, toy_site, monkeypatch):
    engine = toy_site.worker.batch.engine

    @torch.inference_mode()
    def step():  # gives slots to requests, and no token to any
        engine.schedule()
        return []

    monkeypatch.setattr(engine, "step", step)
    stream = ask(STAR, n=3, stream=True)
    next(iter(stream))
    wait_for(lambda: toy_site.worker.slots_in_use == 3)
    stream.close()
    wait_for(lambda: toy_site.worker.slots_in_use == 0)


def test_a_stop_string_frees_the_slots_of_its_sample_while_others_write(ask, endless):
    stream = ask(STAR, n=2, stream=True, stop="once")
    assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices[0].finish_reason] == ["stop"] * 2
    assert all(sample.left.is_set() for sample in endless)


def test_an_error_in_the_middle_of_a_stream_reaches_the_client_without_its_details(ask, toy_site, monkeypatch):
    monkeypatch.setattr(toy_site.worker, "streams", lambda requests: Endless(RuntimeError("in /secret/path")))
    with pytest.raises(openai.APIError) as broken:
        list(ask(STAR, stream=True))
    assert broken.value.message == BROKEN
    with pytest.raises(openai.InternalServerError) as broken:
        ask(STAR)
    assert broken.value.body["message"] == BROKEN


def test_too_many_requests_are_429_before_a_stream_begins(client, ask, toy_site, monkeypatch):
    opened = []

    def streams(requests):
        if len(opened) == 2:
            raise busy("too many requests wait: try again in a second")
        opened.append(Endless())
        return opened[-1]

    monkeypatch.setattr(toy_site.worker, "streams", streams)
    for how in ({}, {"stream": True}):
        opened.clear()
        with pytest.raises(openai.RateLimitError) as refused:
            ask(STAR, n=3, **how)
        assert refused.value.response.headers["retry-after"] == "1"


def test_a_body_that_is_too_large_is_refused_and_the_server_goes_on(client, ask):
    with pytest.raises(openai.APIStatusError) as refused:
        ask("a" * (2**24 + 1))
    assert refused.value.status_code == 413
    assert client.models.list().data
