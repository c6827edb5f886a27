"""The batch: clients' samples on one engine, and what each client gets of them. All of it on the worker's thread.

    add(client) -> queue -> engine -> tokens -> news of each client -> pixels, a batch at a time -> its outbox

A request's tokens depend on its prompt, parameters and seed alone. So if the engine fails, it is made again, and the
requests in flight run again, one at a time: what was sent is compared, not sent twice, and only the request that fails
alone has failed. The same holds for text and pixels: what fails there fails for its client.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from nanochameleon.config import SamplingParams
from nanochameleon.documents import Image
from nanochameleon.errors import shown, warn
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.events import Detokenizer, End
from nanochameleon.generation.request import Request, RequestOutput, make_request
from nanochameleon.training.run import Run
from nanochameleon.web.metrics import Metrics
from nanochameleon.web.outbox import DecodedImage, Event, Finished, Outbox

ROUND = 0.02  # seconds of decode steps between two syncs, at most, if one step takes no longer
MAX_STEPS = 64  # in a round
PREVIEWS = 8  # rounds of an image that somebody watches
ALONE, TOGETHER = 1, 4  # seconds between two previews, in seconds that one takes: with one sample, and with several
FLUSH = 0.006  # seconds between two flushes for each running sample: few wake-ups of clients, and images in batches
FEW = 2  # samples: with so few, no image waits to be decoded with others, which takes half the time for each

SLOTS, CACHE = 16, 2**32  # if nobody says how many slots: these, or as many as fit into so many bytes of KV cache
BRANCHES = 3  # of guidance: the slots that one sample may need


def slots_that_fit(run: Run) -> int:
    """Return 3 to SLOTS: a slot of the toy holds 5 MB, one of the released 7B 2 GB in bfloat16."""
    cfg, weight = run.model.cfg, run.model.tok_embeddings.weight
    n_bytes = 2 * cfg.n_layers * cfg.kv_heads * cfg.head_dim * cfg.max_seq_len * weight.element_size()
    return max(BRANCHES, min(SLOTS, CACHE // n_bytes))


@dataclass(eq=False)
class Client:
    """Samples that one client reads together."""

    outbox: Outbox
    preview: bool
    samples: list["Sample"] = field(default_factory=list)  # unfinished
    news: list[tuple[int, Event | Image]] = field(default_factory=list)  # (sample, event), images not yet decoded
    urgent: bool = True  # do the next news leave at once?
    error: Exception | None = None  # of an image that cannot be decoded


@dataclass(eq=False)
class Sample:
    client: Client
    index: int  # among the client's samples
    request: Request
    detokenizer: Detokenizer
    id: int | None = None  # in the engine
    replayed: list[int] = field(default_factory=list)  # tokens that the client has, and that come again
    asked: float = field(default_factory=time.perf_counter)
    previewed: float = 0.0

    def new_tokens(self, output: RequestOutput) -> tuple[int, ...]:
        """Return the tokens that the client lacks. Raises RuntimeError where a repetition differs."""
        n = min(len(output.tokens), len(self.replayed))
        if list(output.tokens[:n]) != self.replayed[:n] or (output.finished and n < len(self.replayed)):
            raise RuntimeError("the engine gave other tokens when it ran a request again")
        del self.replayed[:n]
        return output.tokens[n:]


class Batch:
    def __init__(self, run: Run, n_slots: int, metrics: Metrics):
        self.run, self.n_slots, self.metrics = run, n_slots, metrics
        self.queue: deque[Sample] = deque()  # not in the engine
        self.running: dict[int, Sample] = {}  # in the engine, by its number
        self.suspects: set[Sample] = set()  # while there are any, requests run one at a time
        self.clients: set[Client] = set()
        self.steps, self.next_preview, self.next_flush = PREVIEWS, 0.0, 0.0
        self.engine: Engine | None = None
        self.make_engine()

    def make_engine(self) -> None:
        self.engine = None  # frees its memory first
        self.engine = Engine(self.run.model, self.run.vocab, self.run.image_tokenizer.n_codes_per_image, self.n_slots)
        self.engine.steps_between_syncs = MAX_STEPS  # max_steps_between_syncs decides

    def warm_up(self) -> None:
        """Load or compile what the first request needs, so that no client waits for it."""
        vocab, params = self.run.vocab, replace(SamplingParams(), max_new_tokens=1)
        sizes = vocab, self.engine.image_len, self.engine.context
        self.engine.add_request(make_request([vocab.bos], *sizes, params, "text"))
        for _ in self.engine.run():
            pass
        if self.run.image_tokenizer.can_draw:
            self.decode([(0,)])

    # -----------------------------------------------------------------------------------------------------------------
    # Clients come and leave

    def add(self, client: Client) -> None:
        self.clients.add(client)
        self.queue.extend(client.samples)

    def drop(self, client: Client) -> None:
        """Forget a client and free its slots."""
        self.clients.discard(client)
        gone, client.samples, client.news = client.samples, [], []
        for sample in gone:
            self.suspects.discard(sample)
            if self.running.pop(sample.id, None):
                try:
                    self.engine.cancel(sample.id)
                except Exception as error:
                    self.recover(error)
        self.queue = deque(sample for sample in self.queue if sample.client is not client)

    def fail(self, client: Client, error: Exception) -> None:
        self.drop(client)
        client.outbox.fail(error)

    def recover(self, error: Exception) -> None:
        """Make the engine again after it failed, and put the requests in flight before those that wait."""
        lost = list(self.running.values())
        self.running.clear()
        if len(lost) == 1:
            self.fail(lost.pop().client, error)
        else:
            warn(f"the engine failed ({shown(error)}): {len(lost)} requests run again, one at a time")
        for sample in lost:
            sample.replayed = list(sample.detokenizer.new)
        self.queue.extendleft(reversed(lost))
        self.suspects.update(lost)
        self.make_engine()

    # -----------------------------------------------------------------------------------------------------------------
    # A round

    @property
    def busy(self) -> bool:
        return bool(self.queue or self.running)

    def report(self) -> None:
        self.metrics.set("requests_waiting", len(self.queue) + len(self.engine.waiting))
        self.metrics.set("slots_in_use", self.engine.n_live)

    def step(self) -> None:
        """One step of the engine, and what clients get of it."""
        self.admit()
        start = time.perf_counter()
        self.engine.max_steps_between_syncs = self.max_steps()
        try:
            outputs = self.engine.step()
        except Exception as error:
            self.recover(error)
            return
        self.adapt(time.perf_counter() - start)
        for output in outputs:
            if output.request_id in self.running:  # else its client failed in this round
                self.deliver(self.running[output.request_id], output)
        self.count(outputs)
        self.show_preview()

    def admit(self) -> None:
        """Give the engine what waits: all of it, or one request while there are suspects."""
        while self.queue and not (self.suspects and self.running):
            sample = self.queue.popleft()
            try:
                sample.id = self.engine.add_request(sample.request)
                self.running[sample.id] = sample
            except Exception as error:
                self.fail(sample.client, error)

    def max_steps(self) -> int:
        watched = any(sample.client.preview for sample in self.running.values())
        return min(self.steps, max(1, self.engine.image_len // PREVIEWS)) if watched else self.steps

    def adapt(self, seconds: float) -> None:
        """Set the steps of the next round by the seconds of this one."""
        if seconds > ROUND:
            self.steps = max(1, self.steps // 2)
        elif seconds < ROUND / 2:
            self.steps = min(MAX_STEPS, self.steps * 2)

    def deliver(self, sample: Sample, output: RequestOutput) -> None:
        """Turn a sample's next tokens into events for its client."""
        client = sample.client
        try:
            if not sample.detokenizer.started:
                self.metrics.observe("seconds_to_first_token", time.perf_counter() - sample.asked)
            for event in sample.detokenizer.add(sample.new_tokens(output), output.finished):
                event = self.finished(sample, event) if isinstance(event, End) else event
                client.news.append((sample.index, event))
        except Exception as error:
            self.fail(client, error)
            return
        if output.finished:
            del self.running[sample.id]
            self.suspects.discard(sample)
            client.samples.remove(sample)
            drew = any(isinstance(event, Image) for _, event in client.news)
            client.urgent |= not drew or len(self.running) <= FEW

    def finished(self, sample: Sample, end: End) -> Finished:
        stops = sample.request.stops or (self.run.vocab.eos,)
        last = end.tokens[-1] if end.tokens else None
        return Finished(end.tokens, last in stops or sample.request.modality == "image")

    def count(self, outputs: Sequence[RequestOutput]) -> None:
        """Report the new tokens."""
        is_image = self.run.vocab.is_image
        counts = Counter("image" if is_image(token) else "text" for output in outputs for token in output.tokens)
        for modality, n in counts.items():
            self.metrics.count("tokens_total", n, modality=modality)

    # -----------------------------------------------------------------------------------------------------------------
    # Images, and what reaches clients

    def decode(self, codes: Sequence[Sequence[int]]) -> np.ndarray:
        return self.run.image_tokenizer.decode(torch.tensor(codes))

    def show_preview(self) -> None:
        """Show the unfinished image that was shown longest ago, in half of the time of a sample alone or a fifth."""
        start = time.perf_counter()
        watched = [sample for sample in self.running.values() if sample.client.preview and self.can_show(sample)]
        if start < self.next_preview or not watched:
            return
        sample = min(watched, key=lambda sample: sample.previewed)
        try:
            codes = sample.detokenizer.codes()
            sample.client.news.append((sample.index, DecodedImage(codes, self.decode([codes])[0], False)))
        except Exception as error:
            self.fail(sample.client, error)
        sample.client.urgent |= len(self.running) <= FEW
        sample.previewed = end = time.perf_counter()
        self.next_preview = end + (end - start) * (ALONE if len(self.running) == 1 else TOGETHER)

    def can_show(self, sample: Sample) -> bool:
        """Is the sample in an image, and has its client read the last preview?"""
        return len(sample.detokenizer.image or ()) > 1 and not sample.client.outbox.holds_preview(sample.index)

    def flush(self) -> None:
        """Hand over the news: urgent ones at once, others now and then, all of them before a rest."""
        now = time.perf_counter()
        due = now >= self.next_flush or not self.busy
        self.next_flush = now + FLUSH * len(self.running) if due else self.next_flush
        ready = [client for client in self.clients if client.news and (due or client.urgent)]
        self.decode_news(ready)
        for client in ready:
            for sample, event in client.news:
                client.outbox.put(sample, event)
            client.news, client.urgent = [], False
            client.outbox.wake()

    def decode_news(self, clients: Sequence[Client]) -> None:
        """Decode the images among the news, all together. One that fails ends its client."""
        places = [(c, i) for c in clients for i, (_, event) in enumerate(c.news) if isinstance(event, Image)]
        codes = [client.news[i][1].codes for client, i in places]
        for (client, i), code, pixels in zip(places, codes, self.decode_each(codes), strict=True):
            if isinstance(pixels, Exception):
                client.error = pixels
            else:
                client.news[i] = (client.news[i][0], DecodedImage(code, pixels, True))
        for client in clients:
            if client.error is not None:
                self.fail(client, client.error)

    def decode_each(self, codes: Sequence[Sequence[int]]) -> list[np.ndarray | Exception]:
        """Decode images together; if that fails, one by one, so that each has an error of its own."""
        try:
            return list(self.decode(codes)) if codes else []
        except Exception as error:
            return [error] if len(codes) == 1 else [each for one in codes for each in self.decode_each([one])]
