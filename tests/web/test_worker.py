"""The worker: a request's tokens are its own, a crash is its own, and a client that leaves takes nothing with it."""

import asyncio
import threading
from collections import deque
from contextlib import aclosing, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny_site import tiny_run

from nanochameleon.config import ModelConfig, SamplingParams
from nanochameleon.documents import Image, Text
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.events import Detokenizer
from nanochameleon.generation.request import Request, make_request
from nanochameleon.web import batch as batch_module
from nanochameleon.web import worker as worker_module
from nanochameleon.web.metrics import Metrics
from nanochameleon.web.outbox import DecodedImage, Finished
from nanochameleon.web.refusals import Refused
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
        assert self.opened.acquire(timeout=20)
        return self.function(*arguments)


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


def test_a_watched_image_is_seen_before_it_is_whole():
    with working() as worker:
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
        first = asyncio.create_task(worker.call(lambda run: (held.set(), free.wait(20))))
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
# Crashes


def innocent_and_guilty() -> list[Request]:
    return [request(i) for i in range(5)] + [request(GUILTY)] + [request(i) for i in range(10, 15)]


def only_the_guilty_failed(worker: Worker, message: str = "planted") -> None:
    """Of many requests at once only the guilty one fails, time and again; all others get all that they asked for."""
    for _ in range(2):
        requests = innocent_and_guilty()
        for asked, result in zip(requests, outcomes(worker, requests), strict=True):
            if asked.seed == GUILTY:
                assert isinstance(result, RuntimeError) and message in str(result), result
            else:
                check_whole(result, asked)
    assert worker.alive and slots_in_use(worker) == 0 and not worker.batch.suspects


def test_detokenizing_that_crashes(monkeypatch):
    class Broken(Detokenizer):
        def add(self, tokens, finished):
            yield from super().add(tokens[:1], False)
            raise RuntimeError("planted")

    class Marked(batch_module.Sample):
        def __init__(self, client, index, asked, detokenizer):
            broken = Broken(asked.prompt, tiny.TOKENIZER)
            super().__init__(client, index, asked, broken if asked.seed == GUILTY else detokenizer)

    monkeypatch.setattr(worker_module, "Sample", Marked)
    with working() as worker:
        only_the_guilty_failed(worker)


def test_decoding_that_crashes(monkeypatch):
    requests = [request(i, "image") for i in range(6)] + [request(GUILTY, "image")]
    codes = [tuple(tiny.VOCAB.token_to_code(token) for token in alone(asked)[:-1]) for asked in requests]
    assert codes[-1] not in codes[:-1]
    run, decoded = tiny_run(), []
    decode = run.image_tokenizer.decode

    def broken(wanted):
        decoded.append(len(wanted))
        if list(codes[-1]) in wanted.tolist():
            raise RuntimeError("planted")
        return decode(wanted)

    monkeypatch.setattr(run.image_tokenizer, "decode", broken)
    with working(run) as worker:
        *others, guilty = outcomes(worker, requests)
        assert "planted" in str(guilty)
        for asked, events in zip(requests, others, strict=False):
            check_whole(events, asked)
        assert max(decoded) > 1  # others were decoded together with it
        assert slots_in_use(worker) == 0


def test_a_preview_that_crashes(monkeypatch):
    run = tiny_run()
    decode = run.image_tokenizer.decode

    def broken(wanted):
        if 1 < wanted.shape[1] < tiny.N_CODES:
            raise RuntimeError("planted")
        return decode(wanted)

    with working(run) as worker:
        monkeypatch.setattr(run.image_tokenizer, "decode", broken)
        monkeypatch.setattr(worker.batch, "can_show", lambda sample: len(sample.detokenizer.image or ()) > 2)
        with pytest.raises(RuntimeError, match="planted"):
            asyncio.run(read(worker, request(0, "image"), preview=True))
        check_whole(outcomes(worker, [request(0, "image")])[0], request(0, "image"))


def test_adding_that_crashes(monkeypatch):
    add = Engine.add_request

    def broken(engine, asked):
        if asked.seed == GUILTY:
            raise RuntimeError("planted")
        return add(engine, asked)

    monkeypatch.setattr(Engine, "add_request", broken)
    with working() as worker:
        only_the_guilty_failed(worker)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_step_that_crashes(monkeypatch, after):
    step = Engine.step

    def broken(engine):
        engine.max_steps_between_syncs = 2  # so that some tokens were sent before
        for running in engine.running:
            if running.request.seed == GUILTY and running.n_new >= after:
                engine.decoder = None  # its state is lost
                raise RuntimeError("planted")
        return step(engine)

    monkeypatch.setattr(Engine, "step", broken)
    with working() as worker:
        only_the_guilty_failed(worker)


def test_a_cancel_that_crashes(monkeypatch):
    gate, cancel = Gate(Engine.step), Engine.cancel

    def broken(engine, request_id):
        monkeypatch.setattr(Engine, "cancel", cancel)
        raise RuntimeError("planted")

    async def leave(worker: Worker) -> list:
        streams = [worker.streams([request(i)]) for i in range(3)]
        await asyncio.to_thread(gate.reached.acquire)
        monkeypatch.setattr(Engine, "cancel", broken)
        await streams[0].aclose()
        gate.opened.release(1_000)
        return [[event for _, event in [each async for each in stream]] for stream in streams[1:]]

    with working() as worker:
        monkeypatch.setattr(Engine, "step", lambda engine: gate(engine))
        for i, events in enumerate(asyncio.run(leave(worker)), 1):
            check_whole(events, request(i))


def test_a_repetition_that_differs_fails_alone(monkeypatch):
    step, failed = Engine.step, []

    def broken(engine):
        engine.max_steps_between_syncs = 2
        if not failed and len(engine.running) > 2 and all(running.n_new >= 4 for running in engine.running):
            failed.append(True)
            raise RuntimeError("planted")
        outputs = step(engine)
        wrong = {running.request_id for running in engine.running if running.request.seed == GUILTY} if failed else ()
        return [
            replace(output, tokens=(tiny.VOCAB.eot, *output.tokens[1:])) if output.request_id in wrong else output
            for output in outputs
        ]

    monkeypatch.setattr(Engine, "step", broken)
    requests = [request(i, "text") for i in (1, 2, GUILTY, 3)]
    with working() as worker:
        for asked, result in zip(requests, outcomes(worker, requests), strict=True):
            if asked.seed == GUILTY:
                assert "other tokens" in str(result)
            else:
                check_whole(result, asked)
    assert failed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_cannot_be_made_again(monkeypatch):
    def broken(*_):
        raise RuntimeError("planted")

    with working() as worker:
        monkeypatch.setattr(Engine, "step", broken)
        monkeypatch.setattr(batch_module, "Engine", broken)
        errors = outcomes(worker, [request(0), request(1)])
        worker.thread.join(20)
        assert not worker.alive and {error.status for error in errors} == {503}
        assert outcomes(worker, [request(2)])[0].status == 503


def test_a_model_that_cannot_run_is_no_server(monkeypatch):
    def broken(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(Engine, "step", broken)
    worker = Worker(tiny_run(), n_slots=4)
    with pytest.raises(RuntimeError, match="planted"):
        worker.start()
    assert not worker.alive


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def test_calls_return_raise_and_are_cancelled():
    async def run(worker: Worker) -> None:
        assert await worker.call(lambda run: run.vocab) == tiny.VOCAB
        with pytest.raises(KeyError):
            await worker.call(lambda run: {}["missing"])
        held, free, ran = threading.Event(), threading.Event(), []
        first = asyncio.create_task(worker.call(lambda run: (held.set(), free.wait(20))))
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
