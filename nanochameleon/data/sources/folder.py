"""Your own images: a folder with a caption file or of tars, read once into prepared images.

    captions.jsonl or metadata.jsonl   {"file_name": "a/cat.png", "text": "a cat"}, or "image" and "caption"
    metadata.csv                       a header with file_name and text (or image and caption), then a line a caption
    00000.tar, 00001.tar, ...          a WebDataset (webdataset.py), where there is no caption file

A file in the folder itself, or one in each of its subfolders (Hugging Face's imagefolder: train/, test/, ...), and so
for tars; file names are relative to the caption file, or absolute and inside its folder. An image may have several
captions. What cannot be used is skipped, counted and listed with its reason in skipped.jsonl beside the prepared
images: rows, images, and files that are not read. Links are followed, to files and to folders, wherever they lead:
look through a folder that you were given before you use it. Left out: folders named for a class, hidden files, images
that no row names.
"""

import csv
import io
import os
import unicodedata
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
from tqdm import tqdm

from nanochameleon.data import ImageStore, RawDocument, aside, captioned, interleaved, permutation, write_images
from nanochameleon.data.reading import (
    MAX_LINE,
    SKIPPED,
    TEXT_KEYS,
    Bad,
    File,
    Report,
    accounted,
    as_line,
    first_few,
    first_text,
    is_blank,
    is_utf8,
    json_row,
    near,
    not_read,
    opened,
    shortened,
    size_of,
    text_lines,
    walk,
)
from nanochameleon.data.sources.webdataset import captioned as captioned_in_tar
from nanochameleon.data.sources.webdataset import tars_in
from nanochameleon.errors import UserError

CAPTION_FILES = "captions.jsonl", "metadata.jsonl", "metadata.csv"  # the first one found in a folder is read
FILE_KEYS = ("file_name", "image")
BROKEN_QUOTES = "broken quotes"
TEST_FOLDERS = {"test", "validation", "valid", "val", "dev"}
TEST_SHARE = 20  # without such folders one image in this many is of the test split

# ---------------------------------------------------------------------------------------------------------------------
# Caption files


def caption_files(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Of the files (reading.walk): the caption file of the folder and of each subfolder, in any letter case."""
    found: dict[Path, Path] = {}
    for path in near(folder, files):
        if path.name.lower() in CAPTION_FILES:
            found[path.parent] = min(found.get(path.parent, path), path, key=order_of)
    return list(found.values())


def order_of(path: Path) -> int:
    return CAPTION_FILES.index(path.name.lower())


Row = dict | str  # by the names of its fields; or why it cannot be read


def json_rows(file: Path) -> Iterator[tuple[int, Row]]:
    """(line number, row); empty lines are passed over."""
    with opened(file) as data:
        for number, (_, line) in enumerate(text_lines(data, 0, float("inf")), 1):
            if line is None:
                yield number, "lines too long"
            elif not is_blank(line):
                row = json_row(line)
                yield number, "broken lines" if row is None else row


class Lines:
    """The lines of a table for csv.reader. Those that a broken row has swallowed can be given back."""

    def __init__(self, file: TextIO):
        self.file, self.number = file, 0
        self.taken: list[str] = []  # of the row that is being read
        self.again: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else self.file.readline(MAX_LINE)
        if not line:
            raise StopIteration
        self.taken.append(line)
        return line

    def next_row(self) -> int:
        """The number of the line at which the next row begins."""
        self.number += len(self.taken)
        self.taken.clear()
        return self.number + 1

    def give_back(self) -> None:
        """All lines of the row but its first."""
        self.again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def csv_rows(file: Path) -> Iterator[tuple[int, Row]]:
    """(number of its first line, row). A row that breaks a rule takes no other row with it."""
    with opened(file) as data:
        lines, header = Lines(io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline="")), None
        rows = csv.reader(lines, strict=True)
        while True:
            number = lines.next_row()
            try:
                fields = next(rows, None)
            except csv.Error as error:
                too_long = "limit" in str(error) and len(lines.taken) == 1  # of several lines, a quote was left open
                row, header = "broken lines" if too_long else BROKEN_QUOTES, header or []
            else:
                if fields is None:
                    return
                if not fields or header is None:  # an empty line, or the first other one
                    header = header or fields or None
                    continue
                row = row_of(fields, header, lines.taken, file.parent)
            if row == BROKEN_QUOTES:
                lines.give_back()
            yield number, row


def row_of(fields: list[str], header: list[str], lines: list[str], folder: Path) -> Row:
    """A row by the header's names. A quote that was not meant as one makes the rows after it a part of a field."""
    for line in lines[1:]:
        other = next(csv.reader([line]), [])
        name = first_text(dict(zip(header, other, strict=False)), FILE_KEYS)
        if len(other) >= len(header) and name and isinstance(image_at(name, folder), Path):
            return BROKEN_QUOTES
    more = any(fields[len(header) :])  # a comma at the end of every line says nothing
    return "more fields than the header" if more else dict(zip(header, fields, strict=False))


def read_row(row: Row, where: str, folder: Path) -> tuple[Path, str] | Bad:
    """Image file and caption of a row, or why it cannot be used, short of reading the image."""
    if isinstance(row, str):
        return Bad(where, row)
    name, caption = first_text(row, FILE_KEYS), first_text(row, TEXT_KEYS)
    if not is_utf8(name + caption):
        return Bad(where, "not in UTF-8", ascii(name[:200]))
    if not name or not caption:
        return Bad(where, "without a caption" if name else "without a file name", fields_of(row))
    found = image_at(name, folder)
    return Bad(where, found, ascii(name[:200])) if isinstance(found, str) else (found, caption)


def fields_of(row: dict) -> str:
    return f"its fields are {', '.join(map(ascii, row))}"[:200]


def image_at(name: str, folder: Path) -> Path | str:
    """The file of that name, or why there is none."""
    # by its spelling alone: links inside the folder are the owner's, and may lead anywhere
    base = os.path.join(os.path.abspath(folder), "")
    path = os.path.normpath(os.path.join(base, name))
    if not path.startswith(base):
        return "outside the folder"
    inside = Path(path[len(base) :])
    if os.path.isfile(folder / inside):
        return folder / inside
    return (None if name.isascii() else respelled(folder, inside.parts)) or "missing images"


def respelled(folder: Path, parts: tuple[str, ...]) -> Path | None:
    """The only file whose name is the same but for how Unicode composes its letters: a Mac writes e and an accent."""
    for part in parts:
        try:
            alike = spellings(folder, os.stat(folder).st_mtime_ns).get(unicodedata.normalize("NFC", part), [])
        except OSError:
            return None
        if part not in alike and len(alike) != 1:
            return None
        folder /= part if part in alike else alike[0]
    return folder if os.path.isfile(folder) else None


@lru_cache(maxsize=64)
def spellings(folder: Path, changed: int) -> dict[str, list[str]]:
    """Names in a folder by their composed form; `changed`, its time, makes the answer of an older one no answer."""
    found: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        found.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return found


def read_captions(folder: Path, files: Iterable[Path], report: Report) -> dict[Path, list[str]]:
    """Image file -> its captions, in the order of the caption files; notes in `report` what was skipped or cut."""
    captions: dict[Path, list[str]] = {}
    for file in files:
        rows, name = csv_rows(file) if file.suffix.lower() == ".csv" else json_rows(file), str(file.relative_to(folder))
        for found in accounted(rows, file, name):
            read = found if isinstance(found, Bad) else read_row(found[1], f"{name}:{found[0]}", file.parent)
            if isinstance(read, Bad):
                report.skipped.append(read)
                continue
            caption, cut = shortened(read[1])
            report.cut += cut
            captions.setdefault(read[0], []).append(caption)
    return captions


# ---------------------------------------------------------------------------------------------------------------------
# Preparing


Captions = dict[Path, list[str]]
Fit = Literal["crop", "pad"]


def read_images(
    folder: Path, captions: Captions, resolution: int, fit: Fit, report: Report
) -> Iterator[tuple[np.ndarray, dict]]:
    """(pixels, item) of every image that can be read, one at a time; notes the others in `report`."""
    for file in tqdm(captions, desc="images", unit="images"):
        name = str(file.relative_to(folder))
        yield from stored(File(name, file, fit=fit), captions[file], resolution, report)


def read_tars(folder: Path, tars: list[Path], resolution: int, fit: Fit, report: Report) -> Iterator[tuple]:
    """The same for the images in tars."""
    with tqdm(total=sum(map(size_of, tars)), desc="images", unit="B", unit_scale=True) as bar:
        for tar in tars:
            before = bar.n
            for found, end in captioned_in_tar(tar, str(tar.relative_to(folder))):
                bar.update(before + end - bar.n)
                if isinstance(found, Bad):
                    report.skipped.append(found)
                    continue
                report.cut += found.cut
                image = File(found.where, data=found.image.data, fit=fit)
                yield from stored(image, [found.caption], resolution, report)


def stored(image: File, captions: list[str], resolution: int, report: Report) -> Iterator[tuple[np.ndarray, dict]]:
    """One image and what is kept of it beside its pixels, or nothing."""
    try:
        pixels = image.pixels(resolution)
    except UserError as error:
        report.skip(image.name, "unreadable images", str(error))
        return
    report.images += 1
    report.captions += len(captions)
    place = image.name.split(os.sep)[0]
    # a checksum of the pixels decides the split, so that copies under two names stay together
    yield pixels, {"file": image.name, "captions": captions, "folder": place, "luck": zlib.crc32(pixels.tobytes())}


def find_images(folder: Path, resolution: int, fit: Fit, report: Report) -> Iterator[tuple]:
    """From caption files, else from tars. Raises UserError where there are neither."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: set --data.path to the one with your images and their captions")
    files, left = walk(folder)
    captions, tars = caption_files(folder, files), tars_in(folder, files)
    report.skipped += left + not_read(folder, files, captions or tars)
    if captions:
        return read_images(folder, read_captions(folder, captions, report), resolution, fit, report)
    if tars:
        return read_tars(folder, tars, resolution, fit, report)
    why = f"{folder} has no caption file: put captions.jsonl or metadata.csv beside the images, or tars"
    raise UserError(why + (f"; it has {first_few(report.skipped)}" if report.skipped else ""))


def prepare_folder(folder: Path, directory: Path, resolution: int, fit: Fit = "crop") -> Report:
    """Reads `folder` into prepared images in `directory`, for FolderSource; what is skipped goes to skipped.jsonl.

    fit: "crop" keeps the middle square, "pad" the whole image with a border. Longer captions are cut and counted.
    Raises UserError if there is nothing that can be used; `directory` is whole or not there.
    """
    folder, report = Path(folder), Report()
    images = find_images(folder, resolution, fit, report)
    with aside(directory, ImageStore.INDEX) as new:
        write_images(new, images, resolution)
        if not report.images:
            first = first_few(report.skipped) or "its caption files and tars are empty"
            raise UserError(f"{folder} has no image with a caption that can be used: {first}")
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
        self.stored, self.form = ImageStore(directory), form
        self.seed = seed
        self.numbers = [n for n, test in enumerate(is_test(self.stored.items)) if test == (split == "test")]
        self.size = len(self.numbers)
        if not self.numbers:
            raise UserError(f"{directory} has no image in its {split} split: add more images")

    def pixels(self, index: int) -> np.ndarray:
        """uint8 (R, R, 3)."""
        return self.stored[self.numbers[index % self.size]]

    def all_captions(self, index: int) -> list[str]:
        return self.stored.items[self.numbers[index % self.size]]["captions"]

    def caption(self, index: int) -> str:
        """One of the image's captions, another one each time round."""
        captions = self.all_captions(index)
        return captions[(index // self.size) % len(captions)]

    def document(self, index: int) -> RawDocument:
        rng = np.random.default_rng((self.seed, index))
        if self.form == "interleaved":
            both = (index, int(rng.integers(self.size)))
            return interleaved([(self.caption(i), self.pixels(i)) for i in both])
        return captioned(self.form, self.caption(index), self.pixels(index), rng)

    def captions(self, n: int) -> Iterator[str]:
        """Captions in a drawn order, over all those of an image only when n exceeds the number of images."""
        for i in range(n):
            epoch, place = divmod(i, self.size)
            yield self.caption(epoch * self.size + int(permutation(self.size, self.seed)[place]))
