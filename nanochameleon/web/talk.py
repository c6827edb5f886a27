"""Talking: turns and options -> the engine's requests -> a stream of what each sample writes and draws.

    GET  /api/settings   the model, and what may be asked of it
    POST /api/generate   {"turns", "mode", "options", "seed", "samples", "preview"} -> Server-Sent Events

The first event is {"mode"}. Then come {"sample", "text"}, {"sample", "image_started"} and {"sample", "image": {"codes",
"url", "complete"}} as they happen, and {"sample", "end": {"reason", "stop", "new_tokens", "prompt_tokens", "seconds"}}
for each sample; stop is the name of the stop token that the model wrote, or null. Sample i is that of sample.py --n.
"""

import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

import anyio
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nanochameleon.config import SamplingParams
from nanochameleon.documents import Document, Text
from nanochameleon.errors import shown
from nanochameleon.generation.events import ImageStarted
from nanochameleon.generation.prompts import MODALITY, Mode, stop_tokens
from nanochameleon.generation.request import Request, make_request
from nanochameleon.images.tokenizer import NO_DECODER
from nanochameleon.training.run import Run
from nanochameleon.vocab import Vocab
from nanochameleon.web import conversation, limits
from nanochameleon.web.bodies import event_stream, field, json_body
from nanochameleon.web.conversation import AUTO_MODES, prompt_tokens, read_mode, read_turns, resolve
from nanochameleon.web.images import png_url
from nanochameleon.web.outbox import DecodedImage, Finished
from nanochameleon.web.refusals import Refused
from nanochameleon.web.worker import Stream
from nanochameleon.weights.ranges import out_of_range

if TYPE_CHECKING:
    from nanochameleon.web.site import Site

OPTIONS = {
    "temperature": float, "top_p": float, "top_k": int, "guidance_scale": float, "image_guidance_scale": float,
    "repetition_penalty": float, "max_new_tokens": int,
}  # fmt: skip
FIELDS = ("turns", "mode", "options", "seed", "samples", "preview")
MAX_SEED = 2**53 - 1  # the largest whole number that every reader of JSON keeps exactly

EXAMPLES = {  # by the source of the model's data: conversations to begin with
    "shapes": [
        {"mode": "auto", "messages": ["a big red circle above a small blue star", "what colour is the star?"]},
        {"mode": "auto", "messages": ["two small green squares on black", "how many squares are there?"]},
        {"mode": "chat", "messages": ["please draw a big red star on white"]},
        {"mode": "chat", "messages": ["show a big red star on white, then two small blue crosses on black"]},
        {"mode": "chat", "messages": ["say backwards: red star"]},
    ],
}

# ---------------------------------------------------------------------------------------------------------------------
# From JSON to the engine's requests


def check_fields(row: dict, known: tuple[str, ...], place: str = "") -> None:
    """Raise Refused for a field that has no meaning here."""
    if unknown := sorted(row.keys() - set(known)):
        name = place + shown(unknown[0], 60)
        raise Refused(f"{name} is unknown: the fields are {', '.join(known)}", param=name)


def read_options(row: dict, place: str = "") -> dict[str, int | float]:
    """Return the options of sampling that an object gives, each of its type; null is one that is left out."""
    read = {name: field(row, name, kind, None, place) for name, kind in OPTIONS.items()}
    return {name: value for name, value in read.items() if value is not None}


def sampling_params(of_run: SamplingParams, options: dict[str, int | float], place: str = "") -> SamplingParams:
    """Return the model's own parameters, replaced by the options as sample.py replaces them.

    Raises Refused, naming the option, for a number out of range. place: of the options, such as "options.".
    """
    given = {"image_guidance_scale": options["guidance_scale"]} if "guidance_scale" in options else {}
    given |= options | {f"image_{name}": options[name] for name in ("temperature", "top_p", "top_k") if name in options}
    params = dataclasses.replace(of_run, **given)
    if wrong := out_of_range(sample=params):
        name, rest = wrong.removeprefix("sample.").split(" ", 1)
        raise Refused(f"{place}{name} {rest}", param=f"{place}{name}")
    return params


def make_requests(
    run: Run, mode: Mode, document: Document, options: dict[str, int | float], seed: int = 0, n: int = 1,
    place: str = "",
) -> list[Request]:  # fmt: skip
    """Return the checked requests of n samples, which draw from the seeds (seed, 0), (seed, 1), ...

    options: from read_options. Raises Refused or UserError for options out of range, for a conversation that does not
    fit into the context, and for a mode that may draw where the model cannot.
    """
    modality, image_len = MODALITY[mode], run.image_tokenizer.n_codes_per_image
    if modality != "text" and not run.image_tokenizer.can_draw:
        raise Refused(NO_DECODER, param="mode")
    params = sampling_params(run.cfg.sample, options, place)
    if mode == "draw":
        if (most := options.get("max_new_tokens", image_len + 1)) <= image_len:
            name = f"{place}max_new_tokens"
            raise Refused(f"{name} must be at least {image_len + 1} to draw, not {most}", param=name)
        params = dataclasses.replace(params, max_new_tokens=image_len + 1)  # with <eoi>
    sizes = run.vocab, image_len, run.cfg.model.max_seq_len
    request = make_request(
        prompt_tokens(document, run, mode), *sizes, params, modality, (seed, 0), stop_tokens(mode, run.vocab)
    )
    return [dataclasses.replace(request, seed=(seed, i)) for i in range(n)]


def read_whole(row: dict, name: str, default: int, low: int, high: int) -> int:
    """Return a checked whole number."""
    value = field(row, name, int, default)
    if not low <= value <= high:
        raise Refused(f"{name} must be {low} to {high}, not {shown(value)}", param=name)
    return value


def read_body(row: dict, run: Run) -> tuple[Mode, list[Request]]:
    """Return the resolved mode and the requests that a body asks for."""
    check_fields(row, FIELDS)
    mode = read_mode(row) or "auto"
    options = field(row, "options", dict, {})
    check_fields(options, tuple(OPTIONS), "options.")
    seed, n = read_whole(row, "seed", 0, 0, MAX_SEED), read_whole(row, "samples", 1, 1, limits.SAMPLES)
    resolved, document = resolve(mode, read_turns(row, run), run)
    return resolved, make_requests(run, resolved, document, read_options(options, "options."), seed, n, "options.")


# ---------------------------------------------------------------------------------------------------------------------
# Routes


async def generate(request: HTTPRequest) -> Response:
    site: Site = request.app.state.site
    row = await json_body(request)
    preview = field(row, "preview", bool, False)
    mode, requests = await anyio.to_thread.run_sync(read_body, row, site.run)  # a long text takes a while
    return event_stream(events(mode, len(requests[0].prompt), site.worker.streams(requests, preview), site.run.vocab))


async def events(mode: Mode, n_prompt: int, stream: Stream, vocab: Vocab) -> AsyncIterator[dict]:
    """Yield the events of /api/generate."""
    start = time.perf_counter()
    yield {"mode": mode}
    async with aclosing(stream):
        async for sample, event in stream:
            if isinstance(event, Text):
                yield {"sample": sample, "text": event.text}
            elif isinstance(event, ImageStarted):
                yield {"sample": sample, "image_started": True}
            elif isinstance(event, DecodedImage):
                url = await anyio.to_thread.run_sync(png_url, event.pixels)
                image = {"codes": event.codes, "url": url, "complete": event.complete}
                yield {"sample": sample, "image": image}
            elif isinstance(event, Finished):
                seconds = round(time.perf_counter() - start, 3)
                reason = "stop" if event.stopped else "length"
                stop = special_name(event.tokens[-1], vocab) if event.stopped and mode != "draw" else None
                counts = {"new_tokens": len(event.tokens), "prompt_tokens": n_prompt, "seconds": seconds}
                yield {"sample": sample, "end": {"reason": reason, "stop": stop, **counts}}


def special_name(token: int, vocab: Vocab) -> str:
    """The paper's names where it has some; the release's file says <racm3:break>, <eoss> and <reserved08706>."""
    return {vocab.boi: "<boi>", vocab.eoi: "<eoi>", vocab.eot: "<eot>"}.get(token) or vocab.name(token)


async def settings(request: HTTPRequest) -> JSONResponse:
    site: Site = request.app.state.site
    run, images = site.run, site.run.image_tokenizer
    model = {
        "name": site.name, "context": run.cfg.model.max_seq_len, "vocab_size": run.vocab.size,
        "n_codes": run.cfg.vqgan.n_codes, "codes_per_image": images.n_codes_per_image,
        "resolution": run.cfg.vqgan.resolution, "can_draw": images.can_draw,
        "aligned": run.cfg.train.assistant_only_loss,
    }  # fmt: skip
    modes = [mode for mode in AUTO_MODES if images.can_draw or MODALITY.get(mode, "text") == "text"]
    most = {
        "samples": limits.SAMPLES, "seed": MAX_SEED, "turns": conversation.MAX_TURNS,
        "segments": conversation.MAX_SEGMENTS, "text": conversation.MAX_TEXT, "image_bytes": limits.IMAGE,
    }  # fmt: skip
    return JSONResponse({
        "model": model, "modes": modes, "defaults": dataclasses.asdict(run.cfg.sample), "limits": most,
        "red_team": site.red_team is not None,
        "examples": EXAMPLES.get(run.cfg.data.source) if images.can_draw else None,
    })  # fmt: skip


ROUTES = [Route("/api/settings", settings), Route("/api/generate", generate, methods=["POST"])]
