"""Requests that no client of HTTP sends: an application is called as a server calls it."""

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope


def run(app: ASGIApp, scope: Scope, receive: Receive | None = None) -> list[Message]:
    """Return what the application sends."""
    sent: list[Message] = []

    async def empty() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    anyio.run(app, scope, receive or empty, send)
    return sent


def ask(app: ASGIApp, receive: Receive | None = None, **changes) -> tuple[int, bytes]:
    """Return the status and the body of the answer to GET /, but for the changes of its scope."""
    scope = {
        "type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "server": ("::1", 8000),
        "client": ("10.0.0.1", 1), "headers": [(b"host", b"localhost:8000")],
    } | changes  # fmt: skip
    start, *rest = run(app, scope, receive)
    return start["status"], b"".join(message.get("body", b"") for message in rest)
