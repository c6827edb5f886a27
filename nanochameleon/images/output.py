"""Where generated images go: into a PNG file and, if it can show them, onto the terminal."""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanochameleon.errors import UserError, say
from nanochameleon.files import check_writable, write_new
from nanochameleon.images import terminal
from nanochameleon.images.tokenizer import ImageTokenizer


def show(image: np.ndarray) -> None:
    """Show uint8 (H, W, 3) on the terminal, if it can."""
    if mode := terminal.terminal_mode(os.environ, sys.stdout.isatty(), sys.stdout.encoding):
        sys.stdout.write(terminal.as_terminal(image, mode) + "\n")


@dataclass(frozen=True)
class ImageOutput:
    image_tokenizer: ImageTokenizer
    folder: Path
    stem: str  # files are called stem-1.png, stem-2.png, ...
    scale: int | None = None  # times that saved images are enlarged; None: to at least 256 pixels a side

    @property
    def terminal_mode(self) -> str | None:
        """How the terminal shows images, None where it cannot."""
        return terminal.terminal_mode(os.environ, sys.stdout.isatty(), sys.stdout.encoding)

    def preview(self, codes: Sequence[int]) -> None:
        """Show an unfinished image, its first code in place of the missing ones. The next output overwrites it."""
        filled = [*codes, *[codes[0]] * (self.image_tokenizer.n_codes_per_image - len(codes))]
        shown = terminal.as_terminal(self.image_tokenizer.decode(torch.tensor([filled]))[0])
        sys.stdout.write(f"{shown}\n\x1b[{shown.count(chr(10)) + 1}F")  # F: back up to the first of these lines
        sys.stdout.flush()

    def save(self, codes: Sequence[int]) -> Path:
        """Decode, save and show one image, and print its path. Raises UserError where it cannot be written."""
        image = self.image_tokenizer.decode(torch.tensor([list(codes)]))[0]  # uint8 (R, R, 3)
        data = terminal.png(terminal.enlarge(image, self.scale or math.ceil(256 / len(image))))
        with self.explained():
            path = write_new(self.folder, self.stem, ".png", data)
        show(image)
        say(path)
        return path

    def check(self) -> None:
        """Raise UserError if no image could be saved, before one is generated."""
        with self.explained():
            check_writable(self.folder)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise UserError for an OSError within."""
        try:
            yield
        except OSError as error:
            why = f"cannot save an image in {self.folder}: {error.strerror}"
            raise UserError(f"{why}; choose another folder with --out") from None
