"""Conversations: what people and the model said, in JSON, as a document and as the tokens of a prompt.

    [{"role": "user", "segments": [{"text": "how many stars?"}, {"codes": [7, 3, ...]}]}, {"role": "assistant", ...}]

Images travel as codes, so an image that the model drew returns to it exactly. Special tokens come from roles and modes
alone: no text can spell one. A chat and an answer separate the turns by <eot>, as in alignment (section 3.1); to draw
and to continue, the turns are one document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochameleon.documents import Document, EndOfTurn, Image, Text, render
from nanochameleon.generation.prompts import Mode, caption_question
from nanochameleon.training.run import Run
from nanochameleon.web.bodies import field
from nanochameleon.web.refusals import Refused

USER, ASSISTANT = ROLES = ("user", "assistant")
AUTO_MODES = ("auto", "draw", "answer", "chat", "text", "free")
MAX_TURNS, MAX_SEGMENTS, MAX_TEXT = 256, 256, 100_000  # a conversation's turns, a turn's segments, characters in all


@dataclass(frozen=True)
class Turn:
    role: str  # user or assistant
    segments: tuple[Text | Image, ...]


def read_turns(row: dict, run: Run) -> list[Turn]:
    """Return the checked "turns" of a body."""
    turns = field(row, "turns", list)
    if not 1 <= len(turns) <= MAX_TURNS:
        raise Refused(f"turns must have 1 to {MAX_TURNS} turns, not {len(turns)}", param="turns")
    read = [read_turn(turn, f"turns[{number}]", run) for number, turn in enumerate(turns)]
    letters = sum(len(s.text) for turn in read for s in turn.segments if isinstance(s, Text))
    if letters > MAX_TEXT:
        raise Refused(f"the conversation has {letters:,} characters: at most {MAX_TEXT:,} are read", param="turns")
    return read


def read_turn(turn: object, place: str, run: Run) -> Turn:
    if not isinstance(turn, dict):
        raise Refused(f"{place} must be an object", param=place)
    role = field(turn, "role", str, place=f"{place}.")
    if role not in ROLES:
        raise Refused(f"{place}.role must be {' or '.join(ROLES)}", param=f"{place}.role")
    segments = field(turn, "segments", list, place=f"{place}.")
    if len(segments) > MAX_SEGMENTS:
        raise Refused(f"{place} has {len(segments)} segments: at most {MAX_SEGMENTS} are read", param=place)
    return Turn(role, tuple(read_segment(s, f"{place}.segments[{i}]", run) for i, s in enumerate(segments)))


def read_segment(segment: object, place: str, run: Run) -> Text | Image:
    if not isinstance(segment, dict) or ("text" in segment) == ("codes" in segment):
        raise Refused(f"{place} must be an object with either text or codes", param=place)
    if "text" in segment:
        return Text(field(segment, "text", str, place=f"{place}."))
    return Image(read_codes(segment["codes"], f"{place}.codes", run))


def read_codes(codes: object, place: str, run: Run) -> tuple[int, ...]:
    """Return the codes of one whole image."""
    n, n_codes = run.image_tokenizer.n_codes_per_image, run.cfg.vqgan.n_codes
    if not isinstance(codes, list) or len(codes) != n:
        raise Refused(f"{place} must be a list of {n} codes: an image has as many", param=place)
    if not all(type(code) is int and 0 <= code < n_codes for code in codes):
        raise Refused(f"{place} must hold whole numbers from 0 to {n_codes - 1}", param=place)
    return tuple(codes)


def resolve(mode: Mode | Literal["auto"], turns: Sequence[Turn], run: Run) -> tuple[Mode, Document]:
    """Decide what `auto` means, as sample.py does, and return the document before the answer.

    Raises Refused where the last turn is not the user's, or where a segment is missing.
    """
    if not turns or turns[-1].role != USER:
        raise Refused("the last turn must be the user's", param="turns")
    last = list(turns[-1].segments)
    has_image, words_last = any(isinstance(s, Image) for s in last), bool(last) and isinstance(last[-1], Text)
    caption = caption_question(run.cfg)
    if mode == "auto" and not last:
        raise Refused("the message is empty: write words to draw, or give an image and a question", param="turns")
    if mode == "auto" and run.cfg.train.assistant_only_loss:
        mode = "chat"
    if mode == "auto":
        mode = "draw" if not has_image else "answer" if words_last or caption else "text"
    if mode == "answer" and not words_last:
        if not (has_image and caption):
            raise Refused("the mode answer needs a question as its last words", param="mode")
        last.append(Text(caption))
    document: Document = []
    for turn in turns[:-1]:
        document += [*turn.segments, *[EndOfTurn()] * (mode in ("answer", "chat"))]
    return mode, document + last


def prompt_tokens(document: Document, run: Run, mode: Mode) -> list[int]:
    """<s> and the segments; then <boi> to draw, or the end of turn to get an answer or to chat."""
    tokens = render(document, run.tokenizer, run.vocab, end=False)
    return tokens + {"draw": [run.vocab.boi], "answer": [run.vocab.eot], "chat": [run.vocab.eot]}.get(mode, [])
