"""A worker with the smallest model, requests for it, and what each must get."""

import asyncio
import threading
from contextlib import aclosing, contextmanager
from dataclasses import replace

import tiny
from serving import PATIENCE
from tiny_site import tiny_run

from nanochameleon.config import SamplingParams
from nanochameleon.documents import Image, Text
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.events import Detokenizer
from nanochameleon.generation.request import Request, make_request
from nanochameleon.web.outbox import DecodedImage, Finished
from nanochameleon.web.worker import Worker

PARAMS = SamplingParams(
    temperature=3.0, top_p=1.0, image_temperature=100.0, image_top_p=1.0, guidance_scale=1.0, image_guidance_scale=1.0,
    max_new_tokens=24,
)  # fmt: skip
GUILTY = (666, 0)
TEXT = tiny.TOKENIZER.encode("a red")


def request(seed: int | tuple[int, int] = 0, modality: str = "both", **changes) -> Request:
    seed = seed if isinstance(seed, tuple) else (seed, 0)
    boi = [tiny.VOCAB.boi] * (modality == "image")
    prompt = [tiny.VOCAB.bos, *TEXT, *boi]
    return make_request(prompt, tiny.VOCAB, tiny.N_CODES, 64, replace(PARAMS, **changes), modality, seed)


def alone(asked: Request) -> tuple[int, ...]:
    """The tokens of a request that runs alone, without a worker."""
    engine = Engine(tiny.tiny_model(), tiny.VOCAB, tiny.N_CODES, 4)
    engine.add_request(asked)
    return tuple(token for output in engine.run() for token in output.tokens)


@contextmanager
def working(run=None, **sizes):
    worker = Worker(run or tiny_run(), **({"n_slots": 4} | sizes))
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


async def read(worker: Worker, *requests: Request, preview: bool = False) -> list:
    async with aclosing(worker.streams(requests, preview)) as stream:
        return [each async for each in stream]


async def outcome(worker: Worker, asked: Request):
    """The events of a request, or its error."""
    try:
        return [event for _, event in await read(worker, asked)]
    except Exception as error:
        return error


def outcomes(worker: Worker, requests: list[Request]) -> list:
    async def run() -> list:
        return await asyncio.gather(*(outcome(worker, each) for each in requests))

    return asyncio.run(run())


def check_whole(events: list, asked: Request) -> None:
    """Are these all events of a request, each once?"""
    *others, end = events
    assert isinstance(end, Finished) and end.tokens == alone(asked)
    expected = list(Detokenizer(asked.prompt, tiny.TOKENIZER).add(end.tokens, True))
    assert "".join(e.text for e in others if isinstance(e, Text)) == "".join(
        e.text for e in expected if isinstance(e, Text)
    )
    images = [e.codes for e in others if isinstance(e, DecodedImage)]
    assert images == [e.codes for e in expected if isinstance(e, Image)]


def slots_in_use(worker: Worker) -> int:
    """After all clients that left so far were seen to leave: calls run after them."""
    return asyncio.run(worker.call(lambda run: worker.slots_in_use))


class Gate:
    """Lets a function pass as often as it is opened."""

    def __init__(self, function):
        self.function, self.reached, self.opened = function, threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, *arguments):
        self.reached.release()
        assert self.opened.acquire(timeout=PATIENCE)
        return self.function(*arguments)
