"""POST /v1/chat/completions: messages -> what the model writes and draws, whole or as a stream of chunks.

    body -> read_chat -> Chat -> answer, for each sample: text, images, the end -> completion | chunks

OpenAI's own API has no images in this answer. Here they are where OpenRouter's clients look for them: images of the
message or of the delta, {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}. A whole message has
parts, too: its texts and the numbers of its images, in the order in which they came. seed is the one that was drawn
from. Beyond OpenAI's, a body may have mode and the other options of sample.py.
"""

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from nanochameleon.documents import Text
from nanochameleon.errors import shown
from nanochameleon.generation.request import Request
from nanochameleon.training.run import Run
from nanochameleon.web.bodies import event_stream, field, json_body
from nanochameleon.web.conversation import Turn, read_mode, resolve
from nanochameleon.web.openai.fields import SAMPLING, check_fields, check_model, read_n, read_seed, read_stops
from nanochameleon.web.openai.messages import NO_TOOLS, read_messages
from nanochameleon.web.openai.samples import (
    Ended,
    Piece,
    answers,
    fitting_requests,
    image_part,
    open_streams,
    unless_left,
)
from nanochameleon.web.refusals import Refused
from nanochameleon.web.site import Site
from nanochameleon.web.talk import read_options

FIELDS = SAMPLING | {
    "messages", "model", "n", "seed", "stop", "max_tokens", "max_completion_tokens", "modalities", "mode", "stream",
    "stream_options",
}  # fmt: skip
NO_LOGPROBS, USE_PENALTY = "log probabilities are not in the answer", "use repetition_penalty, which this model has"
NEUTRAL = {
    "tools": ([[]], NO_TOOLS),
    "functions": ([[]], NO_TOOLS),
    "tool_choice": (["none", "auto"], NO_TOOLS),
    "function_call": (["none", "auto"], NO_TOOLS),
    "logprobs": ([False], NO_LOGPROBS),
    "top_logprobs": ([0], NO_LOGPROBS),
    "response_format": ([{"type": "text"}], 'an answer has no other form than {"type": "text"}'),
    "frequency_penalty": ([0], USE_PENALTY),
    "presence_penalty": ([0], USE_PENALTY),
    "logit_bias": ([{}], "single tokens cannot be favoured"),
}
Samples = AsyncIterator[tuple[int, Piece]]
MODES = {("image",): "draw", ("text",): "answer", ("image", "text"): "chat"}  # of the modalities, sorted


@dataclass(frozen=True)
class Chat:
    """A checked body, and the fields that all parts of its answer have in common."""

    requests: list[Request]  # one a sample
    stops: tuple[str, ...]
    usage_wanted: bool  # at the end of a stream
    common: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# The body


async def read_chat(body: dict, site: Site) -> Chat:
    check_fields(body, FIELDS, NEUTRAL)
    check_model(body, site.name)
    mode, stops, n, seed = mode_asked(body), read_stops(body), read_n(body), read_seed(body)
    options = read_options(body) | read_max_tokens(body)
    turns = await read_messages(body, site)
    requests = await anyio.to_thread.run_sync(chat_requests, site.run, mode, turns, options, seed, n)
    usage_wanted = field(field(body, "stream_options", dict, {}), "include_usage", bool, False, "stream_options.")
    common = {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": site.name, "seed": seed,
    }  # fmt: skip
    return Chat(requests, stops, usage_wanted, common)


def chat_requests(run: Run, mode: str, turns: Sequence[Turn], options: dict, seed: int, n: int) -> list[Request]:
    # An aligned model answers to the whole conversation, and others to a question about an image.
    as_chat = mode == "answer" and run.cfg.train.assistant_only_loss
    resolved, document = resolve("chat" if as_chat else mode, turns, run)
    least, most = run.image_tokenizer.n_codes_per_image + 1, options.get("max_new_tokens")
    if resolved == "draw" and most is not None and most < least:
        name = "max_completion_tokens"
        raise Refused(f"{name} must be at least {least} to draw an image, not {most}", param=name)
    return fitting_requests("messages", run, "answer" if as_chat else resolved, document, options, seed, n)


def mode_asked(body: dict) -> str:
    """Return the mode, or the one of the modalities that are asked for."""
    modalities, mode = field(body, "modalities", list, None), read_mode(body)
    if modalities is not None and mode is not None:
        raise Refused("modalities and mode say the same: give one of them", param="mode")
    if modalities is None:
        return mode or "auto"
    if not all(isinstance(word, str) for word in modalities) or tuple(sorted(set(modalities))) not in MODES:
        raise Refused('modalities must be ["text"], ["image"] or ["text", "image"]', param="modalities")
    return MODES[tuple(sorted(set(modalities)))]


def read_max_tokens(body: dict) -> dict[str, int]:
    """max_completion_tokens, or max_tokens, its older name, as our option."""
    for name in ("max_completion_tokens", "max_tokens"):
        if (most := field(body, name, int, None)) is not None:
            if most < 1:
                raise Refused(f"{name} must be 1 or more, not {shown(most)}", param=name)
            return {"max_new_tokens": most}
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# The answer, whole


async def complete(chat: Chat, samples: Samples) -> JSONResponse:
    parts: list[list[dict]] = [[] for _ in chat.requests]
    ends: dict[int, Ended] = {}
    async with aclosing(samples) as pieces:
        async for sample, piece in pieces:
            if isinstance(piece, Ended):
                ends[sample] = piece
            elif isinstance(piece, Text):
                add_text(parts[sample], piece.text)
            else:
                parts[sample].append(await image_part(piece))
    choices = [
        {"index": i, "message": message(parts[i]), "logprobs": None, "finish_reason": ends[i].reason}
        for i in range(len(parts))
    ]
    kind = {"object": "chat.completion", "choices": choices, "usage": usage(chat, ends)}
    return JSONResponse(chat.common | kind)


def add_text(parts: list[dict], text: str) -> None:
    if parts and parts[-1]["type"] == "text":
        parts[-1]["text"] += text
    else:
        parts.append({"type": "text", "text": text})


def message(parts: Sequence[dict]) -> dict:
    """A message as OpenAI has it, and with images and their places among the text where there are any."""
    content = "".join(part["text"] for part in parts if part["type"] == "text")
    said = {"role": "assistant", "content": content, "refusal": None}
    images = [part for part in parts if part["type"] == "image_url"]
    numbers = itertools.count()
    places = [part if part["type"] == "text" else {"type": "image", "image": next(numbers)} for part in parts]
    return said | {"images": images, "parts": places} if images else said


def usage(chat: Chat, ends: dict[int, Ended]) -> dict[str, int]:
    """The prompt counts once, however many samples there are."""
    prompt, new = len(chat.requests[0].prompt), sum(end.n_tokens for end in ends.values())
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


# ---------------------------------------------------------------------------------------------------------------------
# The answer, streamed


async def chunks(chat: Chat, samples: Samples) -> AsyncIterator[dict | str]:
    """Yield chunks as OpenAI sends them: roles, deltas, the reason of each end, the usage where it is wanted."""
    for sample in range(len(chat.requests)):
        yield chunk(chat, sample, {"role": "assistant", "content": ""})
    ends: dict[int, Ended] = {}
    n_images = [0] * len(chat.requests)
    async with aclosing(samples) as pieces:
        async for sample, piece in pieces:
            if isinstance(piece, Ended):
                ends[sample] = piece
                yield chunk(chat, sample, {}, piece.reason)
            elif isinstance(piece, Text):
                yield chunk(chat, sample, {"content": piece.text})
            else:
                image = await image_part(piece)
                yield chunk(chat, sample, {"images": [image | {"index": n_images[sample]}]})
                n_images[sample] += 1
    if chat.usage_wanted:
        yield chat.common | {"object": "chat.completion.chunk", "choices": [], "usage": usage(chat, ends)}
    yield "[DONE]"


def chunk(chat: Chat, sample: int, delta: dict, reason: str | None = None) -> dict:
    choice = {"index": sample, "delta": delta, "logprobs": None, "finish_reason": reason}
    whole = chat.common | {"object": "chat.completion.chunk", "choices": [choice]}
    return whole | {"usage": None} if chat.usage_wanted else whole


async def chat_completions(request: HTTPRequest) -> Response:
    site: Site = request.app.state.site
    body = await json_body(request)
    streamed = field(body, "stream", bool, False)
    chat = await read_chat(body, site)
    samples = answers(open_streams(site, chat.requests), site.run.tokenizer, chat.stops)
    if streamed:
        return event_stream(chunks(chat, samples))
    return await unless_left(request, complete(chat, samples))
