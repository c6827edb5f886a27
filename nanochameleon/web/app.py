"""The application: which address is answered by which function.

    site = Site(...); uvicorn.run(application(site))

Each part of the page brings its ROUTES; guard.py stands before all of them.
"""

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from nanochameleon.errors import UserError
from nanochameleon.web import metrics, static_files
from nanochameleon.web.guard import Guard
from nanochameleon.web.head import Access
from nanochameleon.web.refusals import Refused, error_response, on_error
from nanochameleon.web.site import Site
from nanochameleon.web.static_files import page

if TYPE_CHECKING:
    from nanochameleon.web.judge import StudySite


async def healthz(request: Request) -> JSONResponse:
    """Whether the server answers. 503 where its model has stopped working."""
    site = request.app.state.site
    if isinstance(site, Site) and not site.worker.alive:
        raise Refused(site.worker.closed, 503)
    return JSONResponse({"status": "ok"})


def routes_of_model() -> list[Route]:
    from nanochameleon.web import images, red_team, talk, tokens  # a study runs without torch
    from nanochameleon.web.openai import api

    routes = [Route("/", page("index.html")), *images.ROUTES, *talk.ROUTES, *tokens.ROUTES, *red_team.ROUTES]
    return [*routes, *api.ROUTES]


def routes_of_study() -> list[Route]:
    from nanochameleon.web import judge

    return [Route("/", page("study.html")), *judge.ROUTES]


async def on_http_error(_: Request, error: HTTPException) -> Response:
    """404 and 405, which Starlette raises for addresses and methods that nothing answers."""
    if error.status_code == 405:
        response = error_response(Refused("this address does not take this method", 405))
        response.headers.update(error.headers or {})  # which methods it takes
        return response
    return error_response(Refused("nothing is here: the page is at /", error.status_code))


async def on_disconnect(_: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it


async def on_bug(_: Request, error: Exception) -> Response:
    response = error_response(error)
    # Starlette raises it again, so that the server logs it; and the server then closes the connection.
    response.headers["connection"] = "close"
    return response


HANDLERS = {UserError: on_error, HTTPException: on_http_error, ClientDisconnect: on_disconnect, Exception: on_bug}


class Guarded(Starlette):
    """The guard stands before the handlers of errors, so that it adds its headers to their answers, too."""

    def build_middleware_stack(self) -> ASGIApp:
        return Guard(super().build_middleware_stack(), self.state.site.metrics, self.state.access)


def application(site: "Site | StudySite", access: Access | None = None) -> Starlette:
    @asynccontextmanager
    async def lifespan(_: Starlette):
        if has_model:
            site.worker.start(site.metrics)
        yield
        site.worker.stop() if has_model else site.votes.close()

    has_model = isinstance(site, Site)
    routes = routes_of_model() if has_model else routes_of_study()
    routes += [Route("/healthz", healthz), *metrics.ROUTES, *static_files.ROUTES]
    app = Guarded(routes=routes, exception_handlers=HANDLERS, lifespan=lifespan)
    app.router.redirect_slashes = False  # a redirect would repeat what a client put into its Host header
    app.state.site, app.state.files, app.state.access = site, static_files.read_files(), access or Access()
    return app
