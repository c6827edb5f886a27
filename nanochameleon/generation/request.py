"""A request: one sample to generate, checked before any work is done, and the slots that it holds while it runs.

prompt tokens, SamplingParams, modality, seed -> Request, and what each guidance branch reads of its prompt
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochameleon.config import SamplingParams
from nanochameleon.errors import UserError
from nanochameleon.generation.sampling import COND, IMAGE_COND, UNCOND, Modality, check_stops
from nanochameleon.vocab import Vocab


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]  # tokens, <s> first
    params: SamplingParams
    modality: Modality
    seed: tuple[int, ...]
    stops: tuple[int, ...] | None  # None: </s> alone
    image_tokens_left: int  # tokens that the image left open by the prompt lacks; -1 without one
    max_new_tokens: int  # params.max_new_tokens, or fewer where the context ends first


@dataclass(eq=False)
class Slot:
    """One row of the batch, taken by one guidance branch of a request."""

    index: int
    cfg_branch: int
    prompt: tuple[int, ...]
    prefilled: bool = False


@dataclass(eq=False)
class RunningRequest:
    """A request that holds slots: one, or up to three with guidance. The first is COND."""

    request_id: int
    request: Request
    slots: list[Slot]
    image_tokens_left: int  # as in Grammar, at the last sync
    n_new: int = 0  # tokens sampled, at the last sync
    prefilled: bool = False


@dataclass(frozen=True)
class RequestOutput:
    """The tokens that one request got since the last sync."""

    request_id: int
    tokens: tuple[int, ...]
    finished: bool


def open_image(tokens: Sequence[int], vocab: Vocab) -> list[int] | None:
    """<boi> and the image tokens after it if `tokens` end inside an image, else None."""
    start = len(tokens)
    while start and vocab.first_code <= tokens[start - 1] < vocab.eoi:
        start -= 1
    return list(tokens[start - 1 :]) if start and tokens[start - 1] == vocab.boi else None


def make_request(
    prompt: Sequence[int], vocab: Vocab, image_len: int, context: int, params: SamplingParams,
    modality: Modality = "both", seed: Sequence[int] = (0,), stops: Sequence[int] | None = None,
) -> Request:  # fmt: skip
    """Raises UserError, naming the lengths, for a prompt that does not fit; ValueError for wrong modality or stops."""
    if not prompt or prompt[0] != vocab.bos:
        raise ValueError("a prompt starts with <s>")
    if wrong := [token for token in prompt if not 0 <= token < vocab.size]:
        raise ValueError(f"the prompt has token {wrong[0]}, and the vocabulary has {vocab.size}")
    check_stops(modality, stops, vocab)
    image = open_image(prompt, vocab)
    left = -1 if image is None else image_len + 1 - len(image)
    if image is not None and left < 0:
        too_many = f"{len(image) - 1} tokens, and an image has {image_len}"
        raise UserError(f"the image that the prompt leaves open has {too_many}: end it with <eoi>, or shorten it")
    # The least that must fit: the rest of the open image and <eoi>, a whole image, or one token.
    need = left + 1 if image is not None else image_len + 2 if modality == "image" else 1
    what = "one new token" if need == 1 else f"the {need} tokens of an image"
    if len(prompt) + need > context:
        full = f"the prompt has {len(prompt)} tokens, which leaves no room for {what} in a context of {context}"
        raise UserError(f"{full}: shorten it")
    if params.max_new_tokens < need:
        raise UserError(f"max_new_tokens is {params.max_new_tokens}, which leaves no room for {what}")
    max_new_tokens = min(params.max_new_tokens, context - len(prompt))
    stops = None if stops is None else tuple(stops)
    return Request(tuple(prompt), params, modality, tuple(seed), stops, left, max_new_tokens)


def cfg_branches(request: Request, vocab: Vocab) -> dict[int, tuple[int, ...]]:
    """The branches that guidance needs, COND first: each with its prompt. Branches that change nothing are left out.

    With by_text and by_image the two scales, guidance is the sum (see sampling.py)

        (1 - by_image) * uncond + (by_image - by_text) * image_cond + by_text * cond,

    so a branch whose factor is 0 need not run. Without earlier images, image_cond has the same prompt as uncond.
    """
    by_text, by_image = request.params.guidance_scale, request.params.image_guidance_scale
    branches = {COND: request.prompt}
    if request.modality == "text" and request.image_tokens_left < 0:  # no image token will come
        return branches
    unconditional = (vocab.bos, *(open_image(request.prompt, vocab) or ()))
    images = tuple(t for t in request.prompt if t == vocab.bos or vocab.first_code <= t <= vocab.boi)
    # In modality "both", images that are still to come tell image_cond from uncond.
    if by_text == by_image or (request.modality != "both" and images == unconditional):
        return branches | ({UNCOND: unconditional} if by_text != 1 else {})
    return branches | {IMAGE_COND: images} | ({UNCOND: unconditional} if by_image != 1 else {})
