"""The page's own files. They are read once, at start, and found by name alone: no request names a path of the disk.

    GET /static/page.js  ->  its bytes, its type and an ETag; 304 if the browser has them

A new file in the folder is served after the next start.
"""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanochameleon.web.refusals import Refused

FOLDER = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


@dataclass(frozen=True)
class File:
    content: bytes
    type: str
    etag: str


def read_files() -> dict[str, File]:
    """Every file of the folder, by name. The application keeps them in app.state.files."""
    return {path.name: read(path) for path in sorted(FOLDER.glob("*")) if path.suffix in TYPES}


def read(path: Path) -> File:
    content, kind = path.read_bytes(), TYPES[path.suffix]
    return File(content, f"{kind}; charset=utf-8", f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def answer(request: Request, name: str) -> Response:
    file = request.app.state.files.get(name)
    if file is None:
        raise Refused("no such file belongs to the page", 404)
    headers = {"etag": file.etag, "cache-control": "no-cache"}  # a browser keeps it and asks whether it has changed
    if file.etag in [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers={"content-type": file.type} | headers)


def page(name: str) -> Callable[[Request], Awaitable[Response]]:
    """Return a handler that answers with one of the files, such as index.html."""

    async def handler(request: Request) -> Response:
        return answer(request, name)

    return handler


async def static(request: Request) -> Response:
    return answer(request, request.path_params["name"])


ROUTES = [Route("/static/{name}", static)]
