"""Documents that are too long: what of them fits in `max_tokens`. No image is ever cut.

A text becomes several documents, none of it lost. The caption of an image loses its end, a conversation its last turns,
any other document what comes after the first image that does not fit.
"""

from nanochameleon.documents import Document, EndOfTurn, Image, Text, render_segment
from nanochameleon.text_tokenizer import TextTokenizer

CHARACTERS = 64  # of a text that are encoded for each token that it may have


def fit(doc: Document, form: str, max_tokens: int, text: TextTokenizer) -> tuple[list[list[int]], bool]:
    """Render a document as documents of at most max_tokens tokens. Also returns whether something was left out."""
    vocab, room = text.vocab, max_tokens - 2  # <s> and </s>
    if form == "text":
        tokens = text.encode(doc[0].text)
        return [[vocab.bos, *tokens[i : i + room], vocab.eos] for i in range(0, len(tokens), room)], False
    # a text far beyond the limit is clipped before it is encoded
    clipped = [Text(s.text[: CHARACTERS * max_tokens]) if isinstance(s, Text) else s for s in doc]
    parts = [render_segment(s, text, vocab) for s in clipped]
    if sum(map(len, parts)) <= room:
        return [[vocab.bos, *(token for part in parts for token in part), vocab.eos]], clipped != doc
    if form == "chat":
        kept = whole_turns(doc, parts, room)
    else:
        kept = shortened(doc, parts, room, captioned=form in ("pairs", "drawings"))
    return [[vocab.bos, *kept, vocab.eos]] if kept else [], bool(kept)


def whole_turns(doc: Document, parts: list[list[int]], room: int) -> list[int]:
    """The first pairs of prompt and answer, as many as fit."""
    kept, tokens, turns = [], [], 0
    for segment, part in zip([*doc, EndOfTurn()], [*parts, []], strict=True):
        if isinstance(segment, EndOfTurn):
            turns += 1
            if turns % 2 == 0 and len(tokens) <= room:
                kept = list(tokens)
        tokens += part
    return kept


def shortened(doc: Document, parts: list[list[int]], room: int, captioned: bool) -> list[int]:
    """Everything before the first image that does not fit, the last text shortened; a caption leaves room for it."""
    tokens: list[int] = []
    reserved = sum(len(part) for s, part in zip(doc, parts, strict=True) if isinstance(s, Image)) if captioned else 0
    for segment, part in zip(doc, parts, strict=True):
        if isinstance(segment, Image):
            if len(tokens) + len(part) > room:
                break
            reserved = 0 if captioned else reserved
            tokens += part
        else:
            tokens += part[: max(0, room - reserved - len(tokens))]
    return tokens
