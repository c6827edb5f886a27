"""The sequence as the model sees it: every token of a conversation, its probability and the likeliest alternatives.

    POST /api/tokens            {"turns", "mode", "stop": "</s>"}
        -> {"mode": "chat", "left_out": 0, "context": 512, "counts": {"text": 9, "image": 64, "special": 4},
            "tokens": [{"id": 300, "probability": 0.91, "rank": 1, "alternatives": [[301, 0.02], ... 5]},
                       {"id": 7, ..., "image": [0, 5, 2]}, ...],
            "pieces": {"300": {"kind": "text", "text": " re"}, "41": {"kind": "text", "bytes": "c3"},
                       "7": {"kind": "image", "code": 3}, "0": {"kind": "special", "name": "<s>"}, ...},
            "characters": [{"first": 4, "last": 5, "text": "é"}, ...]}
    POST /api/tokens/patches    {"codes", "place", "alternatives"} -> {"urls"}: patches with another code in that place

A user's last turn gives the prompt; an assistant's last turn is added, with the stop token that /api/generate named, if
it named one.
An answer's text is split into tokens again, as for the next turn: a model may have sampled it in other pieces.
left_out: texts and images that the mode does not read. image: which image, row, column. pieces: of every token and
alternative. characters: letters that span several tokens.

Probabilities are those of the model itself: given all tokens before, at temperature 1, over the whole vocabulary,
without guidance, filters or grammar. The first token has none. A sequence longer than the context has none at all:
the page then shows which part is too long.
"""

import codecs
import math
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import anyio
import torch
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from torch import Tensor

from nanochameleon.documents import EndOfTurn, render
from nanochameleon.errors import shown
from nanochameleon.generation.prompts import Mode
from nanochameleon.images.tokenizer import NO_DECODER, to_images
from nanochameleon.kernels import use_kernels
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.run import Run
from nanochameleon.vocab import Vocab
from nanochameleon.web.bodies import field, json_body
from nanochameleon.web.conversation import (
    USER,
    Turn,
    prompt_tokens,
    read_codes,
    read_mode,
    read_turns,
    resolve,
)
from nanochameleon.web.images import png_url
from nanochameleon.web.refusals import Refused
from nanochameleon.web.talk import check_fields, special_name

FIELDS = ("turns", "mode", "stop")
N_ALTERNATIVES = 5
MAX_CONTEXTS = 2  # a sequence of more contexts is refused
CHUNK = 2**24  # logits at a time, 64 MB: all of a long context would be a gigabyte
WINDOW = 7  # side, in codes, of the part of an image that is decoded for one patch

# ---------------------------------------------------------------------------------------------------------------------
# The sequence


class Sequence(NamedTuple):
    mode: Mode  # what `auto` means
    tokens: list[int]
    left_out: int  # texts and images of earlier turns that this mode does not read


def sequence(turns: list[Turn], mode: str, run: Run, stop: int | None = None) -> Sequence:
    """Return the whole conversation as tokens, as the model reads and wrote them. stop: the last one it wrote."""
    asked = turns if turns[-1].role == USER else turns[:-1]
    mode, document = resolve(mode, asked, run)
    read = {id(segment) for segment in document}  # the same words may be said twice
    left_out = sum(id(segment) not in read for turn in asked for segment in turn.segments)
    if asked is turns:
        return Sequence(mode, prompt_tokens(document, run, mode), left_out)
    document += [*[EndOfTurn()] * (mode in ("answer", "chat")), *turns[-1].segments]
    tokens = render(document, run.tokenizer, run.vocab, end=False)
    return Sequence(mode, tokens + [stop] * (stop is not None), left_out)


def image_places(tokens: list[int], run: Run) -> dict[int, tuple[int, int, int]]:
    """Position of each image token in the sequence -> which image, row, column."""
    side, places, number, start = math.isqrt(run.image_tokenizer.n_codes_per_image), {}, -1, 0
    for i, token in enumerate(tokens):
        if token == run.vocab.boi:
            number, start = number + 1, i + 1
        elif run.vocab.is_image(token):
            places[i] = (number, *divmod(i - start, side))
    return places


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def piece(token: int, tokenizer: TextTokenizer) -> dict:
    """Describe a token alone. Bytes that are no whole characters are in hexadecimal."""
    vocab = tokenizer.vocab
    kind = vocab.modality(token)
    if kind == "image":
        return {"kind": kind, "code": vocab.token_to_code(token)}
    if kind == "special":
        return {"kind": kind, "name": special_name(token, vocab)}
    data = tokenizer.decode_bytes([token])
    try:
        return {"kind": kind, "text": data.decode()}
    except UnicodeDecodeError:
        return {"kind": kind, "bytes": data.hex(" ")}


def split_characters(tokens: list[int], tokenizer: TextTokenizer) -> list[dict]:
    """Find the runs of text tokens whose bytes are whole characters only together."""
    found: list[dict] = []
    utf8, first, text = codecs.getincrementaldecoder("utf-8")(), 0, ""
    for i, token in enumerate(tokens):
        data = tokenizer.decode_bytes([token]) if tokenizer.vocab.is_text(token) else b""
        if not (data and utf8.getstate()[0]):
            utf8.reset()
            first, text = i, ""
        try:
            text += utf8.decode(data)
        except UnicodeDecodeError:  # bytes that no token completes; this one may begin a character
            utf8.reset()
            first, text = i, ""
            try:
                text = utf8.decode(data)
            except UnicodeDecodeError:
                utf8.reset()
        if first < i and not utf8.getstate()[0]:
            found.append({"first": first, "last": i, "text": text})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities


class Scores(NamedTuple):
    """Scores of T - 1 tokens: all but the first."""

    probability: Tensor  # (T - 1,)
    rank: Tensor  # (T - 1,); 1 is the likeliest token
    alternatives: Tensor  # (T - 1, 5), the likeliest other tokens
    alternative_probability: Tensor  # (T - 1, 5)


@torch.inference_mode()
def score(run: Run, tokens: list[int], chunk: int = CHUNK) -> Scores:
    """One forward pass over the sequence, and the softmax of `chunk` logits at a time."""
    read = torch.tensor(tokens, device=run.device)
    with use_kernels("reference"):  # torch's own: the faster ones compile for seconds, and all clients would wait
        hidden = run.model(read[None])[0, :-1]  # (T - 1, D)
        positions = max(1, chunk // run.vocab.size)
        parts = zip(hidden.split(positions), read[1:].split(positions), strict=True)
        scores = [score_part(run.model.logits(h), targets) for h, targets in parts]
    return Scores(*(torch.cat(each).cpu() for each in zip(*scores, strict=True)))


def score_part(logits: Tensor, targets: Tensor) -> Scores:
    """Scores of n tokens from their logits (n, V)."""
    log_probs = logits.float().log_softmax(-1)
    own = log_probs.gather(1, targets[:, None])  # (n, 1)
    rank = 1 + (log_probs > own).sum(1)
    best = log_probs.scatter(1, targets[:, None], -torch.inf).topk(N_ALTERNATIVES)
    return Scores(own[:, 0].exp(), rank, best.indices, best.values.exp())


# ---------------------------------------------------------------------------------------------------------------------
# Patches


@torch.inference_mode()
def decode_patches(run: Run, codes: list[int], place: int, alternatives: list[int]) -> Tensor:
    """Patches uint8 (n, side, side, 3): each alternative decoded in its place, among the image's own codes.

    A code alone, on a field of its like, looks nothing like it does in the image (42 of 255 levels off for models/toy).
    The whole image with that one code exchanged is exact, but costs a decode for each alternative: seconds on a CPU at
    512 pixels. Convolutions see little further than a window of 7 x 7 codes (1 level off), which is 1/21 of the
    release's image, so five alternatives cost a quarter of a decode. Only those that somebody looks at are decoded.
    """
    grid = math.isqrt(len(codes))
    side, (row, column) = min(WINDOW, grid), divmod(place, grid)
    top, left = (min(max(at - side // 2, 0), grid - side) for at in (row, column))
    window = torch.tensor(codes).view(grid, grid)[top : top + side, left : left + side]
    windows = window.repeat(len(alternatives), 1, 1)  # (n, side, side)
    windows[:, row - top, column - left] = torch.tensor(alternatives)
    vqgan = run.image_tokenizer.vqgan
    images = to_images(vqgan.pixels(vqgan.quantize.lookup(windows.flatten(1).to(run.image_tokenizer.device), side)))
    size = run.cfg.vqgan.resolution // grid  # of a patch, in pixels
    y, x = (row - top) * size, (column - left) * size
    return images[:, y : y + size, x : x + size]


# ---------------------------------------------------------------------------------------------------------------------
# Routes


def read_stop(row: dict, vocab: Vocab) -> int | None:
    """Return the stop token that a body names."""
    stops, name = {special_name(token, vocab): token for token in (vocab.eos, vocab.eot)}, field(row, "stop", str, None)
    if name not in (None, *stops):
        raise Refused(f"stop must be {' or '.join(stops)}, not {shown(name)}", param="stop")
    return stops.get(name)


def read_body(row: dict, run: Run) -> Sequence:
    """Return the sequence that a body asks for. Raises Refused for one that is much too long."""
    check_fields(row, FIELDS)
    found = sequence(read_turns(row, run), read_mode(row) or "auto", run, read_stop(row, run.vocab))
    n, context = len(found.tokens), run.cfg.model.max_seq_len
    if n > MAX_CONTEXTS * context:
        most = f"at most {MAX_CONTEXTS * context:,} are shown, and the model reads {context:,}"
        raise Refused(f"the conversation has {n:,} tokens: {most}", param="turns", code="too_long")
    return found


def answer(run: Run, found: Sequence, scores: Scores | None) -> dict:
    rows = [{"id": token, "probability": None, "rank": None, "alternatives": []} for token in found.tokens]
    if scores is not None:
        for row, own, rank, others, theirs in zip(rows[1:], *(each.tolist() for each in scores), strict=True):
            row |= {"probability": short(own), "rank": rank}
            row["alternatives"] = [[other, short(p)] for other, p in zip(others, theirs, strict=True)]
    for i, place in image_places(found.tokens, run).items():
        rows[i]["image"] = place
    kinds = [run.vocab.modality(token) for token in found.tokens]
    return {
        "mode": found.mode,
        "left_out": found.left_out,
        "context": run.cfg.model.max_seq_len,
        "counts": {kind: kinds.count(kind) for kind in ("text", "image", "special")},
        "tokens": rows,
        "pieces": {str(token): piece(token, run.tokenizer) for token in mentioned(rows)},
        "characters": split_characters(found.tokens, run.tokenizer),
    }


def mentioned(rows: Iterable[dict]) -> list[int]:
    """Every token of the sequence and of the alternatives, once."""
    return sorted(set(chain.from_iterable((row["id"], *(other for other, _ in row["alternatives"])) for row in rows)))


def short(probability: float) -> float:
    """6 digits: a long context has 24,000 probabilities."""
    return float(f"{probability:.6g}")


async def tokens(request: Request) -> JSONResponse:
    site, row = request.app.state.site, await json_body(request)
    found = await anyio.to_thread.run_sync(read_body, row, site.run)  # a long text takes a while
    readable = 1 < len(found.tokens) <= site.run.cfg.model.max_seq_len
    scores = await site.worker.call(lambda run: score(run, found.tokens)) if readable else None
    return await anyio.to_thread.run_sync(lambda: JSONResponse(answer(site.run, found, scores)))


async def patches(request: Request) -> JSONResponse:
    site, row = request.app.state.site, await json_body(request)
    check_fields(row, ("codes", "place", "alternatives"))
    if not site.run.image_tokenizer.can_draw:
        raise Refused(NO_DECODER, code="no_decoder")
    codes, place = read_codes(field(row, "codes", list), "codes", site.run), field(row, "place", int)
    others, n_codes = field(row, "alternatives", list), site.run.cfg.vqgan.n_codes
    if not 0 <= place < len(codes):
        raise Refused(f"place must be from 0 to {len(codes) - 1}", param="place")
    if not 1 <= len(others) <= 1 + N_ALTERNATIVES or not all(type(c) is int and 0 <= c < n_codes for c in others):
        raise Refused(f"alternatives must be 1 to {1 + N_ALTERNATIVES} codes below {n_codes}", param="alternatives")
    images = await site.worker.call(lambda run: decode_patches(run, codes, place, others))
    return JSONResponse({"urls": [png_url(pixels) for pixels in images]})


ROUTES = [
    Route("/api/tokens", tokens, methods=["POST"]),
    Route("/api/tokens/patches", patches, methods=["POST"]),
]
