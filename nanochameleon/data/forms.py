"""Raw documents: text and pixels in any order, the forms they take, and how their images become codes.

    source.document(i) -> [Text, RawImage, ...]  --fuse-->  [Text, Image, ...]  --render (documents.py)-->  tokens

Every draw is a pure function of (seed, index). The sources are in sources/.
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
# What a source's documents look like, see below. "text": captions alone. "drawings": a caption, then its image.
FORMS = ("pairs", "questions", "interleaved", "text", "drawings")


class Source(Protocol):
    """Where raw documents come from. `size` is the number of items of a finite source, None for an endless one.

    document(index) takes any index >= 0. A finite source shows item index % size, and draws everything else (which
    comes first, which question) from the index, so that the item looks different in every epoch.
    """

    size: int | None

    def document(self, index: int) -> RawDocument: ...

    def captions(self, n: int) -> Iterable[str]:
        """n texts as its documents hold them, for training a text tokenizer."""
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
    """Image, question, end of turn, answer; an end of turn also precedes each further question."""
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
    """Encode the images of raw documents: codes take the place of pixels. All images, of one size, go in one batch.

    `known` is a cache, codes by a digest of the pixels, and grows: a finite source's images are encoded only once.
    """
    known = {} if known is None else known
    digests = {id(s): digest(s.pixels) for doc in docs for s in doc if isinstance(s, RawImage)}
    pixels = {digests[id(s)]: s.pixels for doc in docs for s in doc if isinstance(s, RawImage)}
    new = [key for key in pixels if key not in known]
    if new:
        codes = image_tokenizer.encode(np.stack([pixels[key] for key in new]))
        known |= {key: Image(tuple(row)) for key, row in zip(new, codes.tolist(), strict=True)}
    return [[known[digests[id(s)]] if isinstance(s, RawImage) else s for s in doc] for doc in docs]


def digest(pixels: np.ndarray) -> bytes:
    """16 bytes that tell one image from another."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
