"""The server on a real socket: requests that no client of HTTP sends, clients that are slow, and clients that leave."""

import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import anyio
import pytest
from serving import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nanochameleon.web import limits
from nanochameleon.web.app import HANDLERS
from nanochameleon.web.bodies import event_stream
from nanochameleon.web.guard import Guard
from nanochameleon.web.head import Access
from nanochameleon.web.metrics import Metrics
from nanochameleon.web.server import Protocol

GET = "GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"client": request.client.host, "bytes": len(await request.body())})


LEFT = threading.Event()


async def stream(request: Request):
    async def events():
        try:
            while True:
                yield {"text": "x" * 1_000}
                await anyio.sleep(0)
        finally:
            LEFT.set()

    return event_stream(events())


@pytest.fixture(scope="module")
def address():
    routes = [
        Route("/", echo),
        Route("/post", echo, methods=["POST"]),
        Route("/stream", stream),
    ]
    with served(Guard(Starlette(routes=routes, exception_handlers=HANDLERS), Metrics(), Access())) as at:
        yield at


@contextmanager
def connected(address: str):
    at = urlsplit(address)
    with socket.create_connection((at.hostname, at.port), timeout=10) as opened:
        yield opened


def filled(text: str, address: str) -> bytes:
    return text.replace("{host}", urlsplit(address).netloc).encode("latin-1")


def raw(address: str, sent: bytes) -> bytes:
    """Return the answer to bytes on a new connection."""
    with connected(address) as opened:
        opened.sendall(sent)
        return answer(opened)


def answer(opened: socket.socket) -> bytes:
    """Return what comes until an answer is whole or the connection is closed."""
    received = b""
    while True:
        head, end, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if end and length and len(body) >= int(length[1]):
            return received
        chunk = opened.recv(65_536)
        if not chunk:
            return received
        received += chunk


def status(received: bytes) -> int:
    return int(received.split(b" ", 2)[1])


def post(body: str = "", head: str = "") -> str:
    return f"POST /post HTTP/1.1\r\nHost: {{host}}\r\nContent-Type: application/json\r\n{head}\r\n{body}"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (GET, 200),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.0\r\n\r\n", 403),  # may lack a Host, and then has no right one
        ("GET / HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        ("GET http://evil.example/ HTTP/1.1\r\nHost: {host}\r\n\r\n", 400),
        ("GET //evil.example/ HTTP/1.1\r\nHost: {host}\r\n\r\n", 404),
        ("OPTIONS * HTTP/1.1\r\nHost: {host}\r\n\r\n", 400),
        ("CONNECT evil.example:443 HTTP/1.1\r\nHost: {host}\r\n\r\n", 400),
        ("TRACE / HTTP/1.1\r\nHost: {host}\r\n\r\n", 405),
        ("GET /..%2f..%2fetc/passwd HTTP/1.1\r\nHost: {host}\r\n\r\n", 404),
        ("GET /../../etc/passwd HTTP/1.1\r\nHost: {host}\r\n\r\n", 404),
        ("GET /%00 HTTP/1.1\r\nHost: {host}\r\n\r\n", 404),
        ("GET /%ff%fe HTTP/1.1\r\nHost: {host}\r\n\r\n", 404),
        ("GET / HTTP/1.1\r\nHost : {host}\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: {host}\r\nX: a\r\n b\r\n\r\n", 200),  # a folded line, as HTTP once had it
        ("GET / \r\n\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),  # TLS
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: {host}\r\nX: a\x00b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: {host}\r\nX: " + "y" * 20_000 + "\r\n\r\n", 431),
        ("GET / HTTP/1.1\r\nHost: {host}\r\n" + "X: y\r\n" * 200 + "\r\n", 431),
        ("GET /" + "x" * 20_000 + " HTTP/1.1\r\nHost: {host}\r\n\r\n", 431),
        (post("{}", "Content-Length: 2\r\n"), 200),
        (post("2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked\r\n"), 200),
        (post("2\r\n{}\r\n0\r\n\r\n", "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n"), 400),
        (post("zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked\r\n"), 400),
        (post("{}", "Content-Length: -2\r\n"), 400),
        (post("{}", "Content-Length: 2\r\nContent-Length: 3\r\n"), 400),
        (post("", "Content-Length: 99999999999999999999\r\n"), 413),
        (post("{}", "Transfer-Encoding: gzip, chunked\r\n"), 501),
    ],
)
def test_a_request_that_is_odd_gets_an_answer_and_the_next_one_its_own(address, text, code):
    received = raw(address, filled(text, address))
    assert status(received) == code or (code in (431, 501) and status(received) == 400)
    assert b"Traceback" not in received and b"passwd" not in received.replace(b"/etc/passwd", b"")
    assert status(raw(address, filled(GET, address))) == 200


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
def test_a_client_cannot_choose_its_address(address, name):
    """A rate for each address would else be none."""
    received = raw(address, filled(f"GET / HTTP/1.1\r\nHost: {{host}}\r\n{name}: 10.9.8.7\r\n\r\n", address))
    assert json.loads(received.partition(b"\r\n\r\n")[2])["client"] == "127.0.0.1"


@pytest.mark.parametrize("length", [0, 1])
def test_what_follows_a_body_that_is_longer_than_it_says_is_no_request_of_anybody(address, length):
    """The rest is read as the next request of the same client, which it is not."""
    with connected(address) as opened:
        opened.sendall(filled(post("{}" + "x" * 20, f"Content-Length: {length}\r\n"), address))
        first = answer(opened)
        assert json.loads(first.partition(b"\r\n\r\n")[2].partition(b"HTTP/")[0])["bytes"] == length


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(address, capfd):
    for head in ("Content-Length: 1000\r\n", "Transfer-Encoding: chunked\r\n"):
        with connected(address) as opened:
            opened.sendall(filled(post("3e8\r\n{", head), address))
    assert status(raw(address, filled(GET, address))) == 200 and capfd.readouterr().err == ""


def test_a_client_that_leaves_a_stream_ends_it(address, capfd):
    LEFT.clear()
    with connected(address) as opened:
        opened.sendall(filled(GET.replace("/ ", "/stream "), address))
        assert b"data: " in opened.recv(65_536) + opened.recv(65_536)
    assert LEFT.wait(10) and capfd.readouterr().err == ""


@pytest.mark.parametrize("begin", ["", "GET / HT", "GET / HTTP/1.1\r\nHost: {host}\r\nX: "])
def test_a_client_that_never_ends_its_head_is_cut_off(begin, monkeypatch):
    """A trickle of bytes does not keep the connection, neither at its start nor after an answer."""
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    with served(Guard(Starlette(routes=[Route("/", echo)]), Metrics(), Access())) as at:
        for before in ("", GET):
            with connected(at) as opened:
                opened.sendall(filled(before, at))
                assert not before or status(answer(opened)) == 200
                opened.sendall(begin.encode())
                assert cut_off(opened, bool(begin))


def cut_off(opened: socket.socket, trickle: bool) -> bool:
    opened.settimeout(0.02)
    for _ in range(500):
        try:
            if not opened.recv(65_536):
                return True
        except TimeoutError:
            if trickle:
                opened.sendall(b"x")
        except ConnectionError:
            return True
    return False


@pytest.mark.parametrize("reads", [False, True])
def test_a_client_that_does_not_read_is_cut_off_and_one_that_does_is_not(reads, monkeypatch):
    monkeypatch.setattr(limits, "SEND_SECONDS", 1.0 if reads else 0.2)
    LEFT.clear()
    with (
        served(Guard(Starlette(routes=[Route("/stream", stream)]), Metrics(), Access())) as at,
        connected(at) as opened,
    ):
        opened.sendall(filled(GET.replace("/ ", "/stream "), at))
        until = time.monotonic() + 1.3
        while reads and time.monotonic() < until:  # the server waits for the client again and again
            assert opened.recv(1_000_000)
        assert not LEFT.is_set() if reads else LEFT.wait(30)


def test_a_long_request_is_not_cut_off(monkeypatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.05)

    async def slow(request: Request) -> JSONResponse:
        await anyio.sleep(0.3)
        return JSONResponse({})

    with served(Guard(Starlette(routes=[Route("/", slow)]), Metrics(), Access())) as at:
        assert status(raw(at, filled(GET, at))) == 200


LARGE = 16 * limits.MiB  # more than the system keeps of an answer


async def large(request: Request) -> Response:
    return Response(bytes(LARGE))


def test_a_client_that_reads_a_large_answer_slowly_gets_all_of_it(monkeypatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(limits, "SEND_SECONDS", 0.1)
    with served(Starlette(routes=[Route("/", large)])) as at, connected(at) as opened:
        opened.sendall(filled(GET, at))
        began, n = time.monotonic(), 0
        while chunk := opened.recv(256 * 1024):
            n += len(chunk)
            threading.Event().wait(0.01)  # 64 of these: the reader is slower than the limit
        assert n > LARGE and time.monotonic() - began > 3 * limits.HEAD_SECONDS


def test_a_client_that_does_not_read_its_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(limits, "SEND_SECONDS", 0.1)
    lost, connection_lost = threading.Event(), Protocol.connection_lost

    def lose(*arguments) -> None:
        connection_lost(*arguments)
        lost.set()

    monkeypatch.setattr(Protocol, "connection_lost", lose)
    with served(Starlette(routes=[Route("/", large)])) as at, connected(at) as opened:
        opened.sendall(filled(GET, at))
        assert lost.wait(10)


def test_a_body_above_the_limit_is_answered_while_the_client_still_sends(address):
    """A client sees the answer only once it has sent everything, so the server reads on and drops what comes."""
    size = limits.BODY + limits.MiB
    head = filled(post("", f"Content-Length: {size}\r\n"), address)
    assert status(raw(address, head + bytes(size))) == 413
