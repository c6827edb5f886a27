"""The worker: one thread that owns the model and its engine, and serves every client through one batch.

    streams(requests) -> (sample, event) of a client's samples, as they come; closing it frees their slots
    call(function)    -> function(run), between two rounds of the engine

    clients that come and leave -> calls -> a round of the batch -> their outboxes

Nothing else may touch the model: kernels for CPUs have one team of threads.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from nanochameleon.generation.events import Detokenizer
from nanochameleon.generation.request import Request, cfg_branches
from nanochameleon.training.run import Run
from nanochameleon.web import limits
from nanochameleon.web.batch import Batch, Client, Sample, slots_that_fit
from nanochameleon.web.metrics import Metrics
from nanochameleon.web.outbox import Event, Finished, Outbox
from nanochameleon.web.refusals import Refused, busy

T = TypeVar("T")

MAX_CALLS = 256  # that wait
TOO_MANY = "too many requests wait: try again in a second"
NOT_STARTED, ENDED = "the server has not started: ask again", "the server is ending: ask again when it is back"
BROKEN_MODEL = "the model has stopped working: start the server again"


class Stream:
    """The events of one client, as (sample, event). The client leaves with aclose(), or when nobody holds this."""

    def __init__(self, worker: "Worker", client: Client):
        self.worker, self.client, self.events = worker, client, iter(())
        self.unfinished = len(client.samples)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> tuple[int, Event]:
        while True:
            for sample, event in self.events:
                self.unfinished -= isinstance(event, Finished)
                return sample, event
            if not self.unfinished:
                raise StopAsyncIteration
            self.events = iter(await self.client.outbox.take())

    async def aclose(self) -> None:
        self.leave()

    def leave(self) -> None:
        if self.client is not None:
            self.worker.leave(self.client)
            self.client, self.unfinished = None, 0

    __del__ = leave


class Worker:
    def __init__(self, run: Run, n_slots: int | None = None, max_waiting: int = limits.WAITING):
        self.run, self.n_slots, self.max_waiting = run, n_slots or slots_that_fit(run), max_waiting
        self.wake = threading.Condition()  # guards the next four
        self.jobs: deque[Callable[[], None]] = deque()  # short ones: a client comes or leaves
        self.calls: deque[tuple[Future, Callable[[Run], object]]] = deque()
        self.clients: set[Client] = set()
        self.closed: str | None = NOT_STARTED  # why nothing is accepted
        self.lead = 0.0  # seconds that calls are ahead of rounds
        self.started: Future = Future()

    # -----------------------------------------------------------------------------------------------------------------
    # On any thread

    @property
    def alive(self) -> bool:
        """Does it answer? False before the start, after the end, and if the engine cannot be made again."""
        return self.closed is None

    @property
    def slots_in_use(self) -> int:
        engine = self.batch.engine  # None while it is made again
        return engine.n_live if engine else 0

    def start(self, metrics: Metrics | None = None) -> None:
        """Return once the model has made its first token. Raises what went wrong."""
        self.thread = threading.Thread(target=self.work, args=(metrics or Metrics(),), name="engine", daemon=True)
        self.thread.start()
        self.started.result()

    def stop(self) -> None:
        """End all streams and calls with a sentence, at once."""
        self.close(ENDED)
        self.thread.join()

    def close(self, why: str) -> None:
        with self.wake:
            self.closed = self.closed or why
            calls, self.calls = self.calls, deque()
            clients, self.clients = self.clients, set()
            self.wake.notify()
        for client in clients:
            client.outbox.fail(Refused(why, 503))
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(Refused(why, 503))

    async def call(self, function: Callable[[Run], T]) -> T:
        """Run a function of the run on the worker's thread. Raises Refused (429) if too many wait."""
        future: Future = Future()
        with self.wake:
            self.check(len(self.calls) < MAX_CALLS)
            self.calls.append((future, function))
            self.wake.notify()
        return await asyncio.wrap_future(future)

    async def stream(self, request: Request, preview: bool = False) -> AsyncIterator[Event]:
        """Yield the events of one sample. preview: unfinished images, too. Raises Refused (429) if too many wait."""
        stream = self.streams([request], preview)
        try:
            async for _, event in stream:
                yield event
        finally:
            await stream.aclose()

    def streams(self, requests: Sequence[Request], preview: bool = False) -> Stream:
        """Return (sample, event) of several samples, in the order of their events.

        Raises Refused at the call: 429 if too many samples wait.
        """
        needed = max(len(cfg_branches(request, self.run.vocab)) for request in requests)
        if needed > self.n_slots:
            has = f"{needed} slots, and the server has {self.n_slots}"
            raise Refused(f"guidance of this kind needs {has}: set it to 1, or start the server with --slots {needed}")
        client = Client(Outbox(), preview)
        for i, request in enumerate(requests):
            client.samples.append(Sample(client, i, request, Detokenizer(request.prompt, self.run.tokenizer)))
        with self.wake:
            n_open = sum(len(other.samples) for other in self.clients)
            self.check(n_open + len(requests) <= self.n_slots + self.max_waiting)
            self.clients.add(client)
            self.post(lambda: self.batch.add(client))
        return Stream(self, client)

    def check(self, has_room: bool) -> None:
        if self.closed is not None:
            raise Refused(self.closed, 503)
        if not has_room:
            raise busy(TOO_MANY)

    def leave(self, client: Client) -> None:
        """Forget a client, and free its slots if it has any."""
        with self.wake:
            self.clients.discard(client)
            self.post(lambda: self.batch.drop(client))

    def post(self, job: Callable[[], None]) -> None:
        with self.wake:
            self.jobs.append(job)
            self.wake.notify()

    # -----------------------------------------------------------------------------------------------------------------
    # On the worker's own thread

    def work(self, metrics: Metrics) -> None:
        try:
            self.batch = Batch(self.run, self.n_slots, metrics)
            self.batch.warm_up()
        except BaseException as error:
            self.started.set_exception(error)
            return
        self.closed = None
        self.started.set_result(None)
        try:
            while self.wait():
                self.do_jobs()
                self.do_calls()
                self.do_round()
                self.batch.flush()
                self.batch.report()
        finally:
            self.close(BROKEN_MODEL)

    def wait(self) -> bool:
        """Wait until there is something to do. Returns False at the end."""
        with self.wake:
            while not (self.jobs or self.calls or self.batch.busy or self.closed):
                self.wake.wait()
        return self.closed is None

    def do_jobs(self) -> None:
        while self.jobs:
            self.jobs.popleft()()

    def do_calls(self) -> None:
        """Run calls until they have had as much time as the rounds: neither they nor the engine starve."""
        while (call := self.next_call()) is not None:
            future, function = call
            start = time.perf_counter()
            if future.set_running_or_notify_cancel():  # False: the client left
                try:
                    with torch.inference_mode():
                        future.set_result(function(self.run))
                except BaseException as error:
                    future.set_exception(error)
            self.lead += time.perf_counter() - start

    def next_call(self) -> tuple[Future, Callable[[Run], object]] | None:
        with self.wake:  # close() takes all of them
            due = self.lead <= 0 or not (self.batch.busy or self.jobs)
            return self.calls.popleft() if due and self.calls else None

    def do_round(self) -> None:
        if not self.batch.busy:
            self.lead = 0.0
            return
        start = time.perf_counter()
        self.batch.step()
        seconds = time.perf_counter() - start
        self.lead = max(self.lead - seconds, -seconds)
