"""Runs an application on a free port of this machine, in a thread, for as long as a test needs it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nanochameleon.web.server import Server, configure

PATIENCE = 100  # seconds until what a test waits for counts as lost: a wait ends as soon as it has come


@contextmanager
def served(app: Any, port: int = 0) -> Iterator[str]:
    """Yield the address, such as http://127.0.0.1:49152. Raises RuntimeError where the server does not start."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a server that just ended
        listening.bind(("127.0.0.1", port))
        server = Server(configure(app), [])
        ready, startup = threading.Event(), server.startup

        async def start(sockets=None) -> None:
            await startup(sockets)
            ready.set()

        server.startup = start
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            if not ready.wait(PATIENCE) or not server.started:
                raise RuntimeError("the server did not start")
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
