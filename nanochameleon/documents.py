"""Documents: text and images in any order, as a list of segments, and as tokens of one vocabulary.

    [Text("a red circle"), Image((7, 7, 3, 9))]   <->   <s> a _red _circle <boi> 7 7 3 9 <eoi> </s>

Special tokens come from segments alone, so no text can spell one. Packing into sequences is packing.py.
"""

from dataclasses import dataclass

import numpy as np

from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Image:
    codes: tuple[int, ...]  # raster order, each in [0, n_codes)


@dataclass(frozen=True)
class EndOfTurn:
    """The separator between a prompt and its answer."""


Segment = Text | Image | EndOfTurn
Document = list[Segment]


def render_segment(segment: Segment, tokenizer: TextTokenizer, vocab: Vocab) -> list[int]:
    """One segment -> tokens, without <s> and </s>."""
    if isinstance(segment, Text):
        return tokenizer.encode(segment.text)
    if isinstance(segment, Image):
        return [vocab.boi, *vocab.code_to_token(np.array(segment.codes)).tolist(), vocab.eoi]
    return [vocab.eot]


def render(doc: Document, tokenizer: TextTokenizer, vocab: Vocab, end: bool = True) -> list[int]:
    """Document -> <s>, the tokens of its segments, and </s> if `end` (a prompt to be continued has none)."""
    tokens = [vocab.bos]
    for segment in doc:
        tokens += render_segment(segment, tokenizer, vocab)
    return tokens + [vocab.eos] * end


def parse(tokens: list[int], tokenizer: TextTokenizer, vocab: Vocab) -> Document:
    """Inverse of render, except that neighbouring texts are joined and empty ones dropped.

    Stops at </s>; skips <s> and <pad>. Raises ValueError for what render never makes: a code outside an image, an image
    inside an image or without an end.
    """
    doc: Document = []
    text: list[int] = []  # text tokens that are not in `doc` yet: one letter may span several
    codes: list[int] | None = None  # of the image being read; None outside an image

    def close_text():
        if text:
            doc.append(Text(tokenizer.decode(text)))
            text.clear()

    for position, token in enumerate(tokens):
        if codes is not None:  # inside an image: only codes, until its end
            if token == vocab.eoi:
                doc.append(Image(tuple(codes)))
                codes = None
            else:
                codes.append(vocab.token_to_code(token))  # raises for any other token
        elif token == vocab.eos:
            break  # what follows </s> belongs to no document
        elif token == vocab.boi:
            close_text()
            codes = []
        elif token == vocab.eot:
            close_text()
            doc.append(EndOfTurn())
        elif vocab.modality(token) == "text":
            text.append(token)
        elif token not in (vocab.bos, vocab.pad):
            raise ValueError(f"token {token} at position {position} is only valid inside an image")
    if codes is not None:
        raise ValueError("the last image has no end")
    close_text()
    return doc
