"""uvicorn, with what it lacks: slow clients are cut off, open streams end at Ctrl-C, and its log is printed safely.

    serve(application(site), listening, lines)        until Ctrl-C, which raises KeyboardInterrupt

Left out: TLS, which a proxy adds.
"""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochameleon.errors import say
from nanochameleon.web import limits


class Protocol(H11Protocol):
    """uvicorn waits without end for a client that does not end its head or does not read; here it has some time."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # asyncio does so for some sockets alone. Without it the second packet of an answer waits 40 ms for an ACK.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.watch("head", limits.HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # the head is whole
            self.forget("head")

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        if self.cycle is before:  # else the next request was there already
            self.watch("head", limits.HEAD_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch("answer", limits.SEND_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.forget("answer")

    def connection_lost(self, error: Exception | None) -> None:
        for what in tuple(self.timers):
            self.forget(what)  # a timer would keep the last request in memory
        super().connection_lost(error)

    def watch(self, what: str, seconds: float) -> None:
        """Cut the client off then, unless it has read some of what it is sent meanwhile."""
        unread = self.transport.get_write_buffer_size()

        def look() -> None:
            reads = 0 < self.transport.get_write_buffer_size() < unread
            self.watch(what, seconds) if reads else self.transport.abort()

        self.forget(what)
        self.timers[what] = self.loop.call_later(seconds, look)

    def forget(self, what: str) -> None:
        if timer := self.timers.pop(what, None):
            timer.cancel()


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, lines: Sequence[str]):
        super().__init__(config)
        self.lines = lines

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the model and begin to answer; then print where."""
        await super().startup(sockets)
        for line in self.lines:
            say(line)

    def handle_exit(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C and SIGTERM. uvicorn would wait until the model has started, and kernels compile for a minute."""
        if not self.started:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        super().handle_exit(number, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End everything at once. What runs in a thread, such as writing a vote, still comes to its end."""
        logger = logging.getLogger("uvicorn")
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # it reports each request that is cut off
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        for task in self.server_state.tasks:
            task.cancel()
        await super().shutdown(sockets)
        logger.setLevel(level)


class Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), file=sys.stderr)


def configure(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app, loop="asyncio", http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False,
        proxy_headers=False,  # else a client could name any address as its own
        server_header=False, limit_concurrency=limits.CONNECTIONS, timeout_keep_alive=limits.HEAD_SECONDS,
        timeout_graceful_shutdown=limits.END_SECONDS, h11_max_incomplete_event_size=limits.HEAD,
    )  # fmt: skip


def serve(app: ASGIApp, listening: socket.socket, lines: Sequence[str]) -> None:
    """Answer until Ctrl-C. lines: to print when clients can come."""
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.propagate, logger.handlers = False, [Log()]
        logger.setLevel(logging.ERROR)  # a warning is about a client's mistake: anyone could fill the log
    Server(configure(app), lines).run([listening])
