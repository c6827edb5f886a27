"""The application: which address is answered by which function.

    site = Site(...); uvicorn.run(application(site))

Each part of the page brings its ROUTES; guard.py stands before all of them.
"""

from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from nanochameleon.errors import UserError
from nanochameleon.web.images import ROUTES as IMAGES
from nanochameleon.web.refusals import on_error
from nanochameleon.web.site import Site
from nanochameleon.web.tokens import ROUTES as TOKENS


async def healthz(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})


def application(site: Site) -> Starlette:
    @asynccontextmanager
    async def lifespan(_: Starlette):
        site.worker.start()
        yield
        site.worker.stop()

    routes = [Route("/healthz", healthz), *IMAGES, *TOKENS]
    app = Starlette(routes=routes, exception_handlers={UserError: on_error}, lifespan=lifespan)
    app.state.site = site
    return app
