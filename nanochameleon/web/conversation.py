"""Conversations: what people and the model said, in JSON, as a document and as the tokens of a prompt.

    [{"role": "user", "segments": [{"text": "how many stars?"}, {"codes": [7, 3, ...]}]}, {"role": "assistant", ...}]

Images travel as codes, so an image that the model drew returns to it exactly. Special tokens come from roles and modes
alone: no text can spell one. What the model reads of a conversation depends on the mode:

    draw          the last message
    answer        the last image and all that was said after it
    chat          every turn, each ended by <eot>, as in alignment (section 3.1)
    text, free    every turn, as one document that the model continues
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochameleon.documents import Document, EndOfTurn, Image, Text, render
from nanochameleon.errors import shown
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


def read_mode(row: dict, place: str = "") -> str | None:
    """Return the checked "mode" of an object. None: it is left out."""
    mode = field(row, "mode", str, None, place)
    if mode not in (None, *AUTO_MODES):
        raise Refused(f"{place}mode must be {', '.join(AUTO_MODES)}, not {shown(mode)}", param=f"{place}mode")
    return mode


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
    """Decide what `auto` means, and return the document before the answer.

    As in sample.py, and over several turns: words that end with "?" are a question about an earlier image. Raises
    Refused where the last turn is not the user's, or where a segment is missing.
    """
    if not turns or turns[-1].role != USER:
        raise Refused("the last turn must be the user's", param="turns")
    if mode == "auto":
        mode = chosen_mode(turns, run)
    if mode == "answer":
        return mode, question(turns, caption_question(run.cfg))
    if mode == "draw":
        return mode, list(turns[-1].segments)
    document: Document = []
    for turn in turns[:-1]:
        document += [*turn.segments, *[EndOfTurn()] * (mode == "chat")]
    return mode, document + list(turns[-1].segments)


def chosen_mode(turns: Sequence[Turn], run: Run) -> Mode:
    last = turns[-1].segments
    if not last:
        raise Refused("the message is empty: write words to draw, or give an image and a question", param="turns")
    if run.cfg.train.assistant_only_loss:
        return "chat"
    words_last = isinstance(last[-1], Text)
    if has_image(last):
        return "answer" if words_last or caption_question(run.cfg) else "text"
    asks = words_last and last[-1].text.rstrip().endswith("?") and any(has_image(turn.segments) for turn in turns)
    return "answer" if asks else "draw"


def has_image(segments: Sequence[Text | Image]) -> bool:
    return any(isinstance(segment, Image) for segment in segments)


def question(turns: Sequence[Turn], caption: str | None) -> Document:
    """The last image and all that was said after it; where the last turn has an image, or none has, that turn alone.

    caption: the question to add after an image without words.
    """
    last = list(turns[-1].segments)
    if not (last and isinstance(last[-1], Text)):
        if not (has_image(last) and caption):
            raise Refused("the mode answer needs a question as its last words", param="mode")
        last.append(Text(caption))
    seen = [number for number, turn in enumerate(turns[:-1]) if has_image(turn.segments)]
    if has_image(last) or not seen:
        return last
    first, *later = turns[seen[-1] : -1]
    start = max(i for i, segment in enumerate(first.segments) if isinstance(segment, Image))
    # An image that the model drew begins the next question, as images do in training; after words the turn ends.
    document: Document = [*first.segments[start:], *[EndOfTurn()] * (start + 1 < len(first.segments))]
    for turn in later:
        document += [*turn.segments, EndOfTurn()]
    return document + last


def prompt_tokens(document: Document, run: Run, mode: Mode) -> list[int]:
    """<s> and the segments; then <boi> to draw, or the end of turn to get an answer or to chat."""
    tokens = render(document, run.tokenizer, run.vocab, end=False)
    return tokens + {"draw": [run.vocab.boi], "answer": [run.vocab.eot], "chat": [run.vocab.eot]}.get(mode, [])
