"""The worker: one thread that owns the model and its engine, and serves every client through one batch.

    streams(requests) -> (sample, event) of a client's samples, as they come; closing it frees their slots
    call(function)    -> function(run), between two rounds of the engine

    jobs (clients that come and leave) -> calls -> a round of the engine -> events -> outboxes -> clients

Nothing else may touch the model: kernels for CPUs have one team of threads. A request's tokens depend on its prompt,
parameters and seed alone. So if the engine fails, it is made again, and the requests in flight run again, one at a
time: what was sent is compared, not sent twice, and only the request that fails alone is the one that fails.
"""

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from nanochameleon.config import SamplingParams
from nanochameleon.documents import Image
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.events import Detokenizer, End
from nanochameleon.generation.request import Request, RequestOutput, cfg_branches, make_request
from nanochameleon.training.run import Run
from nanochameleon.web.outbox import DecodedImage, Event, Finished, Outbox
from nanochameleon.web.refusals import Refused, busy

T = TypeVar("T")

ROUND = 0.02  # seconds of decode steps that a client or a call waits for, at most, if one step takes no longer
FLUSH = 0.025  # seconds between two events of a client, if it has no news such as its first token or its end
MAX_STEPS = 64  # of a round
PREVIEWS = 8  # rounds of an image that somebody watches
MAX_CALLS = 256  # that wait
ENDED = "the server is ending: ask again when it is back"
BROKEN_MODEL = "the model has stopped working: start the server again"


@dataclass(eq=False)
class Client:
    """Samples that one client reads together."""

    outbox: Outbox
    preview: bool
    samples: list["Sample"] = field(default_factory=list)  # unfinished
    urgent: bool = True  # does the next event leave at once?


@dataclass(eq=False)
class Sample:
    client: Client
    index: int  # among the client's samples
    request: Request
    detokenizer: Detokenizer
    id: int | None = None  # in the engine
    replayed: list[int] = field(default_factory=list)  # tokens that the client has, and that come again
    previewed: float = 0.0  # when

    def new_tokens(self, output: RequestOutput) -> tuple[int, ...]:
        """Return the tokens that the client lacks. Raises RuntimeError where a repetition differs."""
        n = min(len(output.tokens), len(self.replayed))
        if list(output.tokens[:n]) != self.replayed[:n] or (output.finished and n < len(self.replayed)):
            raise RuntimeError("the engine gave other tokens when it ran a request again")
        del self.replayed[:n]
        return output.tokens[n:]


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
        if self.unfinished:
            self.unfinished = 0
            self.worker.post(lambda: self.worker.drop(self.client))

    __del__ = leave


class Worker:
    def __init__(self, run: Run, n_slots: int = 16, max_waiting: int = 64):
        self.run, self.n_slots, self.max_waiting = run, n_slots, max_waiting
        self.wake = threading.Condition()  # guards the four below
        self.jobs: deque[Callable[[], None]] = deque()  # short
        self.calls: deque[tuple[Future, Callable[[Run], object]]] = deque()
        self.clients: set[Client] = set()
        self.closed: str | None = "the server has not started"  # why nothing is accepted
        self.engine: Engine | None = None
        self.queue: deque[Sample] = deque()  # not in the engine
        self.running: dict[int, Sample] = {}  # in the engine, by its number
        self.suspects: set[Sample] = set()  # while there are any, requests run one at a time
        self.steps = 8
        self.round_seconds = self.next_flush = self.next_preview = 0.0
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.started: Future = Future()

    # -----------------------------------------------------------------------------------------------------------------
    # On any thread

    @property
    def alive(self) -> bool:
        """Does it answer? False before the start, after the end, and if the engine cannot be made again."""
        return self.closed is None

    @property
    def n_waiting(self) -> int:
        return max(0, self.n_open() - (len(self.engine.running) if self.engine else 0))

    @property
    def slots_in_use(self) -> int:
        return self.engine.n_live if self.engine else 0

    def n_open(self) -> int:
        return sum(len(client.samples) for client in tuple(self.clients))

    def start(self) -> None:
        """Return once the model has made its first token. Raises what went wrong."""
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

    def post(self, job: Callable[[], None]) -> None:
        with self.wake:
            self.jobs.append(job)
            self.wake.notify()

    def check_open(self) -> None:
        if self.closed is not None:
            raise Refused(self.closed, 503)

    async def call(self, function: Callable[[Run], T]) -> T:
        """Run a function of the run on the worker's thread. Raises Refused (429) if too many wait."""
        future: Future = Future()
        with self.wake:
            self.check_open()
            if len(self.calls) >= MAX_CALLS:
                raise busy("too many requests wait: try again in a second")
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
        """Return (sample, event) of several samples in the order of their events.

        Raises Refused at the call: 429 if too many requests wait.
        """
        for request in requests:
            if len(cfg_branches(request, self.run.vocab)) > self.n_slots:
                raise Refused(f"guidance needs 3 slots of the server's batch, and it has {self.n_slots}: turn it off")
        client = Client(Outbox(), preview)
        for i, request in enumerate(requests):
            detokenizer = Detokenizer(request.prompt, self.run.tokenizer)
            client.samples.append(Sample(client, i, request, detokenizer))
        with self.wake:
            self.check_open()
            if self.n_open() + len(requests) > self.n_slots + self.max_waiting:
                raise busy("too many requests wait: try again in a second")
            self.clients.add(client)
            self.jobs.append(lambda samples=tuple(client.samples): self.queue.extend(samples))
            self.wake.notify()
        return Stream(self, client)

    # -----------------------------------------------------------------------------------------------------------------
    # On the worker's own thread

    def work(self) -> None:
        try:
            self.make_engine()
            self.warm_up()
        except BaseException as error:
            self.started.set_exception(error)
            return
        self.closed = None
        self.started.set_result(None)
        try:
            while self.wait():
                self.do_jobs()
                self.do_calls()
                if self.queue or self.running:
                    self.round()
        finally:
            self.close(BROKEN_MODEL)

    def wait(self) -> bool:
        """Wait until there is something to do. Returns False at the end."""
        with self.wake:
            while not (self.jobs or self.calls or self.queue or self.running or self.closed):
                self.wake.wait()
        return self.closed is None

    def make_engine(self) -> None:
        self.engine = None  # frees its memory first
        self.engine = Engine(self.run.model, self.run.vocab, self.run.image_tokenizer.n_codes_per_image, self.n_slots)
        self.engine.steps_between_syncs = MAX_STEPS  # max_steps_between_syncs decides

    def warm_up(self) -> None:
        """Load or compile what a first request needs, so that no client waits for it."""
        vocab, image_len = self.run.vocab, self.run.image_tokenizer.n_codes_per_image
        params = replace(SamplingParams(), max_new_tokens=1)
        self.engine.add_request(make_request([vocab.bos], vocab, image_len, self.engine.context, params, "text"))
        for _ in self.engine.run():
            pass
        if self.run.image_tokenizer.can_draw:
            self.run.image_tokenizer.decode(torch.zeros(1, 1, dtype=torch.long))

    def do_jobs(self) -> None:
        while self.jobs:
            self.jobs.popleft()()

    def do_calls(self) -> None:
        """Run calls for as long as the last round took, at least one: neither they nor the engine starve."""
        end = time.perf_counter() + self.round_seconds
        for i in itertools.count():
            if not self.calls or (i and time.perf_counter() > end):
                return
            future, function = self.calls.popleft()
            if future.set_running_or_notify_cancel():  # False: the client left
                try:
                    with torch.inference_mode():
                        future.set_result(function(self.run))
                except BaseException as error:
                    future.set_exception(error)

    # The samples of a client that left, or that failed

    def drop(self, client: Client) -> None:
        """Forget a client and free its slots."""
        with self.wake:
            self.clients.discard(client)
        for sample in client.samples:
            self.suspects.discard(sample)
            if sample in self.queue:
                self.queue.remove(sample)
            elif self.running.pop(sample.id, None):
                try:
                    self.engine.cancel(sample.id)
                except Exception:
                    self.recover()
        client.samples.clear()

    def fail(self, client: Client, error: Exception) -> None:
        self.drop(client)
        client.outbox.fail(error)

    def recover(self) -> None:
        """Make the engine again, and put the requests in flight before those that wait."""
        lost = list(self.running.values())
        self.running.clear()
        for sample in lost:
            sample.replayed = list(sample.detokenizer.new)
        self.queue.extendleft(reversed(lost))
        self.suspects.update(lost)
        self.make_engine()

    # A round

    def round(self) -> None:
        """One step of the engine, and what it gave."""
        start = time.perf_counter()
        self.admit()
        watched = any(sample.client.preview for sample in self.running.values())
        self.engine.max_steps_between_syncs = (
            min(self.steps, self.engine.image_len // PREVIEWS or 1) if watched else self.steps
        )
        try:
            outputs = self.engine.step()
        except Exception as error:
            if len(self.running) == 1:
                [guilty] = self.running.values()
                self.running.clear()
                self.fail(guilty.client, error)
            self.recover()
            return
        self.round_seconds = time.perf_counter() - start
        if self.round_seconds > ROUND:
            self.steps = max(1, self.steps // 2)
        elif self.round_seconds < ROUND / 2:
            self.steps = min(MAX_STEPS, self.steps * 2)
        for output in outputs:
            if output.request_id in self.running:  # else its client failed in this round
                self.deliver(self.running[output.request_id], output)
        self.preview()
        self.flush()

    def admit(self) -> None:
        """Give the engine what waits: all of it, or one request while there are suspects."""
        while self.queue and not (self.suspects and self.running):
            sample = self.queue.popleft()
            try:
                sample.id = self.engine.add_request(sample.request)
                self.running[sample.id] = sample
            except Exception as error:
                self.fail(sample.client, error)

    def deliver(self, sample: Sample, output: RequestOutput) -> None:
        client = sample.client
        try:
            for event in sample.detokenizer.add(sample.new_tokens(output), output.finished):
                client.outbox.put(sample.index, self.shown(sample, event))
        except Exception as error:
            self.fail(client, error)
            return
        if output.finished:
            del self.running[sample.id]
            self.suspects.discard(sample)
            client.samples.remove(sample)
            client.urgent = True
            if not client.samples:
                self.drop(client)
                client.outbox.wake()

    def shown(self, sample: Sample, event) -> Event:
        """Return an event of the detokenizer as clients get it."""
        if isinstance(event, Image):
            return DecodedImage(event.codes, self.decode(event.codes), True)
        if isinstance(event, End):
            stops = sample.request.stops or (self.run.vocab.eos,)
            last = event.tokens[-1] if event.tokens else None
            return Finished(event.tokens, last in stops or sample.request.modality == "image")
        return event

    def decode(self, codes: Sequence[int]):
        return self.run.image_tokenizer.decode(torch.tensor([codes]))[0]

    def preview(self) -> None:
        """Show the unfinished image that was shown longest ago, in half of the time of a client alone or a fifth."""
        now = time.perf_counter()
        if now < self.next_preview:
            return
        drawn = [s for s in self.running.values() if s.client.preview and len(s.detokenizer.image or ()) > 1]
        drawn = [s for s in drawn if not s.client.outbox.holds_preview(s.index)]
        if not drawn:
            return
        sample = min(drawn, key=lambda s: s.previewed)
        try:
            codes = sample.detokenizer.codes()
            sample.client.outbox.put(sample.index, DecodedImage(codes, self.decode(codes), False))
        except Exception as error:
            self.fail(sample.client, error)
        sample.previewed = time.perf_counter()
        self.next_preview = sample.previewed + (sample.previewed - now) * (1 if len(self.running) == 1 else 4)

    def flush(self) -> None:
        """Wake the clients that have something to read: now and then, since each costs the event loop some time."""
        now = time.perf_counter()
        due = now >= self.next_flush
        if due:
            self.next_flush = now + FLUSH
        for client in tuple(self.clients):
            if client.outbox.unread and (due or client.urgent):
                client.urgent = False
                client.outbox.wake()
