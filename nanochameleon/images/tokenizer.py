"""Images <-> codes: an image file -> pixels -> the codes of a VQGAN, and back.

    load_square: file (files.py) -> square, uint8 (R, R, 3) -> to_pixels, float in [-1, 1] -> VQGAN -> codes (n,)
    codes -> VQGAN -> to_images, uint8 (R, R, 3)

The steps are Chameleon's (arXiv 2405.09818 section 3.2): LANCZOS, a centre crop for images that the model learns to
draw, a border around images that it is shown, then exactly [-1, 1]. Left out: the network (vqgan.py).
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanochameleon.errors import UserError
from nanochameleon.images.files import open_rgb
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.images.windows import WindowCodes

Fit = Literal["crop", "pad"]
NO_DECODER = (
    "this model has no image decoder, since it came from transformers, which drops it: it reads images and cannot "
    "draw them; give Meta's vqgan.ckpt with --vqgan (train.py: --init-vqgan)"
)


# ---------------------------------------------------------------------------------------------------------------------
# Squares


def load_square(path: str | Path, resolution: int, fit: Fit, data: bytes | None = None) -> np.ndarray:
    """preprocess(load_image(path, data), resolution, fit): uint8 (resolution, resolution, 3).

    All threads share one memory budget for their images (files.py). Raises UserError as load_image does.
    """
    with open_rgb(path, data) as image:
        square = preprocess(image, resolution, fit)
        image.close()  # free its memory before open_rgb frees its part of the budget
        return square


def preprocess(image: Image.Image, resolution: int, fit: Fit) -> np.ndarray:
    """Resize an RGB image of any size to a square: uint8 (resolution, resolution, 3).

    fit: "crop" keeps the middle square (answers), "pad" all of the image, with a white border (prompts). Raises
    ValueError for an image that is not RGB: load_image and to_rgb make it so.
    """
    if image.mode != "RGB":
        raise ValueError(f"preprocess takes RGB, not {image.mode}")
    return np.array({"crop": crop, "pad": pad}[fit](image, resolution))


def crop(image: Image.Image, side: int) -> Image.Image:
    """The middle square, at `side` pixels. Only that square is computed, however long the image is."""
    w, h = image.size
    short = min(w, h)
    width, height = round(w * side / short), round(h * side / short)  # of the whole image, if it were resized
    left, top = (width - side) // 2, (height - side) // 2
    # the same square in the image's own pixels
    box = (left * w / width, top * h / height, (left + side) * w / width, (top + side) * h / height)
    return lanczos(image, (side, side), box)


def pad(image: Image.Image, side: int) -> Image.Image:
    """The whole image in the middle of a white square of `side` pixels; its long side becomes `side`.

    The paper does not give the border's colour; transparency becomes white, too.
    """
    w, h = image.size
    long = max(w, h)
    width, height = max(1, round(w * side / long)), max(1, round(h * side / long))
    square = Image.new("RGB", (side, side), "white")
    square.paste(lanczos(image, (width, height), (0, 0, w, h)), ((side - width) // 2, (side - height) // 2))
    return square


def lanczos(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """Resize the part of an image inside `box` (left, top, right, bottom; fractions allowed) to `size` (width, height).

    Up to rounding, this equals resizing the whole image and cropping afterwards.
    """
    (width, height), (left, top, right, bottom) = size, box
    # Horizontally first, then vertically: Pillow's own order differs between its versions. The order matters where
    # the first pass clips an overshoot.
    across = image.resize((width, image.height), Image.Resampling.LANCZOS, box=(left, 0, right, image.height))
    return across.resize((width, height), Image.Resampling.LANCZOS, box=(0, top, width, bottom))


# ---------------------------------------------------------------------------------------------------------------------
# Pixels and codes


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, R, R, 3) -> float32 (B, 3, R, R) with 0 -> -1 and 255 -> 1, exactly.

    transformers' image processor multiplies by 0.0078 by default; its white is 0.989, and its codes differ from Meta's.
    """
    return torch.tensor(images).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """Floats (B, 3, R, R) -> uint8 (B, R, R, 3), clamped to [-1, 1] and rounded: the inverse of to_pixels."""
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round()  # 0 .. 255, still (B, 3, R, R)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


class ImageTokenizer:
    """Images in memory <-> codes, by a trained VQGAN, which is set to eval mode. Runs on the VQGAN's device."""

    def __init__(self, vqgan: VQGAN):
        self.vqgan = vqgan.eval()
        self.n_codes_per_image = vqgan.cfg.codes_per_image
        self.windows = WindowCodes(self.encode_windows, vqgan.cfg.window) if vqgan.cfg.window else None

    @property
    def can_draw(self) -> bool:
        return self.vqgan.decoder is not None

    @property
    def device(self) -> torch.device:
        return next(self.vqgan.parameters()).device

    @property
    def batch_size(self) -> int:
        """Images at a time. On a CPU 4 of the release's, since one takes 134 MB in a layer."""
        pixels = 2**20 if self.device.type == "cpu" else 2**23  # of a batch
        return min(256, max(1, pixels // self.vqgan.cfg.resolution**2))

    def encode(self, images: np.ndarray, batch_size: int | None = None) -> Tensor:
        """uint8 (B, R, R, 3) -> codes int64 (B, n) on the CPU, `batch_size` images at a time."""
        if self.windows and len(images):
            return self.windows.of_images(images)
        return self.encode_in_batches(images, batch_size or self.batch_size, self.n_codes_per_image)

    def encode_windows(self, windows: np.ndarray) -> Tensor:
        """uint8 (N, s, s, 3), each an image for the encoder -> codes int64 (N, codes in a window)."""
        n_codes, resolution = (windows.shape[1] // self.vqgan.cfg.factor) ** 2, self.vqgan.cfg.resolution
        return self.encode_in_batches(windows, self.batch_size * (resolution // windows.shape[1]) ** 2, n_codes)

    def encode_in_batches(self, images: np.ndarray, batch_size: int, n_codes: int) -> Tensor:
        """Squares of any one size -> codes int64 (B, n_codes) on the CPU, `batch_size` squares at a time."""
        # allocated outside inference mode, since autograd refuses tensors made in it
        codes = torch.empty(len(images), n_codes, dtype=torch.int64)
        with torch.inference_mode():
            for i in range(0, len(images), batch_size):
                codes[i : i + batch_size] = self.vqgan.encode(to_pixels(images[i : i + batch_size]).to(self.device))
        return codes

    def decode(self, codes: Tensor, batch_size: int | None = None) -> np.ndarray:
        """Codes (B, n) -> uint8 (B, R, R, 3), `batch_size` images at a time.

        An image that is still being drawn has fewer than n codes; its first code fills the rest, as in Chameleon's
        viewer. Raises ValueError for no codes or more than n, UserError without a decoder.
        """
        if not self.can_draw:
            raise UserError(NO_DECODER)
        n_given, n = codes.shape[1], self.n_codes_per_image
        if not 1 <= n_given <= n:
            raise ValueError(f"an image has 1 to {n} codes, not {n_given}")
        codes = torch.cat([codes, codes[:, :1].expand(-1, n - n_given)], dim=1)  # (B, n)
        with torch.inference_mode():
            parts = codes.split(batch_size or self.batch_size)
            return np.concatenate([to_images(self.vqgan.decode(part.to(self.device))) for part in parts])
