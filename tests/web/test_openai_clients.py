"""Clients of the API: many at once, those that leave, and those whose answer fails."""

import asyncio
import threading

import openai
import pytest
import torch
from api_messages import STAR, USER, image_of
from faults import wait_for
from serving import PATIENCE

from nanochameleon.documents import Text
from nanochameleon.web.refusals import BROKEN, busy


def test_many_at_once_get_what_each_gets_alone(api, toy_address):
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
        assert codes[seed] == image_of(api.chat.completions.create(**how, seed=seed))["codes"]


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
    assert all(sample.left.wait(PATIENCE) for sample in endless)


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
    assert all(sample.left.wait(PATIENCE) for sample in endless)


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


def test_too_many_requests_are_429_before_a_stream_begins(api, ask, toy_site, monkeypatch):
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


def test_a_body_that_is_too_large_is_refused_and_the_server_goes_on(api, ask):
    with pytest.raises(openai.APIStatusError) as refused:
        ask("a" * (2**24 + 1))
    assert refused.value.status_code == 413
    assert api.models.list().data
