"""Stored images: what emoji.py, folder.py and webdataset.py prepare once, mapped into memory."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nanochameleon.data.index import damaged, map_file, read_index, write_index
from nanochameleon.errors import OwnError


def write_images(directory: Path, images: Iterable[tuple[np.ndarray, dict]], resolution: int) -> int:
    """Writes uint8 (R, R, 3) images one by one, each with a JSON object about it, into an existing directory.

    Returns how many. The index comes last.
    """
    items, checksums = [], []
    with open(directory / "pictures.bin", "wb") as file:
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
    """Reads what write_images wrote: n uint8 (R, R, 3), memory-mapped, and `items`, a JSON object about each.

    Raises UserError for a directory that is not one or is not whole.
    """

    FORMAT, INDEX = "a folder of prepared images", "pictures.json"

    def __init__(self, directory: Path):
        index = read_index(directory, self.INDEX, self.FORMAT)
        self.path, self.resolution, self.items = Path(directory) / "pictures.bin", index["resolution"], index["items"]
        self.checksums = index.get("checksums")  # None of an older version
        self.pixels = map_file(self.path, "u1", (len(self.items), self.resolution, self.resolution, 3))

    def __getitem__(self, n: int) -> np.ndarray:
        """Raises OwnError for an image that is not as it was written."""
        if self.checksums and zlib.crc32(self.pixels[n]) != self.checksums[n]:
            raise damaged(self.path, "has changed since it was written", OwnError)
        return self.pixels[n]
