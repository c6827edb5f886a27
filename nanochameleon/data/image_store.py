"""Stored images: squares of pixels with a JSON object about each, written once and memory-mapped.

    images.bin     uint8 (n, R, R, 3)
    images.json    the objects ("items"), the resolution, and a CRC-32 of each image

The sources emoji and folder draw or read their images once and keep them here.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nanochameleon.data.index import damaged, map_file, read_index, write_index
from nanochameleon.errors import OwnError

OLDER = "pictures"  # earlier runs have pictures/, pictures.bin and pictures.json
OLDER_FORMAT = "a folder of prepared pictures"  # as their index names it


def stored_images(run: Path) -> Path:
    """The folder of a run's stored images, under its older name where it has that."""
    older = Path(run) / OLDER
    return older if older.is_dir() else Path(run) / "images"


def index_of(directory: Path) -> Path:
    """The index of stored images, under its older name where it has that."""
    older = Path(directory) / f"{OLDER}.json"
    return older if older.exists() else Path(directory) / ImageStore.INDEX


def write_images(directory: Path, images: Iterable[tuple[np.ndarray, dict]], resolution: int) -> int:
    """Write uint8 (R, R, 3) images one by one into an existing directory, each with a JSON object about it.

    Returns the number of images. The index is written last.
    """
    items, checksums = [], []
    with open(directory / "images.bin", "wb") as file:
        for pixels, item in images:
            assert pixels.dtype == np.uint8 and pixels.shape == (resolution, resolution, 3)
            pixels = np.ascontiguousarray(pixels)
            file.write(pixels.data)
            items.append(item)
            checksums.append(zlib.crc32(pixels))
    index = {"resolution": resolution, "items": items, "checksums": checksums}
    write_index(directory, ImageStore.INDEX, ImageStore.FORMAT, index)
    return len(items)


class ImageStore:
    """Reads what write_images wrote: `pixels`, uint8 (n, R, R, 3), memory-mapped, and `items`, an object about each.

    Raises UserError for a directory that is not one or is not whole.
    """

    FORMAT, INDEX = "a folder of prepared images", "images.json"

    def __init__(self, directory: Path):
        path = index_of(directory)
        index = read_index(directory, path.name, self.FORMAT if path.name == self.INDEX else OLDER_FORMAT)
        self.path, self.resolution, self.items = path.with_suffix(".bin"), index["resolution"], index["items"]
        self.checksums = index["checksums"]
        self.pixels = map_file(self.path, "u1", (len(self.items), self.resolution, self.resolution, 3))

    def __getitem__(self, n: int) -> np.ndarray:
        """Image n. Raises OwnError if it has changed since it was written."""
        if zlib.crc32(self.pixels[n]) != self.checksums[n]:
            raise damaged(self.path, "has changed since it was written", OwnError)
        return self.pixels[n]
