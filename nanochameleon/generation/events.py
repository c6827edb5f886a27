"""What happens while a sample is made, as it is told to whoever listens: pieces of text, images that grow, the end.

    ids as they come -> Text("a re"), Text("d"), ImageStarted(), PartialImage(codes), Image(codes), End(ids)

No piece of text splits a UTF-8 character. Where ids come from is not its business (engine.py).
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanochameleon.documents import Image, Text
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab


@dataclass(frozen=True)
class ImageStarted:
    """The model has begun to draw."""


@dataclass(frozen=True)
class PartialImage:
    codes: tuple[int, ...]  # those drawn so far, raster order


@dataclass(frozen=True)
class End:
    ids: tuple[int, ...]  # all new ids, the stop id included


Event = Text | ImageStarted | PartialImage | Image | End


def open_image(ids: Sequence[int], vocab: Vocab) -> list[int] | None:
    """<boi> and the codes behind it where ids end inside an image, else None."""
    start = len(ids)
    while start and vocab.first_code <= ids[start - 1] < vocab.eoi:
        start -= 1
    return list(ids[start - 1 :]) if start and ids[start - 1] == vocab.boi else None


class Reader:
    """One sample's ids, in pieces -> its events. Every `preview` codes an unfinished image is told, too."""

    def __init__(self, prompt: Sequence[int], tokenizer: TextTokenizer, preview: int | None = None):
        self.tokenizer, self.vocab, self.preview = tokenizer, tokenizer.vocab, preview
        self.letters = codecs.getincrementaldecoder("utf-8")("replace")
        self.image = open_image(prompt, self.vocab)  # <boi> and codes
        self.new: list[int] = []
        self.begun = False

    def read(self, ids: Sequence[int], ended: bool) -> Iterator[Event]:
        """The next ids; `ended`: they are the last ones."""
        if not self.begun and self.image is not None:
            yield ImageStarted()
        self.begun = True
        for i, token in enumerate(ids):
            self.new.append(token)
            yield from self.read_one(token, ended and i == len(ids) - 1)
        if ended:
            if text := self.letters.decode(b"", final=True):
                yield Text(text)
            yield End(tuple(self.new))

    def read_one(self, token: int, last: bool) -> Iterator[Event]:
        is_text = self.vocab.is_text(token)
        text = self.letters.decode(self.tokenizer.decode_bytes([token]) if is_text else b"", final=not is_text)
        if text:
            yield Text(text)
        if token == self.vocab.boi and not last:  # as the last id it is a stop, and no image follows
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
