"""Items read from outside: captioned pictures that may be bad, rules for captions, and the count of what was skipped.

What cannot be used is skipped, counted and listed with its place and reason, and never stops the rest.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from nanochameleon.image_tokenizer import load_square

TEXT_KEYS = ("text", "caption")  # of a JSON object or a table that holds a text
MAX_CAPTION = 1_000  # characters
SKIPPED = "skipped.jsonl"  # beside what was prepared


@dataclass(frozen=True)
class Bad:
    """Something that is not used: where it is, why (a class of reasons, to be counted), and a detail for its owner."""

    where: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, eq=False)
class File:
    """A picture that is not decoded: a file, or bytes that were read from a place called `name`."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    fit: Literal["crop", "pad"] = "crop"  # pad: of a prompt

    def pixels(self, resolution: int) -> np.ndarray:
        """uint8 (R, R, 3). Raises UserError, as load_picture does."""
        return load_square(self.path or self.name, resolution, self.fit, self.data)


@dataclass(frozen=True, eq=False)
class Captioned:
    """A picture with a caption of at most MAX_CAPTION characters; `cut`: it was longer."""

    where: str
    caption: str
    picture: File
    cut: bool = False


@dataclass
class Report:
    """What reading came to."""

    pictures: int = 0
    captions: int = 0
    cut: int = 0  # captions shortened to the limit
    skipped: list[Bad] = field(default_factory=list)

    def skip(self, where: str, reason: str, detail: str = "") -> None:
        self.skipped.append(Bad(where, reason, detail))

    def __str__(self) -> str:
        text = f"{self.pictures:,} pictures with {self.captions:,} captions"
        if self.cut:
            text += f", {self.cut:,} of them cut"
        return text + (f"; {reasons(Counter(bad.reason for bad in self.skipped))}" if self.skipped else "")


def reasons(counts: Counter[str]) -> str:
    """'3 skipped: 2 missing pictures, 1 broken lines'."""
    return f"{counts.total():,} skipped: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common())


def first_few(skipped: Iterable[Bad]) -> str:
    return "; ".join(f"{bad.where} ({bad.reason})" for bad in islice(skipped, 3))


def as_line(bad: Bad) -> bytes:
    """Of skipped.jsonl."""
    return (json.dumps(asdict(bad)) + "\n").encode()


def first_text(row: dict, keys: tuple[str, ...]) -> str:
    """The first value under one of the keys that is a text with something in it, stripped; '' if none is."""
    values = (row.get(key) for key in keys)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")


def is_utf8(text: str) -> bool:
    """False for bytes that were none in the file, and for half a surrogate pair that JSON may spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(caption: str) -> tuple[str, bool]:
    """The caption within MAX_CAPTION, and whether it was longer."""
    return caption[:MAX_CAPTION].rstrip(), len(caption) > MAX_CAPTION
