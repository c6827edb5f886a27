"""Codes of images that are encoded window by window: each different window goes through the encoder once.

A code depends on the pixels of its window alone, and drawn worlds repeat theirs: a few thousand windows make every
image of the toy's.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanochameleon.images.vqgan import join_windows

KNOWN_BYTES = 2**22  # pixels of windows that are kept at most; those of photographs hardly ever come twice


class WindowCodes:
    """Codes by the pixels of their window.

    encode: uint8 (N, side, side, 3) -> codes int64 (N, grid * grid), each window on its own.
    """

    def __init__(self, encode: Callable[[np.ndarray], Tensor], side: int):
        self.encode, self.side = encode, side
        # window -> its row, and the rows. One tuple, so that another thread never sees half of a change.
        self.cache: tuple[dict[bytes, int], Tensor | None] = {}, None

    def of_images(self, images: np.ndarray) -> Tensor:
        """uint8 (B, R, R, 3) -> codes int64 (B, n) in raster order."""
        (b, r, _, _), side = images.shape, self.side
        across = r // side
        # (B, R/s, s, R/s, s, 3) -> (B * R/s * R/s, s, s, 3)
        windows = images.reshape(b, across, side, across, side, 3).swapaxes(2, 3).reshape(-1, side, side, 3)
        pixels = windows.reshape(len(windows), -1).view(f"V{side * side * 3}").ravel().tolist()  # bytes can be hashed
        rows, codes = self.known(pixels, windows)
        found = codes[torch.from_numpy(np.array([rows[key] for key in pixels]))]  # (B * R/s * R/s, grid * grid)
        grid = round(found.shape[1] ** 0.5)
        return join_windows(found.view(-1, 1, grid, grid), across).flatten(1)

    def known(self, pixels: list[bytes], windows: np.ndarray) -> tuple[dict[bytes, int], Tensor]:
        """Return rows and codes that hold all of these windows. Neither is changed later: other threads may read."""
        rows, codes = self.cache
        if len(rows) * 3 * self.side**2 > KNOWN_BYTES:
            rows, codes = {}, None
        new = {key: number for number, key in enumerate(pixels) if key not in rows}  # one of each
        if new:
            encoded = self.encode(windows[list(new.values())])
            codes = encoded if codes is None else torch.cat([codes, encoded])
            rows = rows | {key: len(rows) + i for i, key in enumerate(new)}
            self.cache = rows, codes
        return rows, codes
