"""POST /v1/images/generations: words -> images, as PNG in base64.

The mode is always draw: the words, then the beginning of an image. An aligned model would also draw in a chat when it
is asked to, but there it may answer with words: the toy does so for each caption without a size or a background, while
draw gives an image every time, and its images of "a big red star on white" and of "please draw ..." are as good.
"""

import time
from contextlib import aclosing

import anyio
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse

from nanochameleon.documents import Text
from nanochameleon.web.bodies import field, json_body
from nanochameleon.web.conversation import MAX_TEXT
from nanochameleon.web.openai.fields import SAMPLING, check_fields, check_model, read_n, read_seed
from nanochameleon.web.openai.samples import Ended, answers, fitting_requests, image_part, open_streams, unless_left
from nanochameleon.web.outbox import DecodedImage
from nanochameleon.web.refusals import Refused
from nanochameleon.web.site import Site
from nanochameleon.web.talk import read_options

HINTS = {"quality", "style", "moderation", "output_compression"}  # ignored: they mean nothing to this model
FIELDS = SAMPLING | HINTS | {"prompt", "model", "n", "seed"}
NO_STREAM = "images come whole here: ask /v1/chat/completions for a stream"


def neutral(side: int) -> dict:
    return {
        "size": (["auto", f"{side}x{side}"], f"this model draws {side}x{side} alone"),
        "response_format": (["b64_json"], "the only form is b64_json: images are kept nowhere"),
        "output_format": (["png"], "the only format is png"),
        "background": (["auto", "opaque"], "images are opaque"),
        "stream": ([False], NO_STREAM),
        "partial_images": ([0], NO_STREAM),
    }


async def generate(site: Site, body: dict) -> JSONResponse:
    side = site.run.cfg.vqgan.resolution
    check_fields(body, FIELDS, neutral(side))
    check_model(body, site.name)
    prompt, n, seed = field(body, "prompt", str), read_n(body), read_seed(body)
    if not 1 <= len(prompt) <= MAX_TEXT:
        raise Refused(f"prompt must have 1 to {MAX_TEXT:,} characters, not {len(prompt):,}", param="prompt")
    how = "prompt", site.run, "draw", [Text(prompt)], read_options(body), seed, n
    requests = await anyio.to_thread.run_sync(fitting_requests, *how)
    data, n_new = [{}] * n, 0
    async with aclosing(answers(open_streams(site, requests), site.run.tokenizer)) as pieces:
        async for sample, piece in pieces:
            if isinstance(piece, DecodedImage):
                part = await image_part(piece)
                data[sample] = {"b64_json": part["image_url"]["url"].partition(",")[2], "codes": part["codes"]}
            elif isinstance(piece, Ended):
                n_new += piece.n_tokens
    return JSONResponse({
        "created": int(time.time()), "data": data, "output_format": "png", "background": "opaque",
        "size": f"{side}x{side}", "seed": seed, "usage": usage(len(requests[0].prompt), n_new),
    })  # fmt: skip


def usage(n_prompt: int, n_new: int) -> dict:
    """No prompt of this route has an image, and no answer has text. <s> and <boi> count as text."""
    return {
        "input_tokens": n_prompt, "input_tokens_details": {"text_tokens": n_prompt, "image_tokens": 0},
        "output_tokens": n_new, "output_tokens_details": {"text_tokens": 0, "image_tokens": n_new},
        "total_tokens": n_prompt + n_new,
    }  # fmt: skip


async def images_generations(request: HTTPRequest) -> JSONResponse:
    site: Site = request.app.state.site
    return await unless_left(request, generate(site, await json_body(request)))
