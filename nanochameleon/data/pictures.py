"""Stored pictures: what emoji.py, folder.py and webdataset.py prepare once, mapped into memory."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nanochameleon.data.folders import map_file, read_index


def write_pictures(directory: Path, pictures: Iterable[tuple[np.ndarray, dict]], resolution: int) -> int:
    """Writes uint8 (R, R, 3) pictures one by one, each with a JSON object about it, into an existing directory.

    Returns how many. The index comes last.
    """
    items = []
    with open(directory / "pictures.bin", "wb") as file:
        for pixels, item in pictures:
            assert pixels.dtype == np.uint8 and pixels.shape == (resolution, resolution, 3)
            file.write(np.ascontiguousarray(pixels).data)
            items.append(item)
    index = {"format": Pictures.FORMAT, "resolution": resolution, "items": items}
    (directory / Pictures.INDEX).write_text(json.dumps(index), encoding="utf-8")
    return len(items)


class Pictures:
    """Reads what write_pictures wrote: `pixels` uint8 (n, R, R, 3), memory-mapped, and `items`, n JSON objects.

    Raises UserError for a directory that is not one or is not whole.
    """

    FORMAT, INDEX = "a folder of prepared pictures", "pictures.json"

    def __init__(self, directory: Path):
        index = read_index(directory, self.INDEX, self.FORMAT)
        self.resolution, self.items = index["resolution"], index["items"]
        shape = len(self.items), self.resolution, self.resolution, 3
        self.pixels = map_file(Path(directory) / "pictures.bin", "u1", shape)
