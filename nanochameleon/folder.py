"""Your own pictures: a folder with a caption file, read once into prepared pictures.

    captions.jsonl or metadata.jsonl   {"file_name": "a/cat.png", "text": "a cat"}, or "image" and "caption"
    metadata.csv                       a header with file_name and text (or image and caption), then a line a caption

A file in the folder itself, or one in each of its subfolders (Hugging Face's imagefolder: train/, test/, ...); file
names are relative to the caption file. A picture may have several captions. What cannot be used is skipped, counted and
listed with its reason in skipped.jsonl beside the prepared pictures. Left out: folders named for a class, archives.
"""

import csv
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from nanochameleon.data import Pictures, RawDocument, aside, captioned, interleaved, permutation, write_pictures
from nanochameleon.errors import UserError
from nanochameleon.image_tokenizer import load_picture, preprocess

CAPTION_FILES = "captions.jsonl", "metadata.jsonl", "metadata.csv"  # the first one found in a folder is read
FILE_KEYS, TEXT_KEYS = ("file_name", "image"), ("text", "caption")
TEST_FOLDERS = {"test", "validation", "valid", "val", "dev"}
TEST_SHARE = 20  # without such folders one picture in this many is of the test split
MAX_CAPTION = 1_000  # characters
SKIPPED = "skipped.jsonl"  # beside the prepared pictures


@dataclass
class Report:
    """What preparing a folder came to."""

    pictures: int = 0
    captions: int = 0
    cut: int = 0  # captions shortened to the limit
    skipped: list[dict] = field(default_factory=list)  # {"where": "captions.jsonl:3", "reason": ..., "detail": ...}

    def skip(self, where: str, reason: str, detail: str = "") -> None:
        self.skipped.append({"where": where, "reason": reason, "detail": detail})

    def __str__(self) -> str:
        text = f"{self.pictures:,} pictures with {self.captions:,} captions"
        if self.cut:
            text += f", {self.cut:,} of them cut"
        if self.skipped:
            reasons = Counter(item["reason"] for item in self.skipped).most_common()
            text += f"; {len(self.skipped):,} skipped: " + ", ".join(f"{n:,} {reason}" for reason, n in reasons)
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Caption files


def caption_files(folder: Path) -> list[Path]:
    """The caption file of the folder and of each subfolder. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: set --data.path to the one with your pictures and their captions")
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [[place / name for name in CAPTION_FILES if (place / name).is_file()][:1] for place in places]
    if not any(found):
        raise UserError(f"{folder} has no caption file: put captions.jsonl or metadata.csv beside the pictures")
    return [file for files in found for file in files]


def json_rows(file: Path) -> Iterator[tuple[int, dict | None]]:
    """(line number, object, or None for a line that is not one); empty lines are passed over."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else None


def csv_rows(file: Path) -> Iterator[tuple[int, dict | None]]:
    """(line number, row by the header's names, or None for a row that cannot be read)."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                row = None
            yield rows.reader.line_num, row  # rows.line_num does not count a row that failed


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


def problem(row: dict | None, name: str, caption: str, folder: Path) -> str | None:
    """Why a row cannot be used, short of reading its picture."""
    if row is None:
        return "broken lines"
    if not is_utf8(name + caption):
        return "not in UTF-8"
    if not name:
        return "without a file name"
    if not caption:
        return "without a caption"
    # by its spelling alone: links inside the folder are the owner's, and may lead anywhere
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        return "outside the folder"
    return None if os.path.isfile(folder / name) else "missing pictures"


def read_captions(folder: Path, report: Report, max_caption: int) -> dict[Path, list[str]]:
    """Picture file -> its captions, in the order of the caption files; notes in `report` what was skipped or cut."""
    captions: dict[Path, list[str]] = {}
    for file in caption_files(folder):
        rows = csv_rows(file) if file.suffix == ".csv" else json_rows(file)
        for number, row in rows:
            name, caption = first_text(row or {}, FILE_KEYS), first_text(row or {}, TEXT_KEYS)
            if reason := problem(row, name, caption, file.parent):
                report.skip(f"{file.relative_to(folder)}:{number}", reason, ascii(name[:200]))
                continue
            report.cut += len(caption) > max_caption
            captions.setdefault(file.parent / os.path.normpath(name), []).append(caption[:max_caption].rstrip())
    return captions


# ---------------------------------------------------------------------------------------------------------------------
# Preparing


def read_pictures(
    folder: Path, captions: dict[Path, list[str]], resolution: int, fit: Literal["crop", "pad"], report: Report
) -> Iterator[tuple[np.ndarray, dict]]:
    """(pixels, item) of every picture that can be read, one at a time; notes the others in `report`."""
    for file in tqdm(captions, desc="pictures", unit="pictures"):
        where = str(file.relative_to(folder))
        try:
            pixels = preprocess(load_picture(file), resolution, fit)
        except UserError as error:
            report.skip(where, "unreadable pictures", str(error))
            continue
        report.pictures += 1
        report.captions += len(captions[file])
        place = file.relative_to(folder).parts[0]
        # a checksum of the pixels decides the split, so that copies under two names stay together
        yield pixels, {"file": where, "captions": captions[file], "folder": place, "luck": zlib.crc32(pixels.tobytes())}


def prepare_folder(
    folder: Path, directory: Path, resolution: int, fit: Literal["crop", "pad"] = "crop", max_caption: int = MAX_CAPTION
) -> Report:
    """Reads `folder` into prepared pictures in `directory`, for FolderSource; what is skipped goes to skipped.jsonl.

    fit: "crop" keeps the middle square, "pad" the whole picture with a border. Longer captions are cut and counted.
    Raises UserError if there is no caption file or nothing that can be used; `directory` is whole or not there.
    """
    folder, report = Path(folder), Report()
    captions = read_captions(folder, report, max_caption)
    with aside(directory, Pictures.INDEX) as new:
        write_pictures(new, read_pictures(folder, captions, resolution, fit, report), resolution)
        if not report.pictures:
            first = "; ".join(f"{item['where']} ({item['reason']})" for item in report.skipped[:3])
            raise UserError(
                f"{folder} has no picture with a caption that can be used: {first or 'its caption file is empty'}"
            )
        with open(new / SKIPPED, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(item) + "\n" for item in report.skipped)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The source


def is_test(items: list[dict]) -> list[bool]:
    """Which items are of the test split: those in a test folder; without one 1 in 20, at least 1 if there are 2."""
    in_folder = [item["folder"] in TEST_FOLDERS for item in items]
    if any(in_folder) and not all(in_folder):
        return in_folder
    lucks = sorted({item["luck"] for item in items})
    n_test = max(1, len(lucks) // TEST_SHARE) if len(lucks) > 1 else 0
    chosen = set(lucks[:n_test])
    return [item["luck"] in chosen for item in items]


class FolderSource:
    """One split ("train" or "test") of a prepared folder, as documents of one of its FORMS.

    Raises UserError if the directory is not whole or the split is empty.
    """

    FORMS = ("pairs", "interleaved", "text", "drawings")

    def __init__(self, directory: Path, split: str, seed: int, form: str = "pairs"):
        self.stored, self.form = Pictures(directory), form
        self.seed = seed
        self.numbers = [n for n, test in enumerate(is_test(self.stored.items)) if test == (split == "test")]
        self.size = len(self.numbers)
        if not self.numbers:
            raise UserError(f"{directory} has no picture in its {split} split: add more pictures")

    def pixels(self, index: int) -> np.ndarray:
        """uint8 (R, R, 3)."""
        return self.stored.pixels[self.numbers[index % self.size]]

    def all_captions(self, index: int) -> list[str]:
        return self.stored.items[self.numbers[index % self.size]]["captions"]

    def caption(self, index: int) -> str:
        """One of the picture's captions, another one each time round."""
        captions = self.all_captions(index)
        return captions[(index // self.size) % len(captions)]

    def document(self, index: int) -> RawDocument:
        rng = np.random.default_rng((self.seed, index))
        if self.form == "interleaved":
            both = (index, int(rng.integers(self.size)))
            return interleaved([(self.caption(i), self.pixels(i)) for i in both])
        return captioned(self.form, self.caption(index), self.pixels(index), rng)

    def captions(self, n: int) -> Iterator[str]:
        """Captions in a drawn order, over all those of a picture only when n exceeds the number of pictures."""
        for i in range(n):
            epoch, place = divmod(i, self.size)
            yield self.caption(epoch * self.size + int(permutation(self.size, self.seed)[place]))
