"""The worker where something crashes: only the guilty request fails, and the next ones are served."""

import asyncio
from dataclasses import replace

import pytest
import tiny
from serving import PATIENCE
from tiny_site import tiny_run
from working import GUILTY, Gate, alone, check_whole, outcomes, read, request, slots_in_use, working

from nanochameleon.generation.engine import Engine
from nanochameleon.generation.events import Detokenizer
from nanochameleon.generation.request import Request
from nanochameleon.web import batch as batch_module
from nanochameleon.web import worker as worker_module
from nanochameleon.web.worker import Worker


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
        worker.thread.join(PATIENCE)
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
