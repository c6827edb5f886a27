"""Samples for answers in OpenAI's form: several at once, each up to a stop string, while the client is there.

streams = open_streams(site, requests)
answers(streams, tokenizer, stops) -> (0, Text("a red")), (1, DecodedImage(...)), (0, Ended("stop", 7)), ...
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from starlette.requests import Request as HTTPRequest

from nanochameleon.documents import Document, Text
from nanochameleon.errors import UserError
from nanochameleon.generation.prompts import Mode
from nanochameleon.generation.request import Request
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.run import Run
from nanochameleon.web.images import png_url
from nanochameleon.web.openai.stop_strings import StopStrings
from nanochameleon.web.outbox import DecodedImage, Finished
from nanochameleon.web.refusals import Refused
from nanochameleon.web.site import Site
from nanochameleon.web.talk import make_requests
from nanochameleon.web.worker import Stream

T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    reason: str  # stop or length
    n_tokens: int


Piece = Text | DecodedImage | Ended


def fitting_requests(param: str, run: Run, mode: Mode, document: Document, *how: Any) -> list[Request]:
    """make_requests; a prompt that is too long has the code by which OpenAI's clients know it. param: the field."""
    try:
        return make_requests(run, mode, document, *how)
    except Refused:
        raise
    except UserError as error:
        raise Refused(str(error), param=param, code="context_length_exceeded") from None


def open_streams(site: Site, requests: Sequence[Request]) -> list[Stream]:
    """Return a stream for each sample. Raises Refused (429) if too many requests wait; those opened close then."""
    return [site.worker.streams([request]) for request in requests]


async def answer(stream: Stream, tokenizer: TextTokenizer, stops: Sequence[str]) -> AsyncIterator[Piece]:
    """Yield one sample's pieces. It ends at a stop string, which frees its slots."""
    stop, written, n_image_tokens = StopStrings(stops), "", 0
    async with aclosing(stream):
        async for _, event in stream:
            if isinstance(event, Text):
                written += event.text
            elif isinstance(event, DecodedImage):
                n_image_tokens += len(event.codes) + 2  # <boi> and <eoi>
            if text := stop.add(event.text) if isinstance(event, Text) else stop.flush():
                yield Text(text)
            if stop.met:
                # The engine is some tokens ahead, and the client has no use for those: count what was read.
                yield Ended("stop", len(tokenizer.encode(written)) + n_image_tokens)
                return
            if isinstance(event, DecodedImage):
                yield event
            elif isinstance(event, Finished):
                yield Ended("stop" if event.stopped else "length", len(event.tokens))


async def answers(
    streams: Sequence[Stream], tokenizer: TextTokenizer, stops: Sequence[str] = ()
) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of several samples as they come. The first error ends them all."""
    queue: asyncio.Queue = asyncio.Queue()
    pieces = [answer(stream, tokenizer, stops) for stream in streams]
    tasks = [asyncio.create_task(forward(each, sample, queue)) for sample, each in enumerate(pieces)]
    try:
        n_left = len(tasks)
        while n_left:
            sample, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            yield sample, piece
            n_left -= isinstance(piece, Ended)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def forward(pieces: AsyncIterator[Piece], sample: int, queue: asyncio.Queue) -> None:
    """Put a sample's pieces into the queue, and the error that ends them, if there is one."""
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                queue.put_nowait((sample, piece))
    except Exception as error:
        queue.put_nowait((sample, error))


async def image_part(image: DecodedImage) -> dict:
    """An image as a part of a message. Its codes let it return to the model exactly."""
    url = await anyio.to_thread.run_sync(png_url, image.pixels)
    return {"type": "image_url", "image_url": {"url": url}, "codes": image.codes}


async def unless_left(request: HTTPRequest, work: Coroutine[None, None, T]) -> T:
    """Return what the work returns. It is cancelled when the client leaves, so it frees its slots."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused("the client left")  # nobody reads it
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
