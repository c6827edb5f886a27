"""Bodies of requests: JSON objects with checked fields, and Server-Sent Events as answers.

Every mistake raises Refused, naming the field.
"""

import json
import math
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.people.study import check_annotator
from nanochameleon.evaluate.records import KINDS
from nanochameleon.web.head import media_type
from nanochameleon.web.refusals import Refused, error_body

REQUIRED = object()


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number} is too large")
    return value


def load_object(body: bytes) -> dict:
    """Return the JSON object in a body."""
    try:
        value = json.loads(body, parse_float=finite, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:  # RecursionError: lists nested by the thousand
        raise Refused(f"the body is not JSON ({shown(error, 80)}): send an object", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused("the body is not an object: send {...}", code="invalid_json")
    return value


async def json_body(request: Request) -> dict:
    """Return the JSON object that a request sends. Its size was limited before (guard.py)."""
    if media_type(request.headers.get("content-type", "")) != "application/json":
        raise Refused("the body must have the content-type application/json", 415)
    return load_object(await request.body())


def field(row: dict, name: str, kind: type, default: Any = REQUIRED, place: str = "") -> Any:
    """Return a checked field of an object; the default where it is missing or null.

    kind: str, bool, int, float (which takes whole numbers), list or dict. place: of the object, such as "turns[2].".
    """
    value = row.get(name)
    if value is None:
        if default is REQUIRED:
            raise Refused(f"{place}{name} is missing: give {KINDS[kind]}", param=f"{place}{name}")
        return default
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise Refused(f"{place}{name} must be {KINDS[kind]}, not {shown(value)}", param=f"{place}{name}")
    if kind is str and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Refused(f"{place}{name} has half a surrogate pair, which is no text", param=f"{place}{name}")
    return value


def read_person(row: dict, name: str) -> str:
    """Return the checked name of somebody who labels or judges."""
    try:
        return check_annotator(field(row, name, str))
    except UserError as error:
        raise Refused(str(error), param=name) from None


def event(content: dict | str) -> bytes:
    """One Server-Sent Event."""
    text = content if isinstance(content, str) else json.dumps(content)  # ASCII, so no line separator of Unicode
    return f"data: {text}\n\n".encode()


def event_stream(events: AsyncIterator[dict | str]) -> StreamingResponse:
    """Send events as they come. An error among them becomes the last event."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            async for content in events:
                yield event(content)
        except Exception as error:
            status, body = error_body(error)
            yield event(body)
            if status == 500:
                raise  # into the log

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})
