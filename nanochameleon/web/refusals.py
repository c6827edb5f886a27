"""Refusals, the answers to requests that are not carried out: a status and a sentence, in the form of OpenAI's errors.

    raise Refused("the body is not JSON: send an object")  ->  400 {"error": {"message", "type", "param", "code"}}

Any UserError is the client's mistake and has the status 400. Anything else is ours: 500, and no detail leaves.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse

from nanochameleon.errors import UserError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error",
         503: "server_error"}  # fmt: skip
BROKEN = "the server failed at this request: try again; its log says more"


class Refused(UserError):
    """A request that is not carried out. param: the field that is wrong. code: a word that programs can compare."""

    def __init__(
        self, sentence: str, status: int = 400, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ):  # fmt: skip
        super().__init__(sentence)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


def busy(sentence: str, seconds: int = 1) -> Refused:
    """429: try again after so many seconds."""
    return Refused(sentence, 429, code="rate_limit_exceeded", retry_after=seconds)


def error_body(error: Exception) -> tuple[int, dict]:
    """(status, body) of an error."""
    if not isinstance(error, UserError):
        return 500, {"error": {"message": BROKEN, "type": TYPES[500], "param": None, "code": None}}
    refused = error if isinstance(error, Refused) else Refused(str(error))
    kind = TYPES.get(refused.status, "invalid_request_error")
    content = {"message": str(error), "type": kind, "param": refused.param, "code": refused.code}
    return refused.status, {"error": content}


def error_response(error: Exception) -> JSONResponse:
    status, body = error_body(error)
    seconds = getattr(error, "retry_after", None)
    return JSONResponse(body, status, {"retry-after": str(seconds)} if seconds else None)


async def on_error(_: Request, error: Exception) -> JSONResponse:
    """The handler of UserError in every application of this folder."""
    return error_response(error)
