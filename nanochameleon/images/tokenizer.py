"""Images <-> codes: from a file to pixels to the codes of a VQGAN, and back.

    load_square (the safe way in: load_image, preprocess) -> to_pixels ([-1, 1]) -> VQGAN codes -> to_images

Chameleon's steps: alpha blended on white, LANCZOS, centre crop for images that the model is to draw and border
padding for those it is shown (arXiv 2405.09818 section 3.2), then exactly [-1, 1]. Left out: the network (vqgan.py),
animation beyond the first frame, and colour profiles: numbers are taken as sRGB, CMYK by its plain formula.
"""

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from nanochameleon.errors import UserError
from nanochameleon.images.files import is_large_webp, of_exif, of_xmp, without_metadata
from nanochameleon.images.vqgan import VQGAN

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
NO_DECODER = (
    "this model has no image decoder, since it came from transformers, which drops it: it reads images and cannot "
    "draw them; give Meta's vqgan.ckpt with --vqgan (train.py: --init-vqgan)"
)
MAX_SIDE = 8_192  # pixels
BAND = 128  # rows that are converted at a time
BEYOND = "it has more than 16 bits a channel"
FURTHER_TAGS = 330, 34_665, 34_853, 40_965  # of a TIFF: lists of more tags
TURNS = {  # EXIF orientation -> what makes it upright
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


class Budget:
    """Bytes that the threads of a process share: each takes what it needs, and waits until so much is free."""

    def __init__(self, total: int):
        self.total = self.free = total
        self.changed = threading.Condition()

    @contextmanager
    def take(self, n: int) -> Iterator[None]:
        """Raises ValueError for more than there are in all, which would wait for ever."""
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


DECODED = Budget(250_000_000)  # bytes of the images that are being decoded and resized in this process


def bytes_per_pixel(mode: str) -> int:
    """What Pillow holds for a pixel."""
    return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


def is_rgb(image: Image.Image) -> bool:
    return image.mode == "RGB" and not image.has_transparency_data


def peak_per_pixel(image: Image.Image, turned: bool) -> float:
    """The most bytes a pixel that decoding and the RGB made of it take, a JPEG's coefficients aside."""
    held, result = bytes_per_pixel(image.mode), 4 if turned or not is_rgb(image) else 0
    if image.format == "WEBP":  # its decoder keeps two canvases and hands out a copy
        return held + result + 12
    if image.format == "TIFF":  # a strip may be all of it; and Pillow turns it itself
        bits = [int(n) for n in image.tag_v2.get(258, (1,))]
        return 2 * held + result + sum(bits) * int(image.tag_v2.get(277, 1)) / len(bits) / 8
    if image.format == "PPM" and image.tile[0][0] == "ppm_plain":  # numbers as text: 2 seconds for a million
        return 64
    if image.format in ("PPM", "GIF", "BMP"):  # some kinds are decoded in Python, beside the image
        return 3 * held + result
    return held + result


def coefficients(image: Image.Image) -> float:
    """Bytes a pixel that the decoder of a JPEG in several scans holds beside the pixels; 0 where one scan has all."""
    n = len(image.layer)
    image.fp.seek(-6 - 2 * n, os.SEEK_CUR)  # Pillow has read up to the end of the first scan's header
    if image.fp.read(3) == bytes([0, 6 + 2 * n, n]) and "progressive" not in image.info:
        return 0
    most = max(h for _, h, _, _ in image.layer) * max(v for _, _, v, _ in image.layer)
    return sum(2 * h * v / most for _, h, v, _ in image.layer)


def check_sides(path: str | Path, image: Image.Image) -> int:
    """How many pixels are decoded at once. Raises UserError for a side over the limit."""
    # a TIFF is decoded tile by tile, and a tile may be larger than the image
    tile = [int(image.tag_v2.get(tag, 0)) for tag in (322, 323)] if image.format == "TIFF" else [0, 0]
    for w, h in (image.size, tile):
        if max(w, h) > MAX_SIDE:
            raise UserError(f"image {path} is too large at {w:,} x {h:,} pixels: use at most {MAX_SIDE:,} a side")
    return max(image.width * image.height, tile[0] * tile[1])


def fit_budget(path: str | Path, image: Image.Image, turned: bool) -> int:
    """How many bytes an image takes at most, known from its header. Sets a JPEG beyond DECODED to be decoded at a
    half, a quarter or an eighth of its size. Raises UserError if it takes more than DECODED all the same."""
    pixels, per_pixel = check_sides(path, image), peak_per_pixel(image, turned)
    kept = coefficients(image) if image.format == "JPEG" else 0  # of all, even of one that is reduced
    for scale in (1, 2, 4, 8) if image.format == "JPEG" else (1,):
        needed = int(pixels * (kept + per_pixel / scale**2))
        if needed <= DECODED.total:
            if scale > 1:
                image.draft(None, (image.width // scale, image.height // scale))
            return needed
    (w, h), most = image.size, int(DECODED.total / (kept + per_pixel / scale**2))
    raise UserError(f"image {path} is too large at {w:,} x {h:,} pixels: use at most {most:,} in one of this kind")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load_image(path: str | Path, data: bytes | None = None) -> Image.Image:
    """The image in a file, or in `data` that was read from a place called `path`: upright, as RGB; alpha is blended
    on white, of an animation the first frame is taken. Metadata that is broken is passed over.

    A JPEG whose pixels would take more than DECODED has is decoded at a half, a quarter or an eighth of its size; all
    other images keep theirs. Raises UserError, naming the file, for one that is missing, empty, cut off, broken, of
    another format than FORMATS, too large (known from its header, before decoding), or beyond 16 bits.
    """
    with decoded(path, data) as image:
        return image


def load_square(
    path: str | Path, resolution: int, fit: Literal["crop", "pad"], data: bytes | None = None
) -> np.ndarray:
    """preprocess(load_image(path, data), resolution, fit): uint8 (resolution, resolution, 3).

    However many threads call it, their images take no more memory at a time than DECODED has. Raises UserError as
    load_image does.
    """
    with decoded(path, data) as image:
        square = preprocess(image, resolution, fit)
        image.close()
        return square


@contextmanager
def decoded(path: str | Path, data: bytes | None) -> Iterator[Image.Image]:
    """load_image, with its part of DECODED taken until the end of the `with`."""
    if data is None and not os.path.isfile(path):
        raise UserError(f"image {path} is not there or is not a file")
    with ExitStack() as stack:
        with named(path):
            if (os.path.getsize(path) if data is None else len(data)) == 0:
                raise UserError(f"image {path} is an empty file")
            file = io.BytesIO(data) if data is not None else stack.enter_context(open(path, "rb"))
            file, orientation = without_metadata(file)
            if alone := is_large_webp(file):
                stack.enter_context(DECODED.take(DECODED.total))
            source = stack.enter_context(Image.open(file, formats=FORMATS))
            if source.mode == "F":
                raise ValueError(BEYOND)
            orientation = orientation or stated_orientation(source)
            needed = fit_budget(path, source, orientation in TURNS)
            stack.enter_context(DECODED.take(0 if alone else needed))
            source.load()
            image = to_rgb(source, orientation)
            if image is not source:
                source.close()  # at once: its memory is given back before its part of the budget
        yield image


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Whatever a file makes a decoder raise becomes a UserError that names the file."""
    # Pillow warns of sizes, which fit_budget looks at, and of broken metadata, which no pixel depends on
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


def stated_orientation(image: Image.Image) -> int | None:
    """What a WebP states. A TIFF is turned by Pillow, which would fail on the lists of tags behind its first one."""
    if image.format == "TIFF":
        with suppress(Exception):
            image.getexif()
        for tag in FURTHER_TAGS:
            image.getexif().pop(tag, None)
        return None
    return of_exif(image.info.get("exif", b"")) or of_xmp(image.info.get("xmp", b""))


def to_rgb(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """A decoded image of any mode -> RGB, transparent parts blended on white, made upright from an orientation of
    EXIF. Raises ValueError beyond 16 bits."""
    turn = TURNS.get(orientation)
    if is_rgb(image) and turn is None:
        return image
    width, height = image.size
    result = Image.new("RGB", (height, width) if orientation in (5, 6, 7, 8) else (width, height))
    for top in range(0, height, BAND):  # in bands, so that the steps between take no memory
        band = blended(image.crop((0, top, width, min(top + BAND, height))))
        start = height - top - band.height if orientation in (3, 4, 6, 7) else top
        place = (start, 0) if orientation in (5, 6, 7, 8) else (0, start)
        result.paste(band if turn is None else band.transpose(turn), place)
    return result


def blended(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, transparent parts blended on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = to_eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey in 16 bits -> grey in 8, rounded, since Pillow's own conversion clips: 65535 -> 255, 32768 -> 128."""
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65_535:
        raise ValueError(BEYOND)
    result = Image.fromarray(((grey.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8))
    if "transparency" in image.info:  # PNG: the one grey that stands for nothing
        result.putalpha(Image.fromarray(np.where(grey == image.info["transparency"], 0, 255).astype(np.uint8)))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Squares


def lanczos(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """The part of an image inside `box` (left, top, right, bottom; fractions allowed) at `size` (width, height).

    Equal to resizing all and cropping then, up to rounding. Across first, then down: Pillow's own order has changed
    between its versions, and the order shows where the first pass clips an overshoot.
    """
    (width, height), (left, top, right, bottom) = size, box
    across = image.resize((width, image.height), Image.Resampling.LANCZOS, box=(left, 0, right, image.height))
    return across.resize((width, height), Image.Resampling.LANCZOS, box=(0, top, width, bottom))


def crop(image: Image.Image, side: int) -> Image.Image:
    """The middle square, where the short side becomes `side`. Only that square is computed, however long the other."""
    w, h = image.size
    short = min(w, h)
    width, height = round(w * side / short), round(h * side / short)  # of the whole image, were it resized
    left, top = (width - side) // 2, (height - side) // 2
    box = (left * w / width, top * h / height, (left + side) * w / width, (top + side) * h / height)
    return lanczos(image, (side, side), box)


def pad(image: Image.Image, side: int) -> Image.Image:
    """The whole image in the middle of a square, where the long side becomes `side`, with white around it.

    The paper does not give the colour; white is what transparency becomes, too.
    """
    w, h = image.size
    long = max(w, h)
    width, height = max(1, round(w * side / long)), max(1, round(h * side / long))
    square = Image.new("RGB", (side, side), "white")
    square.paste(lanczos(image, (width, height), (0, 0, w, h)), ((side - width) // 2, (side - height) // 2))
    return square


def preprocess(image: Image.Image, resolution: int, fit: Literal["crop", "pad"]) -> np.ndarray:
    """An RGB image of any size -> uint8 (resolution, resolution, 3).

    fit: "crop" keeps the middle square (answers), "pad" all of it, with a white border (prompts). Raises ValueError
    for an image that is not RGB: load_image and to_rgb make it so.
    """
    if image.mode != "RGB":
        raise ValueError(f"preprocess takes RGB, not {image.mode}")
    return np.array({"crop": crop, "pad": pad}[fit](image, resolution))


# ---------------------------------------------------------------------------------------------------------------------
# Pixels and codes


def to_pixels(images: np.ndarray, hf_compat: bool = False) -> Tensor:
    """uint8 (B, R, R, 3) -> float32 (B, 3, R, R) with 0 -> -1 and 255 -> 1, exactly.

    hf_compat: times 0.0078 less 1, as transformers' image processor does by default; white becomes 0.989, and codes
    differ from Meta's. For comparisons alone.
    """
    if hf_compat:
        return torch.tensor(images).permute(0, 3, 1, 2).float().contiguous() * 0.0078 - 1
    return torch.tensor(images).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """Floats (B, 3, R, R) -> uint8 (B, R, R, 3), clamped to [-1, 1] and rounded: the inverse of to_pixels."""
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


class ImageTokenizer:
    """Images in memory <-> codes, by a trained VQGAN, which it sets to eval mode. Runs on the VQGAN's device."""

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
        """Images at a time: 4 of the release's on a CPU, which need 134 MB for each layer and image."""
        pixels = 2**20 if self.device.type == "cpu" else 2**23
        return min(256, max(1, pixels // self.vqgan.cfg.resolution**2))

    def encode(self, images: np.ndarray, batch_size: int | None = None) -> Tensor:
        """uint8 (B, R, R, 3) -> codes int64 (B, n) on the CPU, `batch_size` images at a time."""
        batch_size = batch_size or self.batch_size
        # made out here, since autograd refuses tensors that were made in inference mode
        codes = torch.empty(len(images), self.n_codes_per_image, dtype=torch.int64)
        with torch.inference_mode():
            for i in range(0, len(images), batch_size):
                codes[i : i + batch_size] = self.vqgan.encode(to_pixels(images[i : i + batch_size]).to(self.device))
        return codes

    def decode(self, codes: Tensor, batch_size: int | None = None) -> np.ndarray:
        """Codes (B, n) -> uint8 (B, R, R, 3), `batch_size` images at a time.

        With fewer than n codes an image, as while it is being drawn, the rest are taken to be like its first, as in
        Chameleon's viewer. Raises ValueError for none or more than n, UserError without a decoder.
        """
        if not self.can_draw:
            raise UserError(NO_DECODER)
        n_given, n = codes.shape[1], self.n_codes_per_image
        if not 1 <= n_given <= n:
            raise ValueError(f"an image has 1 to {n} codes, not {n_given}")
        codes = torch.cat([codes, codes[:, :1].expand(-1, n - n_given)], dim=1)
        with torch.inference_mode():
            return np.concatenate(
                [
                    to_images(self.vqgan.decode(part.to(self.device)))
                    for part in codes.split(batch_size or self.batch_size)
                ]
            )
