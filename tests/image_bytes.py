"""Bytes of image files for tests: good ones made by hand, odd ones that are good, and bad ones as the web has them."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nanochameleon.images.files import load_image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: int = 32) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, *channels), np.uint8)
    return Image.fromarray(pixels, mode)


def random_pixels(h: int, w: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, channels), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(w: int, h: int, depth: int, colour: int, rows: bytes, *extra: bytes, packed: bool = False) -> bytes:
    """A PNG by hand: `rows` with a filter byte before each, deflated unless `packed`."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", rows if packed else zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + chunk(b"IEND", b"")


def tiff(w: int, h: int, tile: int) -> bytes:
    """A grey TIFF of one black, deflated tile."""
    data = zlib.compress(bytes(tile * tile), 9)
    tags = {256: w, 257: h, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8 + 2 + 120 + 4, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few KB that decodes to width x height pixels of grey."""
    packer = zlib.compressobj(9)
    rows = [packer.compress(bytes(width + 1)) for _ in range(height)]
    return png(width, height, 8, 0, b"".join(rows) + packer.flush(), packed=True)


def load(folder: Path, data: bytes, name: str = "x.png") -> np.ndarray:
    """The RGB values (H, W, 3) that load_image reads from a file of these bytes, without a warning."""
    path = folder / name
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            image = load_image(path)
        finally:
            assert not seen, [str(w.message) for w in seen]
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def bad_images() -> dict[str, bytes]:
    png, jpeg = encoded(noise()), encoded(noise(size=64), "JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty": b"",
        "words": b"this is no image",
        "a page": b"<!doctype html><title>404</title>" * 40,
        "a drawing in XML": b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>",
        "cut PNG": png[:-900],
        "cut JPEG": jpeg[: len(jpeg) // 2],
        "a flipped byte": bytes(flipped),
        "too wide": bomb(60_000, 1),
        "a decompression bomb": bomb(20_000, 20_000),
        "32 bits a channel": encoded(Image.fromarray(np.full((4, 4), 2**30, np.int32)), "TIFF"),
        "a pickle": b"\x80\x04\x95.",
    }


def odd_images() -> dict[str, bytes]:
    """Good images of unusual kinds."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    workflow = PngInfo()  # as programs that draw with models write it
    workflow.add_text("workflow", "x" * 2_000_000, zip=True)
    return {
        "one pixel": encoded(Image.new("RGB", (1, 1), "red")),
        "a line": encoded(Image.new("RGB", (3_000, 2), "red")),
        "CMYK": encoded(noise("CMYK"), "JPEG"),
        "alpha": encoded(noise("RGBA")),
        "16 bits": encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))),
        "rotated": encoded(noise(size=24), "JPEG", exif=rotated),
        "a palette": encoded(noise().quantize(7)),
        "a long text": encoded(noise(), pnginfo=workflow),
    }
