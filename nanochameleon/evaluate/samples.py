"""Samples to look at: images drawn for captions of the test split, on one sheet."""

import math
from collections.abc import Container, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanochameleon.config import RunConfig
from nanochameleon.documents import Text
from nanochameleon.evaluate.held_out import captioned, captioned_images
from nanochameleon.evaluate.shapes import draw_images, has_room
from nanochameleon.files import write_file
from nanochameleon.generation.prompts import prompt_tokens
from nanochameleon.images.terminal import enlarge, png
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.training.modes import sampling_mode
from nanochameleon.training.run import Run

GRID = 14  # images of the sheet that training writes now and then
SHEET = 28  # images of samples.png
RECONSTRUCTIONS = 12  # images of the sheet that shows the image tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def drawable(run: Run, captions: list[str]) -> list[str]:
    """Return the captions that leave room for their image in the context. Training skips the others, too."""
    return [caption for caption in captions if has_room(run, prompt_tokens([Text(caption)], run, "draw"))]


@sampling_mode()
def write_sample_sheet(run: Run, path: Path) -> bool:
    """Draw a few captions of the test split, the same ones each time, and write them as one sheet.

    Returns whether there were any.
    """
    captions, _ = captioned(run, path.parent.parent, SHEET)
    captions = drawable(run, captions)[:GRID]
    if captions:
        path.parent.mkdir(exist_ok=True)
        write_sheet([(c, p, None) for c, p in zip(captions, draw_images(run, captions, 0), strict=True)], path)
    return bool(captions)


def write_reconstructions(cfg: RunConfig, image_tokenizer: ImageTokenizer, folder: Path, path: Path) -> None:
    """Write a sheet of a few images of the test split, each above what the image tokenizer makes of its codes."""
    captions, images = captioned_images(cfg, folder, RECONSTRUCTIONS)
    clean = np.stack(images)
    both = np.concatenate([clean, image_tokenizer.decode(image_tokenizer.encode(clean))], axis=1)  # (n, 2R, R, 3)
    path.parent.mkdir(exist_ok=True)
    write_sheet([(caption, pair, None) for caption, pair in zip(captions, both, strict=True)], path)


# ---------------------------------------------------------------------------------------------------------------------
# The sheet

PAPER, INK, RIGHT, WRONG = "#ffffff", "#222222", "#2e8b57", "#c0392b"
GAP, LINE, FONT_SIZE = 16, 18, 14  # pixels
WIDTH = 1_000  # pixels of the sheet, unless one image is wider
MIN_CELL = 128  # pixels, so that the caption of a small image has room


def write_sheet(items: Sequence[tuple[str, np.ndarray, bool | None]], path: Path) -> None:
    """Write a grid of (caption, uint8 (R, R, 3), is it correct? or None) as one PNG.

    Small images are enlarged to at least MIN_CELL pixels, without smoothing. A green tick or a red cross marks what is
    correct or wrong. Characters that the font lacks, such as Chinese ones, are written as their code points: a box for
    each would look like an error of the model.
    """
    font, letters = _font()
    images = [enlarge(image, max(1, math.ceil(MIN_CELL / image.shape[1]))) for _, image, _ in items]
    cell = max([MIN_CELL, *(image.width for image in images)])
    captions = [_wrap(_drawable(caption, letters), font, cell - 18 * (ok is not None)) for caption, _, ok in items]
    columns = max(1, min(len(items), (WIDTH - GAP) // (cell + GAP)))
    rows = [range(start, min(start + columns, len(items))) for start in range(0, len(items), columns)]
    heights = [max(images[i].height + 6 + LINE * len(captions[i]) for i in row) + GAP for row in rows]
    sheet = Image.new("RGB", (GAP + columns * (cell + GAP), GAP + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = GAP + sum(heights[:number])
        for column, i in enumerate(row):
            left = GAP + column * (cell + GAP)
            _draw_item(sheet, draw, (left, top), images[i], captions[i], items[i][2], font)
    write_file(Path(path), png(sheet))


@cache
def _font() -> tuple[ImageFont.FreeTypeFont, Container[int]]:
    """Return the font that comes with matplotlib, and the code points that it has."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    path = str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    return ImageFont.truetype(path, FONT_SIZE), FT2Font(path).get_charmap().keys()


def _drawable(text: str, letters: Container[int]) -> str:
    """Return the text with an escape, such as \\u4e2d, for each character that is not in `letters`."""
    return "".join(c if ord(c) in letters or c.isspace() else c.encode("unicode_escape").decode() for c in text)


def _draw_item(sheet, draw, corner, image, lines, ok, font) -> None:
    left, top = corner
    sheet.paste(image, corner)
    draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline="#cccccc")
    below = top + image.height + 6
    if ok is not None:
        _draw_mark(draw, left, below + 2, ok)
    for number, line in enumerate(lines):
        draw.text((left + 18 * (ok is not None), below + number * LINE), line, INK, font)


def _draw_mark(draw, x: int, y: int, ok: bool) -> None:
    """Draw a tick or a cross from lines, since the font has neither."""
    if ok:
        draw.line((x + 1, y + 6, x + 5, y + 11, x + 12, y + 1), RIGHT, 3, joint="curve")
    else:
        draw.line((x + 2, y + 2, x + 11, y + 11), WRONG, 3)
        draw.line((x + 2, y + 11, x + 11, y + 2), WRONG, 3)


def _wrap(text: str, font, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels. A word that is too long is cut."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
