"""What a raw document is, the forms it takes, and how its images become codes.

    source.document(i)  ->  [Text, RawImage, ...]  -fuse->  [Text, Image, ...]  -render (documents.py)->  ids

Every draw is a pure function of (seed, index). The sources are shapes.py, alignment.py, emoji.py and folder.py.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nanochameleon.documents import Document, EndOfTurn, Image, Text
from nanochameleon.images.tokenizer import ImageTokenizer


@dataclass(frozen=True, eq=False)
class RawImage:
    """An image that is not tokenized yet."""

    pixels: np.ndarray  # uint8 (R, R, 3)


RawDocument = list[Text | RawImage | EndOfTurn]
# What the documents of a source look like, see below: pairs, questions and interleaved documents; text alone; captions
# that are followed by their image, never the other way round.
FORMS = ("pairs", "questions", "interleaved", "text", "drawings")


class Source(Protocol):
    """Where raw documents come from. `size` counts the items of a finite source and is None for an endless one.

    document(index) takes any index >= 0: a finite source shows item index % size, and draws everything else (which
    comes first, which question) from the index, so that the next time round the item looks different.
    """

    size: int | None

    def document(self, index: int) -> RawDocument: ...

    def captions(self, n: int) -> Iterable[str]:
        """n texts of the kind that its documents hold, for training a text tokenizer."""
        ...


# ---------------------------------------------------------------------------------------------------------------------
# The forms a document takes


def pair(caption: str, pixels: np.ndarray, rng: np.random.Generator) -> RawDocument:
    """An image and its caption, either one first, half and half (paper section 2.2: 50% each)."""
    image, text = RawImage(pixels), Text(caption)
    return [image, text] if rng.random() < 0.5 else [text, image]


def captioned(form: str, caption: str, pixels: np.ndarray, rng: np.random.Generator) -> RawDocument:
    """One captioned image in the form "pairs", "drawings" or "text"."""
    if form == "pairs":
        return pair(caption, pixels, rng)
    return {"drawings": [Text(caption), RawImage(pixels)], "text": [Text(caption)]}[form]


def question_answer(pixels: np.ndarray, qas: Sequence[tuple[str, str]]) -> RawDocument:
    """Image, question, end of turn, answer; before each further question another end of turn."""
    doc: RawDocument = [RawImage(pixels)]
    for number, (question, answer) in enumerate(qas):
        doc += [EndOfTurn()] if number else []
        doc += [Text(question), EndOfTurn(), Text(answer)]
    return doc


def interleaved(pairs: Sequence[tuple[str, np.ndarray]]) -> RawDocument:
    """Text, image, text, image: each text is the caption of the image after it."""
    return [segment for caption, pixels in pairs for segment in (Text(caption), RawImage(pixels))]


def fuse(
    docs: Sequence[RawDocument], image_tokenizer: ImageTokenizer, known: dict[bytes, Image] | None = None
) -> list[Document]:
    """Raw documents -> documents with codes in place of pixels; all their images, of one size, go in one batch.

    `known` holds codes by a digest of the pixels and grows: with it a finite source's images are encoded only once.
    """
    known = {} if known is None else known
    pixels = {digest(s.pixels): s.pixels for doc in docs for s in doc if isinstance(s, RawImage)}
    new = [key for key in pixels if key not in known]
    if new:
        codes = image_tokenizer.encode(np.stack([pixels[key] for key in new]))
        known |= {key: Image(tuple(row)) for key, row in zip(new, codes.tolist(), strict=True)}
    return [[known[digest(s.pixels)] if isinstance(s, RawImage) else s for s in doc] for doc in docs]


def digest(pixels: np.ndarray) -> bytes:
    """16 bytes that tell one image from another."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
