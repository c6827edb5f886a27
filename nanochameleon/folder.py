"""Your own pictures: a folder with a caption file or of tars, read once into prepared pictures.

    captions.jsonl or metadata.jsonl   {"file_name": "a/cat.png", "text": "a cat"}, or "image" and "caption"
    metadata.csv                       a header with file_name and text (or image and caption), then a line a caption
    00000.tar, 00001.tar, ...          a WebDataset (webdataset.py), where there is no caption file

A file in the folder itself, or one in each of its subfolders (Hugging Face's imagefolder: train/, test/, ...), and so
for tars; file names are relative to the caption file. A picture may have several captions. What cannot be used is
skipped, counted and listed with its reason in skipped.jsonl beside the prepared pictures. Left out: folders named for a
class.
"""

import csv
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from nanochameleon.data import Pictures, RawDocument, aside, captioned, interleaved, permutation, write_pictures
from nanochameleon.data.reading import (
    SKIPPED,
    TEXT_KEYS,
    Bad,
    File,
    Report,
    as_line,
    first_few,
    first_text,
    is_utf8,
    shortened,
)
from nanochameleon.errors import UserError
from nanochameleon.webdataset import captioned as captioned_in_tar
from nanochameleon.webdataset import tars_in

CAPTION_FILES = "captions.jsonl", "metadata.jsonl", "metadata.csv"  # the first one found in a folder is read
FILE_KEYS = ("file_name", "image")
TEST_FOLDERS = {"test", "validation", "valid", "val", "dev"}
TEST_SHARE = 20  # without such folders one picture in this many is of the test split

# ---------------------------------------------------------------------------------------------------------------------
# Caption files


def caption_files(folder: Path) -> list[Path]:
    """The caption file of the folder and of each subfolder."""
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [[place / name for name in CAPTION_FILES if (place / name).is_file()][:1] for place in places]
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


def read_captions(folder: Path, report: Report) -> dict[Path, list[str]]:
    """Picture file -> its captions, in the order of the caption files; notes in `report` what was skipped or cut."""
    captions: dict[Path, list[str]] = {}
    for file in caption_files(folder):
        rows = csv_rows(file) if file.suffix == ".csv" else json_rows(file)
        for number, row in rows:
            name, caption = first_text(row or {}, FILE_KEYS), first_text(row or {}, TEXT_KEYS)
            if reason := problem(row, name, caption, file.parent):
                report.skip(f"{file.relative_to(folder)}:{number}", reason, ascii(name[:200]))
                continue
            caption, cut = shortened(caption)
            report.cut += cut
            captions.setdefault(file.parent / os.path.normpath(name), []).append(caption)
    return captions


# ---------------------------------------------------------------------------------------------------------------------
# Preparing


Captions = dict[Path, list[str]]
Fit = Literal["crop", "pad"]


def read_pictures(
    folder: Path, captions: Captions, resolution: int, fit: Fit, report: Report
) -> Iterator[tuple[np.ndarray, dict]]:
    """(pixels, item) of every picture that can be read, one at a time; notes the others in `report`."""
    for file in tqdm(captions, desc="pictures", unit="pictures"):
        name = str(file.relative_to(folder))
        yield from stored(File(name, file, fit=fit), captions[file], resolution, report)


def read_tars(folder: Path, tars: list[Path], resolution: int, fit: Fit, report: Report) -> Iterator[tuple]:
    """The same for the pictures in tars."""
    with tqdm(total=sum(tar.stat().st_size for tar in tars), desc="pictures", unit="B", unit_scale=True) as bar:
        for tar in tars:
            before = bar.n
            for found, end in captioned_in_tar(tar, str(tar.relative_to(folder))):
                bar.update(before + end - bar.n)
                if isinstance(found, Bad):
                    report.skipped.append(found)
                    continue
                report.cut += found.cut
                picture = File(found.where, data=found.picture.data, fit=fit)
                yield from stored(picture, [found.caption], resolution, report)


def stored(picture: File, captions: list[str], resolution: int, report: Report) -> Iterator[tuple[np.ndarray, dict]]:
    """One picture and what is kept of it beside its pixels, or nothing."""
    try:
        pixels = picture.pixels(resolution)
    except UserError as error:
        report.skip(picture.name, "unreadable pictures", str(error))
        return
    report.pictures += 1
    report.captions += len(captions)
    place = picture.name.split(os.sep)[0]
    # a checksum of the pixels decides the split, so that copies under two names stay together
    yield pixels, {"file": picture.name, "captions": captions, "folder": place, "luck": zlib.crc32(pixels.tobytes())}


def find_pictures(folder: Path, resolution: int, fit: Fit, report: Report) -> Iterator[tuple]:
    """From caption files, else from tars. Raises UserError where there are neither."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: set --data.path to the one with your pictures and their captions")
    if caption_files(folder):
        return read_pictures(folder, read_captions(folder, report), resolution, fit, report)
    if tars := tars_in(folder):
        return read_tars(folder, tars, resolution, fit, report)
    raise UserError(f"{folder} has no caption file: put captions.jsonl or metadata.csv beside the pictures, or tars")


def prepare_folder(folder: Path, directory: Path, resolution: int, fit: Fit = "crop") -> Report:
    """Reads `folder` into prepared pictures in `directory`, for FolderSource; what is skipped goes to skipped.jsonl.

    fit: "crop" keeps the middle square, "pad" the whole picture with a border. Longer captions are cut and counted.
    Raises UserError if there is nothing that can be used; `directory` is whole or not there.
    """
    folder, report = Path(folder), Report()
    pictures = find_pictures(folder, resolution, fit, report)
    with aside(directory, Pictures.INDEX) as new:
        write_pictures(new, pictures, resolution)
        if not report.pictures:
            first = first_few(report.skipped) or "its caption files and tars are empty"
            raise UserError(f"{folder} has no picture with a caption that can be used: {first}")
        (new / SKIPPED).write_bytes(b"".join(map(as_line, report.skipped)))
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
        return self.stored[self.numbers[index % self.size]]

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
