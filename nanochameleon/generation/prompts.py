"""Prompts: words and image files in any order -> segments -> tokens, and what each mode of sample.py means."""

import os
from collections.abc import Sequence
from typing import Literal

from nanochameleon.config import RunConfig
from nanochameleon.data import RawDocument, RawImage, fuse
from nanochameleon.data.sources.emoji import WHAT
from nanochameleon.data.sources.questions import ASK_CAPTION
from nanochameleon.documents import Text, render
from nanochameleon.errors import UserError
from nanochameleon.generation.sampling import Modality
from nanochameleon.images.tokenizer import load_square
from nanochameleon.training.run import Run
from nanochameleon.vocab import Vocab

Mode = Literal["draw", "answer", "chat", "text", "free"]  # what the user asks for
MODALITY: dict[Mode, Modality] = {  # what the model may then generate
    "draw": "image",
    "answer": "text",  # after the end of the user's turn
    "chat": "both",  # after the end of the user's turn
    "text": "text",
    "free": "both",
}
IMAGE_ENDINGS = (  # also of formats that cannot be read: such a word is a mistake, not words to draw
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".jxl", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif", ".avif", ".ico", ".svg", ".tga", ".psd", ".dng", ".cr2", ".nef",
)  # fmt: skip


def prompt_tokens(segments: RawDocument, run: Run, mode: Mode = "text") -> list[int]:
    """<s> and the segments, as in training; then <boi> to draw, or the end of turn to get an answer or to chat.

    segments: Text, data.RawImage (uint8 (R, R, 3)) and EndOfTurn in any order.
    """
    tokens = render(fuse([segments], run.image_tokenizer)[0], run.tokenizer, run.vocab, end=False)
    return tokens + {"draw": [run.vocab.boi], "answer": [run.vocab.eot], "chat": [run.vocab.eot]}.get(mode, [])


def stop_tokens(mode: Mode, vocab: Vocab) -> tuple[int, ...]:
    """Return the tokens that end a sample of this mode: the end of the document, or also of the model's turn."""
    return (vocab.eos, vocab.eot) if mode in ("answer", "chat") else (vocab.eos,)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments of a command line


def is_image(argument: str) -> bool:
    path = os.path.expanduser(argument)
    return os.path.isfile(path) or path.lower().endswith(IMAGE_ENDINGS)


def image_path(argument: str) -> str | None:
    """The image file that an argument names, None for words. Raises UserError for a folder, a pipe or a device."""
    path = os.path.expanduser(argument)
    if is_image(argument):
        return path
    if os.path.lexists(path):
        why = f"{argument} exists and is not an image file, but a folder, a pipe or the like"
        raise UserError(f"{why}: give an image file, or ' {argument}' with a space where the word is meant")
    return None


def read_segments(arguments: Sequence[str], resolution: int, fit: Literal["crop", "pad"]) -> RawDocument:
    """Read arguments as Text and RawImage segments. Raises UserError for an image that cannot be read."""
    segments: RawDocument = []
    for argument in arguments:
        if path := image_path(argument):
            segments.append(RawImage(load_square(path, resolution, fit)))
        elif any("\ud800" <= letter <= "\udfff" for letter in argument):  # how Python shows bytes that are not UTF-8
            raise UserError(f"the prompt {argument!a} is not valid UTF-8")
        elif argument.strip():
            segments.append(Text(argument.strip()))
    return segments


def caption_question(cfg: RunConfig) -> str | None:
    """The question that a run learnt to answer with a caption; None for a folder's run, where captions just follow."""
    return {"shapes": ASK_CAPTION, "shapes_rich": ASK_CAPTION, "emoji": WHAT}.get(cfg.data.source)


def resolve_mode(mode: Mode | Literal["auto"], segments: RawDocument, cfg: RunConfig) -> tuple[Mode, RawDocument]:
    """Decide what `auto` means for these segments, and add the caption's question where none is asked.

    Raises UserError where a segment is missing.
    """
    words_last = bool(segments) and isinstance(segments[-1], Text)
    has_image = any(isinstance(segment, RawImage) for segment in segments)
    if mode == "auto" and not segments:
        raise UserError("the prompt is empty: give words to draw, or an image and a question")
    if mode == "auto" and cfg.train.assistant_only_loss:
        mode = "chat"
    if mode == "auto":
        mode = "draw" if not has_image else "answer" if words_last or caption_question(cfg) else "text"
    if mode == "answer" and not words_last:
        if not (has_image and caption_question(cfg)):
            raise UserError("--mode answer needs a question as its last words")
        segments = [*segments, Text(caption_question(cfg))]
    return mode, segments
