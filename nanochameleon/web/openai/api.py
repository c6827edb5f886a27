"""The part of OpenAI's API that this model can carry out, so that clients that know it need no new code.

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="the server's token, or any word without one")

    GET  /v1/models, /v1/models/{name}    the one model that is served
    POST /v1/chat/completions             chat.py
    POST /v1/images/generations           images.py

Errors are OpenAI's, too (refusals.py). Left out: everything else of that API.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from nanochameleon.web.openai.chat import chat_completions
from nanochameleon.web.openai.fields import check_model
from nanochameleon.web.openai.images import images_generations
from nanochameleon.web.site import Site


def describe(site: Site) -> dict:
    # OpenAI's type needs a time. That of a file would tell something of the disk.
    return {"id": site.name, "object": "model", "created": 0, "owned_by": "nanochameleon"}


async def models(request: Request) -> JSONResponse:
    return JSONResponse({"object": "list", "data": [describe(request.app.state.site)]})


async def model(request: Request) -> JSONResponse:
    site: Site = request.app.state.site
    check_model({"model": request.path_params["name"]}, site.name)
    return JSONResponse(describe(site))


ROUTES = [
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/images/generations", images_generations, methods=["POST"]),
]
