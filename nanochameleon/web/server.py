"""uvicorn, with what it lacks: slow clients are cut off, open streams end at Ctrl-C, and its log is printed safely.

serve(application(site), listening)        until Ctrl-C, which raises KeyboardInterrupt
"""

import asyncio
import logging
import socket
import sys
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochameleon.errors import say
from nanochameleon.web import limits


class Protocol(H11Protocol):
    """uvicorn waits for the head of a request without end; here it must come in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.expect_request()

    def on_response_complete(self) -> None:
        self.expect_request()
        super().on_response_complete()

    def expect_request(self) -> None:
        now = self.cycle  # None before the first request
        self.loop.call_later(limits.HEAD_SECONDS, lambda: self.cycle is now and self.transport.abort())


class Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        say(f"the page is at http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends it)")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close every connection first: to a stream it looks as if its client had left."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)


class Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), file=sys.stderr)


def serve(app: Any, listening: socket.socket) -> None:
    logger = logging.getLogger("uvicorn")
    logger.propagate, logger.handlers = False, [Log()]
    logger.setLevel(logging.ERROR)  # a warning is about a client's mistake: anyone could fill the log
    config = uvicorn.Config(
        app, loop="asyncio", http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False,
        proxy_headers=False,  # else a client could name any address as its own
        server_header=False, limit_concurrency=limits.CONNECTIONS, timeout_keep_alive=limits.HEAD_SECONDS,
        timeout_graceful_shutdown=2, h11_max_incomplete_event_size=limits.HEAD,
    )  # fmt: skip
    Server(config).run([listening])
