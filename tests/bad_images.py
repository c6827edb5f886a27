"""Images as the web has them: kinds that no decoder may be let loose on, and odd ones that are good."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: int = 32) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, *channels), np.uint8)
    return Image.fromarray(pixels, mode)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few KB that decodes to width x height pixels of grey."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), []
    for _ in range(height):
        rows.append(packer.compress(bytes(width + 1)))
    data = b"".join(rows) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


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
    """Good ones."""
    turned = Image.Exif()
    turned[0x0112] = 6
    workflow = PngInfo()  # as programs that draw with models write it
    workflow.add_text("workflow", "x" * 2_000_000, zip=True)
    return {
        "one pixel": encoded(Image.new("RGB", (1, 1), "red")),
        "a line": encoded(Image.new("RGB", (3_000, 2), "red")),
        "CMYK": encoded(noise("CMYK"), "JPEG"),
        "alpha": encoded(noise("RGBA")),
        "16 bits": encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))),
        "turned": encoded(noise(size=24), "JPEG", exif=turned),
        "a palette": encoded(noise().quantize(7)),
        "a long text": encoded(noise(), pnginfo=workflow),
    }
