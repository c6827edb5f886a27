"""The server on a real socket: requests that no client of HTTP sends, clients that are slow, and clients that leave."""

import json
import re
import socket
import threading
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import anyio
import pytest
from faults import wait_for
from serving import PATIENCE, served
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
    with socket.create_connection((at.hostname, at.port), timeout=PATIENCE) as opened:
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
    assert LEFT.wait(PATIENCE) and capfd.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------------
# Slow clients, without waiting for them


@pytest.fixture
def connections(monkeypatch):
    """The server's side of each connection. Time passes for them where let_time_pass says so."""
    made, connection_made = [], Protocol.connection_made

    def remember(protocol: Protocol, transport) -> None:
        connection_made(protocol, transport)
        made.append(protocol)

    monkeypatch.setattr(Protocol, "connection_made", remember)
    monkeypatch.setattr(limits, "HEAD_SECONDS", 1_000_000)
    monkeypatch.setattr(limits, "SEND_SECONDS", 1_000_000)
    return made


def let_time_pass(protocol: Protocol) -> bool:
    """Let its timers ring. Returns: is the client cut off?"""
    done = threading.Event()

    def ring() -> None:
        for timer in tuple(protocol.timers.values()):
            timer._run()
        done.set()

    protocol.loop.call_soon_threadsafe(ring)
    assert done.wait(PATIENCE)
    return protocol.transport.is_closing()


@contextmanager
def asked(path: str, *routes: Route):
    """Yield a connection that has asked for a path."""
    with served(Guard(Starlette(routes=[*routes]), Metrics(), Access())) as at, connected(at) as opened:
        opened.sendall(filled(GET.replace("/ ", f"{path} "), at))
        yield opened


@pytest.mark.parametrize("begin", ["", "GET / HT", "GET / HTTP/1.1\r\nHost: {host}\r\nX: "])
@pytest.mark.parametrize("before", ["", GET])
def test_a_client_that_never_ends_its_head_is_cut_off(connections, before, begin):
    """A trickle of bytes does not keep the connection, neither at its start nor after an answer."""
    received, data_received = threading.Semaphore(0), Protocol.data_received

    def receive(protocol: Protocol, data: bytes) -> None:
        data_received(protocol, data)
        received.release()

    with (
        pytest.MonkeyPatch.context() as patch,
        served(Guard(Starlette(routes=[Route("/", echo)]), Metrics(), Access())) as at,
        connected(at) as opened,
    ):
        if before:
            opened.sendall(filled(before, at))
            assert status(answer(opened)) == 200
        patch.setattr(Protocol, "data_received", receive)
        for byte in begin:
            opened.sendall(byte.encode())
            assert received.acquire(timeout=PATIENCE)
        wait_for(lambda: connections and "head" in connections[0].timers)
        assert let_time_pass(connections[0])
        with suppress(ConnectionError):
            assert opened.recv(65_536) == b""


def test_a_long_request_is_not_cut_off(connections):
    async def slow(request: Request) -> JSONResponse:
        assert not connections[0].timers
        return JSONResponse({})

    with asked("/", Route("/", slow)) as opened:
        assert status(answer(opened)) == 200


def test_a_client_that_does_not_read_a_stream_is_cut_off(connections):
    LEFT.clear()
    with asked("/stream", Route("/stream", stream)):
        wait_for(lambda: connections and "answer" in connections[0].timers)
        assert any(let_time_pass(connections[0]) for _ in range(1000))  # until the system keeps no more of it
        assert LEFT.wait(PATIENCE)


def test_a_client_that_reads_a_stream_is_not_cut_off(connections, monkeypatch):
    resumed, resume_writing = [], Protocol.resume_writing

    def resume(protocol: Protocol) -> None:
        resume_writing(protocol)
        resumed.append(dict(protocol.timers))

    monkeypatch.setattr(Protocol, "resume_writing", resume)
    with asked("/stream", Route("/stream", stream)) as opened:
        for n in range(5):  # the server waits for the client again and again
            wait_for(lambda: connections and "answer" in connections[0].timers)
            while len(resumed) == n:
                assert opened.recv(1_000_000)
    assert not any(resumed)


LARGE = 16 * limits.MiB  # more than the system keeps of an answer


async def large(request: Request) -> Response:
    return Response(bytes(LARGE))


def test_a_client_that_reads_a_large_answer_slowly_gets_all_of_it(connections):
    with asked("/", Route("/", large)) as opened:
        wait_for(lambda: connections and connections[0].transport.get_write_buffer_size())
        n, unread = 0, connections[0].transport.get_write_buffer_size
        while before := unread():
            while before == unread() and n <= LARGE:
                n += len(opened.recv(256 * 1024))
            let_time_pass(connections[0])
        while n <= LARGE and (chunk := opened.recv(LARGE)):
            n += len(chunk)
        assert n > LARGE  # a head, too


def test_a_client_that_does_not_read_its_answer_is_cut_off(connections):
    with asked("/", Route("/", large)):
        wait_for(lambda: connections and connections[0].transport.get_write_buffer_size())
        assert any(let_time_pass(connections[0]) for _ in range(1000))


# ---------------------------------------------------------------------------------------------------------------------


def test_a_body_above_the_limit_is_answered_while_the_client_still_sends(address):
    """A client sees the answer only once it has sent everything, so the server reads on and drops what comes."""
    size = limits.BODY + limits.MiB
    head = filled(post("", f"Content-Length: {size}\r\n"), address)
    assert status(raw(address, head + bytes(size))) == 413


def test_no_packet_waits_until_the_one_before_is_acknowledged(address, monkeypatch):
    seen, made = [], Protocol.connection_made

    def look(self, transport) -> None:
        made(self, transport)
        seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(Protocol, "connection_made", look)
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port)) as client:
        client.sendall(GET.format(host=parts.netloc).encode())
        assert client.recv(12) == b"HTTP/1.1 200"
    assert seen == [1]
