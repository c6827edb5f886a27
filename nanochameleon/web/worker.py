"""The worker: one thread that owns the model and its engine, and serves every client through one batch.

    stream(request) -> events of one sample, as they come; closing the stream frees its slots
    call(function)  -> function(run), between two steps of the engine

Nothing else may touch the model: kernels for CPUs have one team of threads.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from nanochameleon.documents import Image, Text
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.events import Detokenizer, End, ImageStarted, PartialImage
from nanochameleon.generation.request import Request
from nanochameleon.training.run import Run
from nanochameleon.web.refusals import busy

T = TypeVar("T")


@dataclass(frozen=True)
class DecodedImage:
    """An image as far as it is drawn."""

    codes: tuple[int, ...]  # so far, in raster order
    pixels: np.ndarray  # uint8 (R, R, 3); the first code fills what is missing
    complete: bool


@dataclass(frozen=True)
class Finished:
    tokens: tuple[int, ...]  # all new tokens, stop token included
    stopped: bool  # by a stop token or the end of the image; False: no room was left, or max_new_tokens was reached


Event = Text | ImageStarted | DecodedImage | Finished


class Worker:
    def __init__(self, run: Run, n_slots: int = 16, max_waiting: int = 64):
        self.run, self.n_slots, self.max_waiting = run, n_slots, max_waiting
        self.jobs: deque[Callable[[], None]] = deque()
        self.wake = threading.Condition()
        self.clients: dict[int, Client] = {}
        self.ended = False
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        with self.wake:
            self.ended = True
            self.wake.notify()
        self.thread.join()

    async def call(self, function: Callable[[Run], T]) -> T:
        future: Future = Future()

        def job() -> None:
            try:
                future.set_result(function(self.run))
            except BaseException as error:
                future.set_exception(error)

        self.post(job)
        return await asyncio.wrap_future(future)

    async def stream(self, request: Request, preview: bool = False) -> AsyncIterator[Event]:
        """Yield the events of one sample. preview: unfinished images, too. Raises Refused (429) if too many wait."""
        if len(self.clients) >= self.n_slots + self.max_waiting:
            raise busy("too many requests wait: try again in a second")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        client = Client(request, preview, lambda event: loop.call_soon_threadsafe(queue.put_nowait, event))
        self.post(lambda: self.add(client))
        try:
            while True:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.post(lambda: self.remove(client))

    # -----------------------------------------------------------------------------------------------------------------
    # On the worker's own thread

    def post(self, job: Callable[[], None]) -> None:
        with self.wake:
            self.jobs.append(job)
            self.wake.notify()

    def work(self) -> None:
        self.engine = Engine(self.run.model, self.run.vocab, self.run.image_tokenizer.n_codes_per_image, self.n_slots)
        self.engine.max_steps_between_syncs = 8
        while True:
            with self.wake:
                while not (self.jobs or self.clients or self.ended):
                    self.wake.wait()
                jobs, self.jobs = self.jobs, deque()
            if self.ended:
                return
            for job in jobs:
                job()
            for output in self.engine.step():
                self.tell(self.clients[output.request_id], output)

    def add(self, client: "Client") -> None:
        client.detokenizer = Detokenizer(client.request.prompt, self.run.tokenizer, 8 if client.preview else None)
        client.id = self.engine.add_request(client.request)
        self.clients[client.id] = client

    def remove(self, client: "Client") -> None:
        if self.clients.pop(client.id, None) is not None:
            self.engine.cancel(client.id)

    def tell(self, client: "Client", output) -> None:
        for event in client.detokenizer.add(output.tokens, output.finished):
            if isinstance(event, PartialImage | Image):
                pixels = self.run.image_tokenizer.decode(torch.tensor([event.codes]))[0]
                event = DecodedImage(event.codes, pixels, isinstance(event, Image))
            elif isinstance(event, End):
                stops = client.request.stops or (self.run.vocab.eos,)
                last = event.tokens[-1] if event.tokens else None
                event = Finished(event.tokens, last in stops or client.request.modality == "image")
            client.put(event)
        if output.finished:
            del self.clients[output.request_id]


@dataclass(eq=False)
class Client:
    request: Request
    preview: bool
    put: Callable[[Event | Exception], None]
    detokenizer: Detokenizer | None = None
    id: int = -1
