"""uvicorn, with what it lacks: slow clients are cut off, open streams end at Ctrl-C, and its log is printed safely.

    serve(application(site), listening, lines)        until Ctrl-C, which raises KeyboardInterrupt

Left out: TLS, which a proxy adds.
"""

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochameleon.errors import say
from nanochameleon.web import limits


class Protocol(H11Protocol):
    """uvicorn waits without end for a client that does not end its head or does not read; here it has some time."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.expect_request()

    def on_response_complete(self) -> None:
        self.expect_request()
        super().on_response_complete()

    def expect_request(self) -> None:
        last = self.cycle  # None before the first request
        self.watch(limits.HEAD_SECONDS, lambda: self.cycle is last)

    def pause_writing(self) -> None:
        super().pause_writing()
        now = self.pause = object()
        self.watch(limits.SEND_SECONDS, lambda: self.pause is now)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.pause = None

    def watch(self, seconds: float, waits: Callable[[], bool]) -> None:
        """Cut the client off if the server still waits for it then, unless it has read some of what it is sent."""
        unread = self.transport.get_write_buffer_size()

        def look() -> None:
            if waits():
                reads = 0 < self.transport.get_write_buffer_size() < unread
                self.watch(seconds, waits) if reads else self.transport.abort()

        self.loop.call_later(seconds, look)


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, lines: Sequence[str]):
        super().__init__(config)
        self.lines = lines

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the model and begin to answer; then print where."""
        began = time.monotonic()
        await super().startup(sockets)
        if (seconds := time.monotonic() - began) > 1:
            say(f"the first token took {seconds:.0f} s, since kernels were compiled")
        for line in self.lines:
            say(line)

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
        timeout_graceful_shutdown=2, h11_max_incomplete_event_size=limits.HEAD,
    )  # fmt: skip


def serve(app: ASGIApp, listening: socket.socket, lines: Sequence[str]) -> None:
    """Answer until Ctrl-C. lines: to print when clients can come."""
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.propagate, logger.handlers = False, [Log()]
        logger.setLevel(logging.ERROR)  # a warning is about a client's mistake: anyone could fill the log
    Server(configure(app), lines).run([listening])
