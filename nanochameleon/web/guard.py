"""The guard: one ASGI middleware before all routes. A handler never sees what it refuses.

    size of the head, rate of the address -> Host -> Origin -> token -> size and type of the body -> the application

Host: a foreign name that was made to lead here (DNS rebinding) gets 403. Origin: the page of another site cannot ask.
The token, where one is set, comes as Authorization: Bearer TOKEN, or in a cookie, which a browser gets from
/?token=TOKEN. Every answer has the headers of HEADERS.
"""

import hashlib
import hmac
import math
import time
from urllib.parse import parse_qs

import anyio
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochameleon.web import limits
from nanochameleon.web.head import Access, Head, check_body, check_host, check_origin, check_size, too_long
from nanochameleon.web.metrics import Metrics
from nanochameleon.web.rates import Buckets
from nanochameleon.web.refusals import Refused, busy, error_response

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "server": "nanochameleon",
}
NO_TOKEN = "the token is missing: send Authorization: Bearer TOKEN, or open /?token=TOKEN in the browser"


class Guard:
    def __init__(self, app: ASGIApp, metrics: Metrics, access: Access):
        self.app, self.metrics, self.access = app, metrics, access
        self.asked = Buckets(limits.RATE, limits.BURST)
        self.wrong_tokens = Buckets(limits.TOKEN_RATE, limits.TOKEN_BURST)
        self.held = 0  # bytes of bodies, of all requests at once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request or pass it on; then count it."""
        began, status = time.perf_counter(), 499  # where the client leaves before an answer begins

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = message | {"headers": with_headers(message.get("headers", []))}
            await send(message)

        body = Body(self, receive)
        try:
            refusal = self.refuse(scope)
            await (refusal or self.app)(scope, receive if refusal else body.receive, send_with_headers)
        finally:
            self.held -= body.size
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.count("requests_total", route=route, status=status)
            self.metrics.observe("request_seconds", time.perf_counter() - began, route=route)

    def refuse(self, scope: Scope) -> Response | None:
        """Return the answer to a request that goes no further."""
        try:
            check_size(scope)
            head = Head(scope)
            if seconds := self.asked.take(head.address):
                raise busy("too many requests from this address: try again later", math.ceil(seconds))
            hosts = self.access.hosts(head.port, head.reached)
            check_host(head, hosts)
            check_origin(head, hosts)
            answer = self.check_token(head)
            check_body(head)
            return answer
        except Refused as error:
            response = error_response(error)
            if error.status == 401:
                response.headers["www-authenticate"] = "Bearer"
            return response

    # -----------------------------------------------------------------------------------------------------------------
    # The token

    def check_token(self, head: Head) -> Response | None:
        """Raises Refused without the right token. Returns a redirect that sets the cookie, where the address has it."""
        if self.access.token is None or head.path == "/healthz":
            return None
        scheme, _, bearer = head.get("authorization").partition(" ")
        given = parse_qs(head.query.decode("latin-1")).get("token") if head.path == "/" else None
        if given:
            self.compare(given[0], head.address)
            response = RedirectResponse("/", 303)
            response.set_cookie(cookie_name(head), cookie_value(self.access.token), httponly=True, samesite="strict")
            return response
        if scheme.lower() == "bearer":
            self.compare(bearer.strip(), head.address)
        elif not has_cookie(head, cookie_value(self.access.token)):
            raise Refused(NO_TOKEN, 401, code="invalid_api_key")
        return None

    def compare(self, given: str, address: str) -> None:
        """Raises Refused for a wrong token. After several the right one must wait, too: else one could guess."""
        if seconds := self.wrong_tokens.wait(address):
            raise busy("too many wrong tokens: try again later", math.ceil(seconds))
        if not hmac.compare_digest(given.encode(), self.access.token.encode()):
            self.wrong_tokens.take(address)
            raise Refused("the token is wrong", 401, code="invalid_api_key")


def cookie_name(head: Head) -> str:
    return f"nanochameleon-{head.port}"  # browsers send the cookies of a host to all its ports


def cookie_value(token: str) -> str:
    """Return a proof of the token, not itself: other servers of this machine receive it, too."""
    return hmac.new(token.encode(), b"the cookie of nanochameleon.web", hashlib.sha256).hexdigest()


def has_cookie(head: Head, value: str) -> bool:
    cookies = [part.strip().partition("=") for header in head.headers.get("cookie", []) for part in header.split(";")]
    return any(
        name == cookie_name(head) and hmac.compare_digest(given.encode(), value.encode()) for name, _, given in cookies
    )


def with_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Add HEADERS to an answer's own; a browser keeps an answer only where its handler says so."""
    kept = [(name, value) for name, value in headers if name.decode("latin-1").lower() not in HEADERS]
    if not any(name.lower() == b"cache-control" for name, _ in kept):
        kept.append((b"cache-control", b"no-store"))
    return kept + [(name.encode(), value.encode()) for name, value in HEADERS.items()]


class Body:
    """Passes on the body of one request. Raises Refused where it is longer than its head said, or late."""

    def __init__(self, guard: Guard, receive: Receive):
        self.guard, self.next, self.size, self.whole = guard, receive, 0, False
        self.until = time.monotonic() + limits.BODY_SECONDS

    async def receive(self) -> Message:
        if self.whole:  # what comes then is that the client leaves
            return await self.next()
        try:
            with anyio.fail_after(self.until - time.monotonic()):
                message = await self.next()
        except TimeoutError:
            raise Refused(f"the body did not come within {limits.BODY_SECONDS} seconds", 408) from None
        self.whole = not message.get("more_body", False)
        self.add(len(message.get("body", b"")))
        return message

    def add(self, n: int) -> None:
        self.size += n
        self.guard.held += n
        if self.size > limits.BODY:
            raise too_long()
        if self.guard.held > limits.BODIES:
            raise Refused("the server reads too many bodies at once: try again in a second", 503, retry_after=1)
