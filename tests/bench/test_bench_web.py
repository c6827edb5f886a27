"""The bench of the page's server: what its clients count, and that the engine alone does the same work."""

import asyncio
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import SimpleNamespace

import pytest
import tiny
import torch

from nanochameleon.bench import web, web_client
from nanochameleon.bench.rows import make_row
from nanochameleon.bench.web_client import Load, Result, run
from nanochameleon.errors import UserError
from nanochameleon.weights.model_folder import open_model

CPU = torch.device("cpu")
EVENTS = [
    {"mode": "draw"},
    {"sample": 0, "image_started": True},
    {"sample": 0, "end": {"reason": "stop", "new_tokens": 65, "prompt_tokens": 8, "seconds": 0.1}},
    {"sample": 1, "end": {"reason": "stop", "new_tokens": 7, "prompt_tokens": 8, "seconds": 0.1}},
]


class Handler(BaseHTTPRequestHandler):
    """Answers as the page's server does: busy at first, then a whole stream."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        if len(self.server.bodies) <= self.server.busy:
            self.send_response(429)
            for name, value in (("retry-after", "0.01"), ("content-length", "2")):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"{}")
            return
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in [*EVENTS[:2], {"error": {"message": "planted"}}] if self.server.broken else EVENTS:
            data = f"data: {json.dumps(event)}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


def served(load: Load, busy: int = 0, broken: bool = False) -> tuple[Result, list[dict]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.bodies, server.busy, server.broken = [], busy, broken
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        result = asyncio.run(run(dataclasses.replace(load, port=server.server_address[1])))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    return result, server.bodies


LOAD = Load("127.0.0.1", 0, [{"mode": "draw"}, {"mode": "chat"}], clients=3, requests=10)


def test_clients_send_each_request_once_and_count_its_tokens():
    result, bodies = served(LOAD)
    assert (result.answers, result.tokens, result.busy, result.errors) == (10, 10 * 72, 0, [])
    assert sorted(body["seed"] for body in bodies) == list(range(10))
    assert all(body["mode"] == ("draw", "chat")[body["seed"] % 2] for body in bodies)
    assert len(result.first) == len(result.whole) == 10
    assert all(0 < first <= whole for first, whole in zip(result.first, result.whole, strict=True))
    assert max(result.whole) <= result.seconds


def test_a_busy_server_is_asked_again():
    result, bodies = served(LOAD, busy=4)
    assert (result.answers, result.tokens, result.busy, len(bodies)) == (10, 10 * 72, 4, 14)


def test_an_error_in_a_stream_is_one():
    result, _ = served(LOAD, broken=True)
    assert len(result.errors) == 10 and "planted" in result.errors[0]


def test_two_answers_at_once_keep_their_own_times(monkeypatch):
    """The first answer starts first and ends last: each answer's two times must stay a pair."""
    now, result = [0.0], Result()
    monkeypatch.setattr(web_client, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    head, start, rest = b"HTTP/1.1 200 OK\r\n\r\n", b'{"sample"', b'"new_tokens": 7, "x"' + web_client.LAST

    async def at(second: float, reader: asyncio.StreamReader, data: bytes) -> None:
        now[0] = second
        reader.feed_data(data)
        for _ in range(4):  # iterations of the event loop: enough for the waiting client to read this and wait again
            await asyncio.sleep(0)

    async def both() -> None:
        readers = [asyncio.StreamReader(), asyncio.StreamReader()]
        writer = SimpleNamespace(write=lambda data: None)
        asked = [asyncio.create_task(web_client.ask(LOAD, {}, (reader, writer), result)) for reader in readers]
        await asyncio.sleep(0)
        for second, of, data in [(5.0, 0, head + start), (6.0, 1, head + start), (7.0, 1, rest), (9.0, 0, rest)]:
            await at(second, readers[of], data)
        await asyncio.gather(*asked)

    asyncio.run(both())
    assert list(zip(result.first, result.whole, strict=True)) == [(6.0, 7.0), (5.0, 9.0)]


def test_time_ends_a_load(monkeypatch):
    ticks = count()
    monkeypatch.setattr(web_client, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 0.01))
    result, _ = served(dataclasses.replace(LOAD, requests=None, seconds=0.2))
    assert 3 <= result.answers <= 20 and 0.2 <= result.seconds < 0.4


@pytest.mark.parametrize("pixels", [False, True])
def test_the_engine_alone_runs_as_many_requests_at_once(tmp_path, monkeypatch, pixels):
    run, clock, decoded = open_model(tiny.tiny_run(tmp_path / "run"), "cpu", "auto", None), count(), []
    decode = run.image_tokenizer.decode
    monkeypatch.setattr(run.image_tokenizer, "decode", lambda codes: decoded.append(codes) or decode(codes))
    monkeypatch.setattr(web, "perf_counter", lambda: next(clock))  # a second for each answer
    bodies = [web.body("draw", {"text": "a red"}), web.body("draw", {"text": "a star"})]
    n = web.CLIENTS + 7
    rate = web.engine_alone(run, bodies, 8, pixels)
    assert rate == n * (tiny.N_CODES + 1) / (n + 1)
    assert len(decoded) == n * pixels


def test_memory_of_a_process():
    assert web.memory("Name:\tpython\nVmHWM:\t  4096 kB\nVmRSS:\t  2048 kB\n") == 2.0


def test_rows_compare_the_server_with_the_engine(monkeypatch):
    class Server:
        def load(self, bodies, clients, **more):
            assert clients == web.CLIENTS
            slow = any(body.get("preview") for body in bodies)
            return Result(2.0, 100 if slow else 400, 5, 1, [], [0.1, 0.2, 0.4], [1.0, 2.0, 3.0])

    monkeypatch.setattr(web, "engine_alone", lambda run, bodies, seconds, pixels: 250.0 if pixels else 400.0)

    def row(case, variant, value, unit, *ratio):
        return make_row("web", case, variant, value, unit, CPU, *ratio)

    rows = list(web.many_clients(Server(), None, 3, 1.0, row))
    found = {(row.variant, row.ratio_to): (row.value, row.ratio) for row in rows}
    assert found["server", "engine alone: tokens"] == (200.0, 0.5)
    assert found["server", "engine alone: text and pixels"] == (200.0, 0.8)
    assert found["answers", None][0] == 15 and found["429 (busy)", None][0] == 3
    assert found["server, all images watched", None][0] == 50.0
    assert found["first token", None][0] == 200.0 and found["whole answer", None][0] == 2_000.0


def test_a_gpu_is_refused():
    with pytest.raises(UserError, match="CPU"):
        next(web.bench(torch.device("meta"), quick=True))
