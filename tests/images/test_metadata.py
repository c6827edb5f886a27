"""Metadata: an image is read whatever is next to its pixels, and made upright as its metadata states."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_bytes import chunk, encoded, load, png, random_pixels
from PIL import Image

from nanochameleon.errors import UserError

UPRIGHT = {  # EXIF orientation -> from the stored pixels to the upright ones
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_makes_the_image_upright(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(random_pixels(3, 5)), kind, exif=exif, **options)
    np.testing.assert_array_equal(load(tmp_path, data), UPRIGHT[orientation](random_pixels(3, 5)))


@pytest.mark.parametrize(
    "exif", [b"rubbish!", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"]
)
def test_an_image_with_broken_exif_is_read(tmp_path, exif):
    data = load(tmp_path, encoded(Image.new("RGB", (8, 8), (255, 0, 0)), "JPEG", exif=b"Exif\0\0" + exif))
    assert np.abs(data - (255, 0, 0)).max() <= 3


def exif(*entries: tuple[int, int, int, bytes], orientation: int = 6) -> bytes:
    """A block of EXIF with an orientation and entries of (tag, type, count, value or what fills its four bytes)."""
    both = sorted([(274, 3, 1, struct.pack(">HH", orientation, 0)), *entries])
    packed = b"".join(struct.pack(">HHI4s", *entry) for entry in both)
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(both)) + packed + bytes(4) + bytes(range(100))


TAGS = [11, 271, 282, 283, 296, 305, 306, 315, 316, 330, 700, 33432, 33723, 34665, 34675, 34853, 37500, 40965, 50341]
STRIPES = np.kron(random_pixels(4, 6), np.ones((8, 8, 1), np.uint8))  # squares as JPEG stores them


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tag", TAGS)
def test_an_image_is_read_upright_whatever_its_other_tags_are(tmp_path, kind, tag):
    plain = encoded(Image.fromarray(STRIPES), kind, **({"lossless": True} if kind == "WEBP" else {}))
    stored = np.asarray(Image.open(io.BytesIO(plain))).astype(int)
    for tag_type in range(20):
        for count, value in (
            (1, b"\0\0\0\1"),
            (0, bytes(4)),
            (1, b"\0\0\0\x26"),
            (9, b"\xff" * 4),
            (2**32 - 1, b"\0\0\0\x08"),
        ):
            block = exif((tag, tag_type, count, value))
            data = load(tmp_path, with_exif(plain, kind, block))
            np.testing.assert_array_equal(data, UPRIGHT[6](stored), err_msg=f"type {tag_type}, {count} of {value}")


def with_exif(file: bytes, kind: str, block: bytes) -> bytes:
    """The file with a block of EXIF, put in by hand, since Pillow refuses to write most."""
    if kind == "JPEG":
        return file[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + file[2:]
    if kind == "PNG":
        return file[:33] + chunk(b"eXIf", block) + file[33:]
    block += bytes(len(block) % 2)
    w, h = Image.open(io.BytesIO(file)).size
    header = b"VP8X" + struct.pack("<IB3x", 10, 8) + (w - 1).to_bytes(3, "little") + (h - 1).to_bytes(3, "little")
    parts = b"WEBP" + header + file[12:] + b"EXIF" + struct.pack("<I", len(block)) + block
    return b"RIFF" + struct.pack("<I", len(parts)) + parts


ANCILLARY = (
    b"eXIf tEXt zTXt iTXt iCCP sRGB gAMA cHRM pHYs sBIT bKGD hIST tIME sPLT acTL fcTL fdAT vpAg prVt oFFs".split()
)


@pytest.mark.parametrize("kind", ANCILLARY)
@given(data=st.binary(max_size=60), good=st.booleans(), at_end=st.booleans())
def test_an_image_is_read_whatever_its_other_chunks_are(tmp_path, kind, data, good, at_end):
    extra = chunk(kind, data) if good else chunk(kind, data)[:-4] + b"none"
    pixels = random_pixels(2, 3)
    file = png(3, 2, 8, 2, b"".join(b"\0" + row.tobytes() for row in pixels))
    place = len(file) - 12 if at_end else 33
    np.testing.assert_array_equal(load(tmp_path, file[:place] + extra + file[place:]), pixels)


def text_chunk(keyword: bytes, text: bytes) -> bytes:
    return chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text))


@pytest.mark.parametrize(
    "extra",
    [
        text_chunk(b"workflow", b"x" * 2_000_000),
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
        chunk(b"tEXt", b"parameters\0" + b"x" * 2_000_000),
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2_000_000))),
        text_chunk(b"a", b"x" * 900_000) * 80,
        chunk(b"tRNS", b"\0\1")[:-4] + b"none",
    ],
    ids=["text", "packed", "plain", "profile", "many", "transparency with a wrong checksum"],
)
def test_an_image_with_large_texts_or_profiles_is_read(tmp_path, extra):
    assert load(tmp_path, png(1, 1, 8, 2, bytes([0, 7, 8, 9]), extra))[0, 0].tolist() == [7, 8, 9]


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
RAW = b"\nexif\n%8d\n" % len(exif()) + exif().hex().encode() + b"\n"


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"eXIf", b"Exif\0\0Exif\0\0" + exif()),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(XMP)),
        text_chunk(b"Raw profile type exif", RAW),
        chunk(b"tEXt", b"Raw profile type exif\0" + RAW),
    ],
)
def test_a_png_may_state_its_orientation_in_many_ways(tmp_path, extra):
    data = png(2, 1, 8, 0, bytes([0, 10, 20]), extra)
    assert load(tmp_path, data)[..., 0].tolist() == [[10], [20]]


def camera(kind: str) -> bytes:
    """A JPEG that is rotated by 90 degrees, as a camera or an editor states it."""
    image, block = Image.fromarray(STRIPES), Image.Exif()
    block[0x0112] = 6
    if kind == "MPO":
        return encoded(image, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], exif=block)
    if kind == "XMP":
        return encoded(image, "JPEG", xmp=XMP)
    return encoded(image, "JPEG", exif=block, comment=b"x" * 60_000, progressive=kind == "progressive")


@pytest.mark.parametrize("kind", ["MPO", "XMP", "plain", "progressive"])
def test_photos_of_cameras_become_upright(tmp_path, kind):
    with Image.open(io.BytesIO(camera(kind))) as image:
        stored = np.asarray(image).astype(int)
    np.testing.assert_array_equal(load(tmp_path, camera(kind)), UPRIGHT[6](stored))


def test_overlapping_tags_of_one_mebibyte_each_are_refused(tmp_path):
    """Every one of 60,000 tags states the same million bytes: Pillow would copy 60 GB."""
    entries = b"".join(struct.pack(">HHII", tag, 7, 2**20, 8) for tag in range(1_000, 61_000))
    block = b"MM\0*\0\0\0\x08" + struct.pack(">H", 60_000) + entries + bytes(2**20)
    file = png(1, 1, 8, 0, b"\0\7", chunk(b"eXIf", block[:600_000]))
    assert load(tmp_path, file).max() == 7
    with pytest.raises(UserError, match="tags"):
        load(tmp_path, block, "x.tif")
