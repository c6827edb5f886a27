"""The head of a request: who asks, by which name, from which page, for how much.

Programs may ask by any name of this server. Browsers say which page asks, too, and only the server's own pages may.
"""

from dataclasses import dataclass
from ipaddress import ip_address

from starlette.types import Scope

from nanochameleon.web import limits
from nanochameleon.web.refusals import Refused

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
BODY_TYPES = ("application/json", "application/octet-stream")  # and image/*
PAGES = ("/", "/owner")  # a link on any site may lead to them
NAME = "this server does not answer to that name: open it by its own address, or start it with --allow-host NAME"
FOREIGN = "this request came from the page of another site: open this server's own page"


@dataclass(frozen=True)
class Access:
    """Who may ask. By default every program of this machine, by the names of this machine."""

    names: tuple[str, ...] = ()  # of the server, as in the browser's address; lower case
    token: str | None = None

    def hosts(self, port: int, reached: str = "") -> set[str]:
        """Return all that a Host header may be. A name that was allowed is also right without the port: of a proxy.

        reached: the address of this machine that the client connected to. No name that was made to lead here looks so.
        """
        own = (*LOOPBACK, *as_host(reached))
        names = {*self.names, *(own if port == 80 else ())}
        return names | {f"{name}:{port}" for name in (*own, *self.names)}

    def address(self, port: int) -> str:
        """Return where a browser finds the page."""
        return f"http://{(*self.names, *LOOPBACK)[0]}:{port}/"


def as_host(address: str) -> tuple[str, ...]:
    """Return an IP address as a Host header has it; nothing for anything else."""
    try:
        ip = ip_address(address)
    except ValueError:
        return ()
    return (f"[{ip}]" if ip.version == 6 else str(ip),)


class Head:
    """The head of a request: its headers by lower-case name, each with all its values."""

    def __init__(self, scope: Scope):
        self.method, self.path, self.query = scope["method"], scope["path"], scope["query_string"]
        self.reached, port = scope.get("server") or ("", None)
        self.port = port or 80
        self.address = scope["client"][0] if scope.get("client") else ""
        self.headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            self.headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

    def get(self, name: str) -> str:
        """Return a header's value. Raises Refused if it comes twice: two readers could take different ones."""
        values = self.headers.get(name, [""])
        if len(values) > 1:
            raise Refused(f"the header {name} came {len(values)} times: send it once")
        return values[0]


def check_size(scope: Scope) -> None:
    """The server limits a head that comes in pieces; one that comes at once is limited here."""
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > limits.HEAD or len(scope["headers"]) > limits.HEADERS:
        raise Refused(f"the head of the request is too long: at most {limits.HEAD:,} bytes are read", 431)


def check_host(head: Head, hosts: set[str]) -> None:
    if not head.path.startswith("/"):  # http://..., as proxies are asked, or *
        raise Refused("the address must begin with /")
    if "websocket" in head.get("upgrade").lower():
        raise Refused("there are no websockets here: events come as answers to POST")
    if head.get("host").lower() not in hosts:
        raise Refused(NAME, 403)


def check_origin(head: Head, hosts: set[str]) -> None:
    """Browsers say which page sent a request. Other programs say nothing, and may ask."""
    scheme, _, host = head.get("origin").partition("://")
    if "origin" in head.headers and not (scheme in ("http", "https") and host in hosts):
        raise Refused(FOREIGN, 403)
    if head.get("sec-fetch-site") not in ("", "same-origin", "none") and not is_link(head):
        raise Refused(FOREIGN, 403)


def is_link(head: Head) -> bool:
    """Whether somebody opens a page by a link, in a tab of its own."""
    how = head.get("sec-fetch-mode"), head.get("sec-fetch-dest")
    return head.method == "GET" and head.path in PAGES and how == ("navigate", "document")


def check_body(head: Head) -> None:
    """Check what the head says of the body. No form can send these content-types, so none of another site can post."""
    length = head.get("content-length") or "0"
    if not (length.isascii() and length.isdecimal()):
        raise Refused("the content-length is no number")
    if "content-length" in head.headers and "transfer-encoding" in head.headers:
        raise Refused("the body has a content-length and a transfer-encoding: send one of them")
    if len(length) > 15 or int(length) > limits.BODY:
        raise too_long()
    kind = media_type(head.get("content-type"))
    if head.method == "POST" and kind not in BODY_TYPES and not kind.startswith("image/"):
        raise Refused("the content-type must be application/json, or that of an image", 415)


def media_type(content_type: str) -> str:
    """Return the type alone, such as image/png, without charset and the like."""
    return content_type.partition(";")[0].strip().lower()


def too_long() -> Refused:
    return Refused(f"the body is too long: at most {limits.BODY // limits.MiB} MiB are read", 413)
