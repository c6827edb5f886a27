"""The worker: a request's tokens are its own, and a client that leaves takes nothing with it."""

import asyncio
import threading
from collections import deque
from contextlib import aclosing
from types import SimpleNamespace

import pytest
import tiny
import torch
from faults import wait_for
from serving import PATIENCE
from tiny_site import tiny_run
from working import Gate, check_whole, outcome, outcomes, read, request, slots_in_use, working

from nanochameleon.config import ModelConfig
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.request import Request
from nanochameleon.web import batch as batch_module
from nanochameleon.web import worker as worker_module
from nanochameleon.web.metrics import Metrics
from nanochameleon.web.outbox import DecodedImage
from nanochameleon.web.refusals import Refused
from nanochameleon.web.worker import Worker

# ---------------------------------------------------------------------------------------------------------------------
# What requests get


def test_every_request_gets_the_tokens_that_it_gets_alone():
    requests = [request(i, ("text", "image", "both")[i % 3], max_new_tokens=8 + i) for i in range(12)]
    requests += [request(50, "both", guidance_scale=2.0, image_guidance_scale=1.5)]
    with working() as worker:
        for asked, events in zip(requests, outcomes(worker, requests), strict=True):
            check_whole(events, asked)
        assert slots_in_use(worker) == 0


def test_samples_of_one_client_come_as_one_stream():
    requests = [request((3, i)) for i in range(8)]
    with working() as worker:
        merged = asyncio.run(read(worker, *requests))
    for i, asked in enumerate(requests):
        check_whole([event for sample, event in merged if sample == i], asked)


def test_the_end_says_why():
    with working() as worker:
        ends = [events[-1] for events in outcomes(worker, [request(i, max_new_tokens=40) for i in range(12)])]
        assert {end.stopped for end in ends} == {True, False}
        assert all(end.stopped == (end.tokens[-1] == tiny.VOCAB.eos) for end in ends)
        assert outcomes(worker, [request(1, "image")])[0][-1].stopped


def test_a_watched_image_is_seen_before_it_is_whole(monkeypatch):
    step = Engine.step

    def when_all_is_read(engine: Engine) -> list:  # what is not read in time is not shown
        wait_for(lambda: not any(client.outbox.unread for client in tuple(worker.batch.clients)))
        return step(engine)

    with working() as worker:
        monkeypatch.setattr(Engine, "step", when_all_is_read)
        events = [event for _, event in asyncio.run(read(worker, request(0, "image"), preview=True))]
        unwatched = [event for _, event in asyncio.run(read(worker, request(0, "image")))]
    shown = [event for event in events if isinstance(event, DecodedImage)]
    assert not shown[0].complete and shown[-1].complete and sum(image.complete for image in shown) == 1
    assert all(image.codes == shown[-1].codes[: len(image.codes)] for image in shown)
    assert [event.complete for event in unwatched if isinstance(event, DecodedImage)] == [True]


def test_previews_take_a_fifth_of_the_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(batch_module.time, "perf_counter", lambda: clock[0])
    batch = batch_module.Batch(tiny_run(), 4, Metrics())

    def decode(codes):
        clock[0] += 0.1
        return codes

    monkeypatch.setattr(batch, "decode", decode)
    outbox = SimpleNamespace(holds_preview=lambda _: False)
    client = batch_module.Client(outbox, preview=True)
    for n, share in ((1, 0.5), (5, 0.2)):
        samples = [batch_module.Sample(client, i, request(), None) for i in range(n)]
        for sample in samples:
            sample.detokenizer = SimpleNamespace(image=[1, 2], codes=lambda: (1,))
        batch.running = dict(enumerate(samples))
        start, spent = clock[0], 0.0
        while clock[0] - start < 100:
            clock[0] += 0.02  # a round
            before = clock[0]
            batch.show_preview()
            spent += clock[0] - before
        assert share * 0.8 < spent / 100 < share * 1.05
        times = sorted(sample.previewed for sample in samples)
        assert times[0] > clock[0] - n * 0.7  # each has its turn


def test_metrics_count_what_was_made():
    metrics, requests = Metrics(), [request(0, "text"), request(1, "image"), request(2, "image")]
    worker = Worker(tiny_run(), n_slots=4)
    worker.start(metrics)
    try:
        ends = [events[-1] for events in outcomes(worker, requests)]
        slots_in_use(worker)
    finally:
        worker.stop()
    n_image = sum(tiny.VOCAB.is_image(token) for end in ends for token in end.tokens)
    n_text = sum(len(end.tokens) for end in ends) - n_image
    lines = metrics.text().splitlines()
    assert n_image == 2 * tiny.N_CODES
    for line in (
        f'tokens_total{{modality="image"}} {n_image}', f'tokens_total{{modality="text"}} {n_text}',
        "requests_waiting 0", "slots_in_use 0", "seconds_to_first_token_count 3",
    ):  # fmt: skip
        assert f"nanochameleon_{line}" in lines


# ---------------------------------------------------------------------------------------------------------------------
# Clients that leave, too many clients, the end


def test_a_client_that_leaves_frees_its_slots_at_once(monkeypatch):
    step = Gate(Engine.step)

    async def leave(worker: Worker) -> None:
        streams = [worker.streams([request(i, max_new_tokens=40)]) for i in range(6)]  # 4 run, 2 wait
        await asyncio.to_thread(step.reached.acquire)
        await streams[4].aclose()
        del streams[5]  # nobody holds it any more
        for stream in streams[:4]:
            await stream.aclose()
        step.opened.release()  # the round ends, and no other begins

    with working() as worker:
        monkeypatch.setattr(Engine, "step", lambda engine: step(engine))
        asyncio.run(leave(worker))
        assert slots_in_use(worker) == 0 and not worker.batch.busy
        assert not worker.clients and not worker.batch.clients
        monkeypatch.undo()
        check_whole(outcomes(worker, [request(9)])[0], request(9))


def test_too_many_that_wait_are_refused(monkeypatch):
    step = Gate(Engine.step)

    async def flood(worker: Worker) -> None:
        streams = [worker.streams([request(i), request(i + 100)]) for i in range(3)]
        with pytest.raises(Refused, match="too many requests wait") as refused:
            worker.streams([request(9)])
        assert refused.value.status == 429 and refused.value.retry_after
        step.opened.release(1_000)
        for stream in streams:
            async with aclosing(stream):
                async for _ in stream:
                    pass
        check_whole([event for _, event in await read(worker, request(9))], request(9))  # there is room again

    with working(max_waiting=2) as worker:
        monkeypatch.setattr(Engine, "step", lambda engine: step(engine))
        asyncio.run(flood(worker))


def test_too_many_calls_are_refused(monkeypatch):
    monkeypatch.setattr(worker_module, "MAX_CALLS", 2)
    held, free = threading.Event(), threading.Event()

    async def flood(worker: Worker) -> list:
        first = asyncio.create_task(worker.call(lambda run: (held.set(), free.wait(PATIENCE))))
        await asyncio.to_thread(held.wait)
        others = [asyncio.create_task(worker.call(lambda run: 1)) for _ in range(3)]
        done, _ = await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
        free.set()
        assert [task.exception().status for task in done] == [429]
        await first
        return sorted(str(result) for result in await asyncio.gather(*others, return_exceptions=True))

    with working() as worker:
        assert asyncio.run(flood(worker)) == ["1", "1", worker_module.TOO_MANY]


@pytest.mark.parametrize(("n_slots", "by_image"), [(2, 1.5), (1, 1.5), (1, 2.0)])
def test_guidance_that_has_no_room_is_refused_and_the_sentence_helps(n_slots, by_image):
    asked = request(guidance_scale=2.0, image_guidance_scale=by_image)
    with working(n_slots=n_slots) as worker:
        error = asyncio.run(outcome_of_call(worker, asked))
    assert isinstance(error, Refused) and error.status == 400 and f"the server has {n_slots}" in str(error)
    enough = int(str(error).rpartition("--slots ")[2])
    for n_slots, fits in ((enough, True), (enough - 1, False)):
        with working(n_slots=n_slots) as worker:
            assert (asyncio.run(outcome_of_call(worker, asked)) is None) == fits


async def outcome_of_call(worker: Worker, asked: Request) -> Exception | None:
    try:
        await worker.streams([asked]).aclose()
    except Exception as error:
        return error


def test_the_end_is_said_to_all_at_once(monkeypatch):
    step = Gate(Engine.step)

    async def end(worker: Worker) -> list:
        streams = [asyncio.create_task(outcome(worker, request(i))) for i in range(6)]
        await asyncio.to_thread(step.reached.acquire)
        called = asyncio.create_task(worker.call(lambda run: 1))
        await asyncio.sleep(0)
        worker.close(worker_module.ENDED)  # while the engine is busy
        errors = await asyncio.gather(*streams, called, return_exceptions=True)
        errors += [await outcome(worker, request(7)), await outcome_of_call(worker, request(8))]
        step.opened.release(1_000)
        return errors

    with working() as worker:
        monkeypatch.setattr(Engine, "step", lambda engine: step(engine))
        errors = asyncio.run(end(worker))
    assert not worker.alive and not worker.thread.is_alive()
    assert {(str(error), error.status) for error in errors} == {(worker_module.ENDED, 503)} and len(errors) == 9


class EndsBetween(deque):
    """Calls that the end of the server takes between two looks at them, where the worker lets it."""

    def __bool__(self) -> bool:
        found = len(self) > 0
        if found:
            ending = threading.Thread(target=self.worker.close, args=(worker_module.ENDED,))
            ending.start()
            ending.join(0.2)  # it waits for the worker's lock, if the worker has it
        return found


def test_calls_that_the_end_takes_are_not_taken_by_the_worker(monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(args.exc_value))

    async def end(worker: Worker) -> object:
        worker.calls = EndsBetween()
        worker.calls.worker = worker
        return (await asyncio.gather(worker.call(lambda run: 1), return_exceptions=True))[0]

    with working() as worker:
        result = asyncio.run(end(worker))
    assert not raised and (result == 1 or str(result) == worker_module.ENDED)


def test_slots_fit_into_memory():
    assert Worker(tiny_run()).n_slots == 16
    for cfg, n in ((ModelConfig(), 3), (ModelConfig(n_kv_heads=8), 8), (ModelConfig(max_seq_len=512), 16)):
        with torch.device("meta"):
            embeddings = torch.nn.Embedding(1, 1, dtype=torch.bfloat16)
        run = SimpleNamespace(model=SimpleNamespace(cfg=cfg, tok_embeddings=embeddings))
        assert batch_module.slots_that_fit(run) == n


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def test_calls_return_raise_and_are_cancelled():
    async def run(worker: Worker) -> None:
        assert await worker.call(lambda run: run.vocab) == tiny.VOCAB
        with pytest.raises(KeyError):
            await worker.call(lambda run: {}["missing"])
        held, free, ran = threading.Event(), threading.Event(), []
        first = asyncio.create_task(worker.call(lambda run: (held.set(), free.wait(PATIENCE))))
        await asyncio.to_thread(held.wait)
        second = asyncio.create_task(worker.call(lambda run: ran.append(1)))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        free.set()
        await first
        await worker.call(lambda run: 1)
        assert not ran

    with working() as worker:
        asyncio.run(run(worker))


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.5])
def test_calls_and_rounds_share_the_time(monkeypatch, seconds):
    clock, spent = [0.0], {"call": 0.0, "round": 0.0}
    monkeypatch.setattr(worker_module.time, "perf_counter", lambda: clock[0])

    def spend(what: str, seconds: float) -> None:
        clock[0] += seconds
        spent[what] += seconds

    worker = Worker(tiny_run())
    worker.batch = SimpleNamespace(busy=True, step=lambda: spend("round", 0.02))
    while clock[0] < 60:
        while len(worker.calls) < 100:
            worker.calls.append((worker_module.Future(), lambda run: spend("call", seconds)))
        worker.do_calls()
        worker.do_round()
    assert 0.45 < spent["call"] / clock[0] < 0.55


def test_calls_run_while_nothing_else_does_and_do_not_owe_for_it(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(worker_module.time, "perf_counter", lambda: clock[0])
    worker = Worker(tiny_run())
    worker.batch = SimpleNamespace(busy=False)
    for _ in range(100):
        worker.calls.append((worker_module.Future(), lambda run: clock.__setitem__(0, clock[0] + 1)))
    worker.do_calls()
    worker.do_round()
    assert not worker.calls and worker.lead <= 0
