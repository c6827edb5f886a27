"""Streaming: tokens as they are sampled -> pieces of text, images that grow, the end.

    Text("a re"), Text("d"), ImageStarted(), PartialImage(codes), Image(codes), End(tokens)

No piece of text splits a UTF-8 character.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanochameleon.config import SamplingParams
from nanochameleon.documents import Image, Text
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.request import cfg_branches, make_request, open_image
from nanochameleon.generation.sampling import Modality
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.transformer import Chameleon


@dataclass(frozen=True)
class ImageStarted:
    """The model has begun an image."""


@dataclass(frozen=True)
class PartialImage:
    codes: tuple[int, ...]  # so far, in raster order


@dataclass(frozen=True)
class End:
    tokens: tuple[int, ...]  # all new tokens, stop token included


Event = Text | ImageStarted | PartialImage | Image | End


class Detokenizer:
    """Turns one sample's tokens, in pieces, into events. Every `preview` codes, yields the unfinished image."""

    def __init__(self, prompt: Sequence[int], tokenizer: TextTokenizer, preview: int | None = None):
        self.tokenizer, self.vocab, self.preview = tokenizer, tokenizer.vocab, preview
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # holds back the bytes of an unfinished character
        self.image = open_image(prompt, self.vocab)  # <boi> and image tokens, or None
        self.new: list[int] = []
        self.started = False

    def add(self, tokens: Sequence[int], finished: bool) -> Iterator[Event]:
        """Yield the events of the next tokens. finished: they are the last ones."""
        if not self.started and self.image is not None:
            yield ImageStarted()  # the prompt ends inside an image
        self.started = True
        for i, token in enumerate(tokens):
            self.new.append(token)
            yield from self.add_token(token, finished and i == len(tokens) - 1)
        if finished:
            if text := self.utf8.decode(b"", final=True):
                yield Text(text)
            yield End(tuple(self.new))

    def add_token(self, token: int, last: bool) -> Iterator[Event]:
        is_text = self.vocab.is_text(token)
        text = self.utf8.decode(self.tokenizer.decode_bytes([token]) if is_text else b"", final=not is_text)
        if text:
            yield Text(text)
        if token == self.vocab.boi and not last:  # as the last token it is a stop, and no image follows
            self.image = [token]
            yield ImageStarted()
        elif token == self.vocab.eoi:
            yield Image(self.codes())
            self.image = None
        elif self.image is not None:
            self.image.append(token)
            if self.preview and (len(self.image) - 1) % self.preview == 0:
                yield PartialImage(self.codes())

    def codes(self) -> tuple[int, ...]:
        return tuple(self.vocab.token_to_code(token) for token in self.image[1:])


def stream(
    model: Chameleon,
    prompt: Sequence[int],
    tokenizer: TextTokenizer,
    image_len: int,
    params: SamplingParams,
    modality: Modality = "both",
    seed: int = 0,
    row: int = 0,
    stops: Sequence[int] | None = None,
    preview: int | None = None,
) -> Iterator[Event]:
    """Yield the events of one sample as it is generated: the tokens are those of `generate` for prompt number `row`.

    preview: an unfinished image is yielded every so many codes. The model must be in eval mode. Raises UserError at
    the call, not at the first event, for a prompt that does not fit.
    """
    vocab = tokenizer.vocab
    request = make_request(prompt, vocab, image_len, model.cfg.max_seq_len, params, modality, (seed, row), stops)
    n_slots, context = len(cfg_branches(request, vocab)), len(prompt) + request.max_new_tokens
    engine = Engine(
        model, vocab, image_len, n_slots, context, max_steps_between_syncs=preview, steps_between_syncs=1
    )  # fmt: skip
    engine.add_request(request)
    detokenizer = Detokenizer(prompt, tokenizer, preview)
    return (event for output in engine.run() for event in detokenizer.add(output.tokens, output.finished))
