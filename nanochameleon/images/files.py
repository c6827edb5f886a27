"""Image files of any origin -> upright RGB, within a memory budget that all threads share.

    load_image(path) = open_rgb: without_metadata (metadata.py) -> Pillow -> budget -> decode -> to_rgb

A hostile file may claim billions of pixels in a few KB. So the peak memory of an image is estimated from its header,
before any pixel is decoded; an image that exceeds the budget raises UserError, and others wait for their part of it.
Left out: animation beyond the first frame, and colour profiles. Values are taken as sRGB, CMYK by its plain formula.
"""

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from nanochameleon.errors import UserError
from nanochameleon.images.metadata import exif_orientation, without_metadata, xmp_orientation

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_SIDE = 8_192  # pixels
BAND = 128  # lines of pixels that are converted at a time
BEYOND = "it has more than 16 bits a channel"
FURTHER_TAGS = 330, 34_665, 34_853, 40_965  # of a TIFF: lists of more tags
LARGE_WEBP, MAX_WEBP = 2**22, 2**26  # bytes
TRANSPOSE = {  # EXIF orientation -> the transpose that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class MemoryBudget:
    """Bytes that the threads of a process share: each takes what it needs, and waits until that much is free."""

    def __init__(self, total: int):
        self.total = self.free = total
        self.changed = threading.Condition()

    @contextmanager
    def take(self, n: int) -> Iterator[None]:
        """Raises ValueError for more than the total, which would wait for ever."""
        if n > self.total:
            raise ValueError(f"{n:,} bytes of {self.total:,}")
        with self.changed:
            self.changed.wait_for(lambda: self.free >= n)
            self.free -= n
        try:
            yield
        finally:
            with self.changed:
                self.free += n
                self.changed.notify_all()


DECODE_BUDGET = MemoryBudget(250_000_000)  # for all images that this process is decoding and resizing


def bytes_per_pixel(mode: str) -> int:
    """Bytes that Pillow holds for a pixel."""
    return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


def is_rgb(image: Image.Image) -> bool:
    return image.mode == "RGB" and not image.has_transparency_data


def peak_bytes_per_pixel(image: Image.Image, transposed: bool) -> float:
    """Peak memory of decoding and converting to RGB, in bytes a pixel; a JPEG's coefficients are not included."""
    held, result = bytes_per_pixel(image.mode), 4 if transposed or not is_rgb(image) else 0
    if image.format == "WEBP":  # its decoder keeps two canvases and returns a copy
        return held + result + 12
    if image.format == "TIFF":  # one strip may hold the whole image; and Pillow itself makes it upright
        bits = [int(n) for n in image.tag_v2.get(258, (1,))]
        return 2 * held + result + sum(bits) * int(image.tag_v2.get(277, 1)) / len(bits) / 8
    if image.format == "PPM" and image.tile[0][0] == "ppm_plain":  # numbers as text: 2 seconds for a million
        return 64
    if image.format in ("PPM", "GIF", "BMP"):  # some kinds are decoded in Python, next to the image
        return 3 * held + result
    return held + result


def jpeg_coefficient_bytes(image: Image.Image) -> float:
    """Bytes a pixel that the decoder of a JPEG in several scans holds next to the pixels; 0 for a single scan."""
    n = len(image.layer)
    image.fp.seek(-6 - 2 * n, os.SEEK_CUR)  # Pillow has read up to the end of the first scan's header
    if image.fp.read(3) == bytes([0, 6 + 2 * n, n]) and "progressive" not in image.info:
        return 0
    most = max(h for _, h, _, _ in image.layer) * max(v for _, _, v, _ in image.layer)
    return sum(2 * h * v / most for _, h, v, _ in image.layer)


def check_sides(path: str | Path, image: Image.Image) -> int:
    """The number of pixels that are decoded at once. Raises UserError for a side over the limit."""
    # a TIFF is decoded tile by tile, and a tile may be larger than the image
    tile = [int(image.tag_v2.get(tag, 0)) for tag in (322, 323)] if image.format == "TIFF" else [0, 0]
    for w, h in (image.size, tile):
        if max(w, h) > MAX_SIDE:
            raise UserError(f"image {path} is too large at {w:,} x {h:,} pixels: use at most {MAX_SIDE:,} a side")
    return max(image.width * image.height, tile[0] * tile[1])


def fit_budget(path: str | Path, image: Image.Image, transposed: bool) -> int:
    """Peak bytes of decoding an image, known from its header.

    A JPEG beyond the budget is set to be decoded at a half, a quarter or an eighth of its size. Raises UserError for an
    image that exceeds the budget all the same.
    """
    pixels, per_pixel = check_sides(path, image), peak_bytes_per_pixel(image, transposed)
    # libjpeg holds the coefficients of the full size, even where it decodes a reduced image
    coefficients = jpeg_coefficient_bytes(image) if image.format == "JPEG" else 0
    for scale in (1, 2, 4, 8) if image.format == "JPEG" else (1,):
        needed = int(pixels * (coefficients + per_pixel / scale**2))
        if needed <= DECODE_BUDGET.total:
            if scale > 1:
                image.draft(None, (image.width // scale, image.height // scale))
            return needed
    (w, h), most = image.size, int(DECODE_BUDGET.total / (coefficients + per_pixel / scale**2))
    raise UserError(f"image {path} is too large at {w:,} x {h:,} pixels: use at most {most:,} in one of this kind")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load_image(path: str | Path, data: bytes | None = None) -> Image.Image:
    """Load an image as upright RGB, from a file or from `data`, which was read from a place called `path`.

    Transparency is blended on white; an animation gives its first frame; broken metadata is ignored. A JPEG beyond the
    budget is decoded at a reduced size; other images keep theirs. Raises UserError, naming the file, for one that is
    missing, empty, cut off, broken, of another format than FORMATS, too large, or beyond 16 bits a channel.
    """
    with open_rgb(path, data) as image:
        return image


@contextmanager
def open_rgb(path: str | Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """load_image as a context: the image's part of DECODE_BUDGET is held until the end of the `with`."""
    if data is None and not os.path.isfile(path):
        raise UserError(f"image {path} is not there or is not a file")
    with ExitStack() as stack:
        with decoder_errors_named(path):
            if (os.path.getsize(path) if data is None else len(data)) == 0:
                raise UserError(f"image {path} is an empty file")
            # 1. The file without its metadata.
            file = io.BytesIO(data) if data is not None else stack.enter_context(open(path, "rb"))
            file, orientation = without_metadata(file)
            # 2. Its header, and the memory it needs.
            if needs_all := is_large_webp(file):
                stack.enter_context(DECODE_BUDGET.take(DECODE_BUDGET.total))
            source = stack.enter_context(Image.open(file, formats=FORMATS))
            if source.mode == "F":
                raise ValueError(BEYOND)
            orientation = orientation or stated_orientation(source)
            needed = fit_budget(path, source, orientation in TRANSPOSE)
            stack.enter_context(DECODE_BUDGET.take(0 if needs_all else needed))
            # 3. Its pixels.
            source.load()
            image = to_rgb(source, orientation)
            if image is not source:
                source.close()  # now: its memory must be free before its part of the budget is
        yield image


@contextmanager
def decoder_errors_named(path: str | Path) -> Iterator[None]:
    """Turn every error that a file makes a decoder raise into a UserError that names the file."""
    # Pillow warns of sizes, which fit_budget checks, and of broken metadata, which no pixel depends on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UserError:
            raise
        except UnidentifiedImageError as error:
            raise UserError(f"{path} is not an image that can be read: use one of {', '.join(FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise UserError(f"image {path} is too large: {error}") from error
        except Exception as error:  # a broken file can make a decoder raise nearly anything
            raise UserError(f"image {path} is cut off, broken or of an unknown kind: {error}") from error


def is_large_webp(file: BinaryIO) -> bool:
    """Whether opening the file takes much memory: all bytes of a WebP are read, twice, before its size is known.

    Raises ValueError for a WebP that is larger than any image.
    """
    start, size = file.read(4), file.seek(0, io.SEEK_END)
    file.seek(0)
    if start == b"RIFF" and size > MAX_WEBP:
        raise ValueError(f"it has {size:,} bytes")
    return start == b"RIFF" and size > LARGE_WEBP


def stated_orientation(image: Image.Image) -> int | None:
    """The orientation that a WebP states. Pillow itself makes a TIFF upright, and would fail on its further tags."""
    if image.format == "TIFF":
        with suppress(Exception):
            image.getexif()
        for tag in FURTHER_TAGS:
            image.getexif().pop(tag, None)
        return None
    return exif_orientation(image.info.get("exif", b"")) or xmp_orientation(image.info.get("xmp", b""))


# ---------------------------------------------------------------------------------------------------------------------
# RGB


def to_rgb(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Convert a decoded image of any mode to RGB, blended on white and upright. Raises ValueError beyond 16 bits."""
    transpose = TRANSPOSE.get(orientation)
    if is_rgb(image) and transpose is None:
        return image
    width, height = image.size
    result = Image.new("RGB", (height, width) if orientation in (5, 6, 7, 8) else (width, height))
    for top in range(0, height, BAND):  # in bands, so that the conversions between need little memory
        band = blend_on_white(image.crop((0, top, width, min(top + BAND, height))))
        start = height - top - band.height if orientation in (3, 4, 6, 7) else top
        place = (start, 0) if orientation in (5, 6, 7, 8) else (0, start)
        result.paste(band if transpose is None else band.transpose(transpose), place)
    return result


def blend_on_white(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, transparent parts blended on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = to_eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, rounded (65535 -> 255, 32768 -> 128), where Pillow's own conversion clips."""
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65_535:
        raise ValueError(BEYOND)
    result = Image.fromarray(((grey.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8))
    if "transparency" in image.info:  # PNG: one level of grey that means transparent
        result.putalpha(Image.fromarray(np.where(grey == image.info["transparency"], 0, 255).astype(np.uint8)))
    return result
