"""Your own images: a folder with caption files or tars, read once and stored (data/image_store.py).

    captions.jsonl, metadata.jsonl, metadata.csv   caption_files.py
    00000.tar, 00001.tar, ...                      webdataset.py, where there is no caption file

Each may be in the folder itself, or in each of its subfolders (Hugging Face's imagefolder: train/, test/, ...). What
cannot be used is skipped, counted and listed with its reason in skipped.jsonl next to the stored images. Links are
followed, to files and to folders, wherever they lead: look through a folder that you were given before you use it. Left
out: folders named for a class, hidden files, images that no row names.
"""

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanochameleon.data import (
    ImageStore,
    RawDocument,
    captioned,
    interleaved,
    permutation,
    replacing_folder,
    write_images,
)  # fmt: skip
from nanochameleon.data.reading import SKIPPED, Bad, ImageFile, as_line, first_few, reasons, size_of
from nanochameleon.data.sources.units import CAPTIONED, Unit, items, survey
from nanochameleon.errors import UserError

TEST_FOLDERS = {"test", "validation", "valid", "val", "dev"}
TEST_ONE_IN = 20  # without such folders one image in this many is in the test split

# ---------------------------------------------------------------------------------------------------------------------
# Storing the images


@dataclass
class Report:
    """What was read and what was skipped."""

    images: int = 0
    captions: int = 0
    cut: int = 0  # captions cut to the limit
    skipped: list[Bad] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.images:,} images with {self.captions:,} captions"
        if self.cut:
            text += f", {self.cut:,} of them cut"
        return text + (f"; {reasons(Counter(bad.reason for bad in self.skipped))}" if self.skipped else "")


def prepare_folder(folder: Path, directory: Path, resolution: int) -> Report:
    """Store the captioned images of `folder` in `directory`, for FolderSource; list what was skipped.

    Images are cropped to their middle square. Raises UserError if nothing can be used; `directory` is whole or not
    there.
    """
    folder, report = Path(folder), Report()
    units = find_units(folder, report)
    with replacing_folder(directory, ImageStore.INDEX) as new:
        write_images(new, read_images(folder, units, resolution, report), resolution)
        if not report.images:
            first = first_few(report.skipped) or "its caption files and tars are empty"
            raise UserError(f"{folder} has no image with a caption that can be used: {first}")
        (new / SKIPPED).write_bytes(b"".join(map(as_line, report.skipped)))
    return report


def find_units(folder: Path, report: Report) -> list[Unit]:
    """The caption files of a folder, else its tars. Raises UserError if it has neither."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: set --data.path to the one with your images and their captions")
    files, report.skipped = survey(folder, "pairs")
    if not files:
        has = f"; it has {first_few(report.skipped)}" if report.skipped else ""
        raise UserError(
            f"{folder} has no caption file: put captions.jsonl or metadata.csv next to the images, or tars{has}"
        )
    return [Unit(path, name, 0, size_of(path)) for path, name in files if size_of(path) > 0]


def read_images(folder: Path, units: list[Unit], resolution: int, report: Report) -> Iterator[tuple[np.ndarray, dict]]:
    """Yield (pixels, item) of every image that can be read, one at a time; note the others in `report`."""
    captions: dict[Path, list[str]] = {}  # an image file may have several, in any order
    with tqdm(desc="images", unit="images") as bar:
        for item in (item for unit in units for item, _ in items(unit, CAPTIONED)):
            if isinstance(item, Bad):
                report.skipped.append(item)
                continue
            text, image = item.doc
            report.cut += item.cut
            if image.path:
                captions.setdefault(image.path, []).append(text.text)
            else:  # in a tar, where captions follow their image
                bar.update()
                yield from decode(image, item.where, [text.text], resolution, report)
        bar.total = bar.n + len(captions)
        for path, texts in captions.items():
            bar.update()
            yield from decode(ImageFile(str(path), path), str(path.relative_to(folder)), texts, resolution, report)


def decode(
    image: ImageFile, name: str, captions: list[str], resolution: int, report: Report
) -> Iterator[tuple[np.ndarray, dict]]:
    """Yield one image's pixels and what is stored about it; nothing if it cannot be read."""
    try:
        pixels = image.pixels(resolution)
    except UserError as error:
        report.skipped.append(Bad(name, "unreadable images", str(error)))
        return
    report.images += 1
    report.captions += len(captions)
    # a checksum of the pixels decides the split, so that copies under two names stay together
    luck = zlib.crc32(pixels.tobytes())
    yield pixels, {"file": name, "captions": captions, "folder": name.split(os.sep)[0], "luck": luck}


# ---------------------------------------------------------------------------------------------------------------------
# The source


def is_test(items: list[dict]) -> list[bool]:
    """Which items are in the test split: items in a test folder; without one 1 in 20, at least 1 if there are 2."""
    in_folder = [item["folder"] in TEST_FOLDERS for item in items]
    if any(in_folder) and not all(in_folder):
        return in_folder
    lucks = sorted({item["luck"] for item in items})
    n_test = max(1, len(lucks) // TEST_ONE_IN) if len(lucks) > 1 else 0
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
        """One of the image's captions, another one in every epoch."""
        captions = self.all_captions(index)
        return captions[(index // self.size) % len(captions)]

    def document(self, index: int) -> RawDocument:
        rng = np.random.default_rng((self.seed, index))
        if self.form == "interleaved":
            both = (index, int(rng.integers(self.size)))
            return interleaved([(self.caption(i), self.pixels(i)) for i in both])
        return captioned(self.form, self.caption(index), self.pixels(index), rng)

    def captions(self, n: int) -> Iterator[str]:
        """n captions in a shuffled order; each image gives one before any gives a second one."""
        for i in range(n):
            epoch, place = divmod(i, self.size)
            yield self.caption(epoch * self.size + int(permutation(self.size, self.seed)[place]))
