"""Pictures <-> codes: from a file to pixels to the codes of a VQGAN, and back.

    load_picture (the safe way in) -> preprocess (to a square) -> to_pixels ([-1, 1]) -> VQGAN codes -> to_pictures

Chameleon's steps: alpha blended on white, LANCZOS, centre crop for pictures that the model is to draw and border
padding for those it is shown (arXiv 2405.09818 section 3.2), then exactly [-1, 1]. Left out: the network (vqgan.py),
animation beyond the first frame, and colour profiles: numbers are taken as sRGB, CMYK by its plain formula.
"""

import io
import os
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from nanochameleon.errors import UserError
from nanochameleon.vqgan import VQGAN

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
NO_DECODER = (
    "this model has no image decoder, since it came from transformers, which drops it: it reads pictures and cannot "
    "draw them; give Meta's vqgan.ckpt with --vqgan (train.py: --init-vqgan)"
)
MAX_SIDE = 8_192  # pixels; so 67 million in all, and a photo of 48 million is taken


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load_picture(path: str | Path, data: bytes | None = None) -> Image.Image:
    """The picture in a file, or in `data` that was read from a place called `path`: upright, as RGB; alpha is blended
    on white, of an animation the first frame is taken.

    Raises UserError, naming the file, for one that is missing, empty, cut off, broken, of another format than FORMATS,
    of more than MAX_SIDE pixels a side (known from its header, before decoding), or beyond 16 bits.
    """
    if data is None and not os.path.isfile(path):
        raise UserError(f"picture {path} is not there or is not a file")
    # Pillow warns of sizes, which check_size refuses, and of broken metadata, which no pixel depends on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if (os.path.getsize(path) if data is None else len(data)) == 0:
                raise UserError(f"picture {path} is an empty file")
            with Image.open(path if data is None else io.BytesIO(data), formats=FORMATS) as picture:
                check_size(path, picture)
                picture.load()
                return to_rgb(ImageOps.exif_transpose(picture))
        except UserError:
            raise
        except UnidentifiedImageError as error:
            raise UserError(f"{path} is not a picture that can be read: use one of {', '.join(FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise UserError(f"picture {path} is too large: {error}") from error
        except Exception as error:  # a broken file can make a decoder raise nearly anything
            raise UserError(f"picture {path} is cut off, broken or of an unknown kind: {error}") from error


def check_size(path: str | Path, picture: Image.Image) -> None:
    """Raises UserError if the size that the header states is over the limit; nothing is decoded yet."""
    width, height = picture.size
    # a TIFF is decoded tile by tile, and a tile may be larger than the picture
    tile = [int(picture.tag_v2.get(tag, 0)) for tag in (322, 323)] if picture.format == "TIFF" else [0, 0]
    for w, h in ((width, height), tile):
        if max(w, h) > MAX_SIDE:
            raise UserError(f"picture {path} is too large at {w:,} x {h:,} pixels: use at most {MAX_SIDE:,} a side")


def to_rgb(picture: Image.Image) -> Image.Image:
    """A decoded picture of any mode -> RGB, transparent parts blended on white. Raises ValueError beyond 16 bits."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        picture = to_eight_bits(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey in 16 bits -> grey in 8, rounded, since Pillow's own conversion clips: 65535 -> 255, 32768 -> 128."""
    grey = np.asarray(picture).astype(np.int64)
    if picture.mode == "F" or grey.min() < 0 or grey.max() > 65_535:
        raise ValueError("it has more than 16 bits a channel")
    result = Image.fromarray(((grey * 255 + 32_767) // 65_535).astype(np.uint8))
    if "transparency" in picture.info:  # PNG: the one grey that stands for nothing
        result.putalpha(Image.fromarray(np.where(grey == picture.info["transparency"], 0, 255).astype(np.uint8)))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Squares


def lanczos(picture: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """The part of a picture inside `box` (left, top, right, bottom; fractions allowed) at `size` (width, height).

    Equal to resizing all and cropping then, up to rounding. Across first, then down: Pillow's own order has changed
    between its versions, and the order shows where the first pass clips an overshoot.
    """
    (width, height), (left, top, right, bottom) = size, box
    across = picture.resize((width, picture.height), Image.Resampling.LANCZOS, box=(left, 0, right, picture.height))
    return across.resize((width, height), Image.Resampling.LANCZOS, box=(0, top, width, bottom))


def crop(picture: Image.Image, side: int) -> Image.Image:
    """The middle square, where the short side becomes `side`. Only that square is computed, however long the other."""
    w, h = picture.size
    short = min(w, h)
    width, height = round(w * side / short), round(h * side / short)  # of the whole picture, were it resized
    left, top = (width - side) // 2, (height - side) // 2
    box = (left * w / width, top * h / height, (left + side) * w / width, (top + side) * h / height)
    return lanczos(picture, (side, side), box)


def pad(picture: Image.Image, side: int) -> Image.Image:
    """The whole picture in the middle of a square, where the long side becomes `side`, with white around it.

    The paper does not give the colour; white is what transparency becomes, too.
    """
    w, h = picture.size
    long = max(w, h)
    width, height = max(1, round(w * side / long)), max(1, round(h * side / long))
    square = Image.new("RGB", (side, side), "white")
    square.paste(lanczos(picture, (width, height), (0, 0, w, h)), ((side - width) // 2, (side - height) // 2))
    return square


def preprocess(picture: Image.Image, resolution: int, fit: Literal["crop", "pad"]) -> np.ndarray:
    """An RGB picture of any size -> uint8 (resolution, resolution, 3).

    fit: "crop" keeps the middle square (answers), "pad" all of it, with a white border (prompts). Raises ValueError
    for a picture that is not RGB: load_picture and to_rgb make it so.
    """
    if picture.mode != "RGB":
        raise ValueError(f"preprocess takes RGB, not {picture.mode}")
    return np.array({"crop": crop, "pad": pad}[fit](picture, resolution))


# ---------------------------------------------------------------------------------------------------------------------
# Pixels and codes


def to_pixels(pictures: np.ndarray, hf_compat: bool = False) -> Tensor:
    """uint8 (B, R, R, 3) -> float32 (B, 3, R, R) with 0 -> -1 and 255 -> 1, exactly.

    hf_compat: times 0.0078 less 1, as transformers' image processor does by default; white becomes 0.989, and codes
    differ from Meta's. For comparisons alone.
    """
    if hf_compat:
        return torch.tensor(pictures).permute(0, 3, 1, 2).float().contiguous() * 0.0078 - 1
    return torch.tensor(pictures).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_pictures(pixels: Tensor) -> np.ndarray:
    """Floats (B, 3, R, R) -> uint8 (B, R, R, 3), clamped to [-1, 1] and rounded: the inverse of to_pixels."""
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


class ImageTokenizer:
    """Pictures in memory <-> codes, by a trained VQGAN, which it sets to eval mode. Runs on the VQGAN's device."""

    def __init__(self, vqgan: VQGAN):
        self.vqgan = vqgan.eval()
        self.n_codes_per_image = vqgan.cfg.codes_per_image

    @property
    def can_draw(self) -> bool:
        return self.vqgan.decoder is not None

    @property
    def device(self) -> torch.device:
        return next(self.vqgan.parameters()).device

    @property
    def batch_size(self) -> int:
        """Pictures at a time: 4 of the release's on a CPU, which need 134 MB for each layer and picture."""
        pixels = 2**20 if self.device.type == "cpu" else 2**23
        return min(256, max(1, pixels // self.vqgan.cfg.resolution**2))

    def encode(self, pictures: np.ndarray, batch_size: int | None = None) -> Tensor:
        """uint8 (B, R, R, 3) -> codes int64 (B, n) on the CPU, `batch_size` pictures at a time."""
        batch_size = batch_size or self.batch_size
        # made out here, since autograd refuses tensors that were made in inference mode
        codes = torch.empty(len(pictures), self.n_codes_per_image, dtype=torch.int64)
        with torch.inference_mode():
            for i in range(0, len(pictures), batch_size):
                codes[i : i + batch_size] = self.vqgan.encode(to_pixels(pictures[i : i + batch_size]).to(self.device))
        return codes

    def decode(self, codes: Tensor, batch_size: int | None = None) -> np.ndarray:
        """Codes (B, n) -> uint8 (B, R, R, 3), `batch_size` pictures at a time.

        With fewer than n codes a picture, as while it is being drawn, the rest are taken to be like its first, as in
        Chameleon's viewer. Raises ValueError for none or more than n, UserError without a decoder.
        """
        if not self.can_draw:
            raise UserError(NO_DECODER)
        n_given, n = codes.shape[1], self.n_codes_per_image
        if not 1 <= n_given <= n:
            raise ValueError(f"a picture has 1 to {n} codes, not {n_given}")
        codes = torch.cat([codes, codes[:, :1].expand(-1, n - n_given)], dim=1)
        with torch.inference_mode():
            return np.concatenate(
                [
                    to_pictures(self.vqgan.decode(part.to(self.device)))
                    for part in codes.split(batch_size or self.batch_size)
                ]
            )
