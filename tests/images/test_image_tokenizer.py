"""Images from files to codes: right colours whatever the file's kind, one sentence for what is none, exact pixels."""

import io
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import nn

from nanochameleon.config import VQGANConfig
from nanochameleon.errors import UserError
from nanochameleon.images import tokenizer as image_tokenizer
from nanochameleon.images.tokenizer import Budget, ImageTokenizer, load_image, preprocess, to_images, to_pixels
from nanochameleon.images.vqgan import VQGAN

FITS = st.sampled_from(["crop", "pad"])


def noise(h: int, w: int, channels: int = 3, seed: int = 0) -> np.ndarray:
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


def load(tmp_path, data: bytes, name: str = "x.png") -> np.ndarray:
    path = tmp_path / name
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            image = load_image(path)
        finally:
            assert not seen, [str(w.message) for w in seen]
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Colours


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_files_come_back_as_they_are(tmp_path, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(load(tmp_path, saved(Image.fromarray(noise(7, 5)), kind, **options)), noise(7, 5))


@given(st.integers(0, 255), st.tuples(*[st.integers(0, 255)] * 3))
def test_alpha_is_blended_on_white(tmp_path, alpha, colour):
    image = Image.new("RGBA", (2, 2), (*colour, alpha))
    expected = np.array(colour) * (alpha / 255) + 255 - alpha
    error = np.abs(load(tmp_path, saved(image, "PNG")) - expected).max()
    assert error == 0 if alpha in (0, 255) else error <= 0.5 + 1e-9


def test_grey_with_alpha(tmp_path):
    data = load(tmp_path, saved(Image.fromarray(np.array([[[100, 128], [100, 255], [100, 0]]], np.uint8)), "PNG"))
    assert data[0, :, 0].tolist() == [177, 100, 255]  # 100 * 128/255 + 255 * 127/255
    assert (data == data[..., :1]).all()


def palette() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image


COLOURS = [[10, 20, 30], [200, 100, 0], [0, 0, 255]]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(tmp_path, kind):
    assert load(tmp_path, saved(palette(), kind))[0].tolist() == COLOURS


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", 1), ("PNG", bytes([255, 0, 255])), ("GIF", 1)])
def test_palette_with_transparency(tmp_path, kind, transparency):
    data = load(tmp_path, saved(palette(), kind, transparency=transparency))
    assert data[0].tolist() == [COLOURS[0], [255, 255, 255], COLOURS[2]]


@pytest.mark.parametrize(("kind", "off"), [("TIFF", 0), ("JPEG", 3)])
def test_cmyk(tmp_path, kind, off):
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 255, 255, 0): (255, 0, 0), (255, 0, 0, 0): (0, 255, 255)}
    for ink, colour in (inks | {(0, 0, 0, 255): (0, 0, 0)}).items():
        data = load(tmp_path, saved(Image.new("CMYK", (8, 8), ink), kind))
        assert np.abs(data - colour).max() <= off, (ink, data[0, 0])


def grey16(kind: str, values: list[int]) -> bytes:
    if kind == "PPM":
        return b"P5 %d 1 65535\n" % len(values) + struct.pack(f">{len(values)}H", *values)
    return saved(Image.fromarray(np.array([values], np.uint16)), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@given(values=st.lists(st.integers(0, 65_535), min_size=1, max_size=9))
def test_sixteen_bits_of_grey_are_scaled(tmp_path, kind, values):
    values = [*values, 0, 255, 257, 32_768, 65_535]
    data = load(tmp_path, grey16(kind, values))
    assert data[0, -5:, 0].tolist() == [0, 1, 1, 128, 255]
    assert np.abs(data[0] - np.array(values)[:, None] / 257).max() <= 0.5


def test_sixteen_bits_with_a_transparent_grey(tmp_path):
    data = png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 1_000, 2_570), chunk(b"tRNS", struct.pack(">H", 1_000)))
    assert load(tmp_path, data)[0].tolist() == [[255] * 3, [10] * 3]


def test_sixteen_bits_of_colour(tmp_path):
    data = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 257 * 100, 65_535, 65_535, 0, 257 * 7))
    assert load(tmp_path, data)[0].tolist() == [[0, 100, 255], [255, 0, 7]]


def test_one_bit(tmp_path):
    assert load(tmp_path, png(2, 1, 1, 0, b"\0\x40"))[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_more_than_sixteen_bits_are_refused(tmp_path, mode):
    with pytest.raises(UserError, match=r"x\.png.*16 bits"):
        load(tmp_path, saved(Image.new(mode, (2, 2), 70_000), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (load(tmp_path, data) == (255, 0, 0)).all()


TURNS = {  # EXIF orientation -> from the stored image to the upright one
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
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_turns_the_image_upright(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(noise(3, 5)), kind, exif=exif, **options)
    np.testing.assert_array_equal(load(tmp_path, data), TURNS[orientation](noise(3, 5)))


@pytest.mark.parametrize(
    "exif", [b"rubbish!", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"]
)
def test_broken_exif_costs_no_image(tmp_path, exif):
    data = load(tmp_path, saved(Image.new("RGB", (8, 8), (255, 0, 0)), "JPEG", exif=b"Exif\0\0" + exif))
    assert np.abs(data - (255, 0, 0)).max() <= 3


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def exif(*entries: tuple[int, int, int, bytes], orientation: int = 6) -> bytes:
    """A block of EXIF with an orientation and entries of (tag, type, count, value or what fills its four bytes)."""
    both = sorted([(274, 3, 1, struct.pack(">HH", orientation, 0)), *entries])
    packed = b"".join(struct.pack(">HHI4s", *entry) for entry in both)
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(both)) + packed + bytes(4) + bytes(range(100))


TAGS = [11, 271, 282, 283, 296, 305, 306, 315, 316, 330, 700, 33432, 33723, 34665, 34675, 34853, 37500, 40965, 50341]
STRIPES = np.kron(noise(4, 6), np.ones((8, 8, 1), np.uint8))  # squares as JPEG stores them


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tag", TAGS)
def test_no_tag_of_any_type_costs_an_image_or_its_orientation(tmp_path, kind, tag):
    plain = saved(Image.fromarray(STRIPES), kind, **({"lossless": True} if kind == "WEBP" else {}))
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
            np.testing.assert_array_equal(data, TURNS[6](stored), err_msg=f"type {tag_type}, {count} of {value}")


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
@given(data=st.binary(max_size=60), good=st.booleans(), behind=st.booleans())
def test_no_chunk_beside_the_pixels_costs_an_image(tmp_path, kind, data, good, behind):
    extra = chunk(kind, data) if good else chunk(kind, data)[:-4] + b"none"
    pixels = noise(2, 3)
    file = png(3, 2, 8, 2, b"".join(b"\0" + row.tobytes() for row in pixels))
    place = len(file) - 12 if behind else 33
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
def test_large_texts_and_profiles_cost_no_image(tmp_path, extra):
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
def test_a_png_states_its_orientation_in_many_ways(tmp_path, extra):
    data = png(2, 1, 8, 0, bytes([0, 10, 20]), extra)
    assert load(tmp_path, data)[..., 0].tolist() == [[10], [20]]


def camera(kind: str) -> bytes:
    """A JPEG that is turned by 90 degrees as a camera or an editor says it."""
    image, block = Image.fromarray(STRIPES), Image.Exif()
    block[0x0112] = 6
    if kind == "MPO":
        return saved(image, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], exif=block)
    if kind == "XMP":
        return saved(image, "JPEG", xmp=XMP)
    return saved(image, "JPEG", exif=block, comment=b"x" * 60_000, progressive=kind == "progressive")


@pytest.mark.parametrize("kind", ["MPO", "XMP", "plain", "progressive"])
def test_photos_of_cameras_are_turned(tmp_path, kind):
    with Image.open(io.BytesIO(camera(kind))) as image:
        stored = np.asarray(image).astype(int)
    np.testing.assert_array_equal(load(tmp_path, camera(kind)), TURNS[6](stored))


def test_tags_of_one_mebibyte_each_are_not_read(tmp_path):
    """Every one of 60,000 tags states the same million bytes: Pillow would copy 60 GB."""
    entries = b"".join(struct.pack(">HHII", tag, 7, 2**20, 8) for tag in range(1_000, 61_000))
    block = b"MM\0*\0\0\0\x08" + struct.pack(">H", 60_000) + entries + bytes(2**20)
    file = png(1, 1, 8, 0, b"\0\7", chunk(b"eXIf", block[:600_000]))
    assert load(tmp_path, file).max() == 7
    with pytest.raises(UserError, match="tags"):
        load(tmp_path, block, "x.tif")


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
@given(orientation=st.integers(0, 9), height=st.sampled_from([1, 127, 128, 129, 300]))
def test_what_is_done_in_bands_equals_what_is_done_at_once(mode, orientation, height):
    image = Image.fromarray(noise(height, 5, 4)).convert("RGBA" if mode == "RGBA" else "RGB")
    image = Image.fromarray(noise(height, 5, 2).view("<u2")[..., 0]) if mode[0] == "I" else image.convert(mode)
    whole = image_tokenizer.blended(image)
    block = Image.Exif()
    block[0x0112] = orientation
    whole.info["exif"] = block.tobytes()
    expected = np.asarray(ImageOps.exif_transpose(whole))
    np.testing.assert_array_equal(np.asarray(image_tokenizer.to_rgb(image, orientation)), expected)


def test_the_budget_is_never_exceeded_and_all_get_their_turn():
    budget, sizes, taken, most = Budget(10), [1, 9, 10, 4, 6, 3, 7, 2] * 6, [], []

    def use(n: int) -> None:
        with budget.take(n):
            taken.append(n)
            most.append(sum(taken))
            time.sleep(0)
            taken.remove(n)

    threads = [threading.Thread(target=use, args=(n,)) for n in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(most) == len(sizes) and max(most) <= 10 and budget.free == 10
    with pytest.raises(ValueError), budget.take(11):
        pass


def test_webps_of_many_bytes_are_opened_one_at_a_time(tmp_path, monkeypatch):
    """Pillow reads all their bytes before it knows how many pixels they have."""
    opened, plain = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(image_tokenizer.DECODED.free) or plain(*a, **k))
    file = saved(Image.fromarray(noise(40, 40)), "WEBP", lossless=True)
    junk = b"junk" + struct.pack("<I", 2**22) + bytes(2**22)
    for data in (file, file[:4] + struct.pack("<I", len(file) - 8 + len(junk)) + file[8:] + junk):
        np.testing.assert_array_equal(load(tmp_path, data), noise(40, 40))
    assert opened == [image_tokenizer.DECODED.total, 0]
    (tmp_path / "x.webp").write_bytes(b"RIFF")
    os.truncate(tmp_path / "x.webp", 2**30)
    with pytest.raises(UserError, match="it has 1,073,741,824 bytes"):
        load_image(tmp_path / "x.webp")


def test_a_failed_image_gives_its_memory_back(tmp_path):
    for _ in range(3):
        with pytest.raises(UserError, match="broken"):
            load(tmp_path, png(4_000, 4_000, 8, 2, b"no deflate", packed=True))
    assert image_tokenizer.DECODED.free == image_tokenizer.DECODED.total


@pytest.mark.parametrize("turned", [False, True])
def test_only_a_jpeg_beyond_the_budget_is_reduced(tmp_path, monkeypatch, turned):
    block = Image.Exif()
    block[0x0112] = 6 if turned else 1
    image = Image.fromarray(np.kron(noise(4, 6), np.ones((32, 32, 1), np.uint8)))  # 192 x 128
    file, needed = saved(image, "JPEG", quality=95, exif=block), 192 * 128 * (8 if turned else 4)
    monkeypatch.setattr(image_tokenizer, "DECODED", Budget(needed))
    whole = load(tmp_path, file)
    with Image.open(io.BytesIO(file)) as stored:
        np.testing.assert_array_equal(whole, np.asarray(ImageOps.exif_transpose(stored)))
    monkeypatch.setattr(image_tokenizer, "DECODED", Budget(needed - 1))
    half = load(tmp_path, file)
    assert half.shape == (whole.shape[0] // 2, whole.shape[1] // 2, 3)
    assert np.abs(half - whole[::2, ::2]).mean() < 12
    with pytest.raises(UserError, match="too large at 193 x 128 pixels: use at most") as caught:
        load(tmp_path, saved(image.resize((193, 128)).convert("RGBA"), "PNG"))
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300


def test_a_progressive_jpeg_is_counted_with_its_coefficients(tmp_path, monkeypatch):
    file = saved(Image.fromarray(noise(128, 192)), "JPEG", progressive=True, subsampling=0)
    monkeypatch.setattr(image_tokenizer, "DECODED", Budget(192 * 128 * 6))
    with pytest.raises(UserError, match="too large"):
        load(tmp_path, file)


MEASURED = """
import sys, threading
from nanochameleon.errors import UserError
from nanochameleon.images.tokenizer import load_square

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))

def read(path):
    try:
        load_square(path, 64, "crop")
    except UserError as error:
        assert "too large" in str(error) or "16 bits" in str(error), error

load_square(sys.argv[1], 64, "crop")
before = status("VmRSS")
for path in sys.argv[2:]:
    threads = [threading.Thread(target=read, args=(path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print((status("VmHWM") - before) // 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_small_files_of_many_pixels_take_little_memory_on_three_threads(tmp_path):
    files = {
        "small.png": png(1, 1, 8, 0, b"\0\7"),
        "large.webp": saved(Image.new("RGBA", (2_500, 2_500)), "WEBP", lossless=True),
        "sixteen.png": png(3_000, 3_000, 16, 0, bytes(6_001 * 3_000)),
        "alpha.png": png(3_000, 3_000, 8, 6, bytes(12_001 * 3_000)),
        "floats.tif": saved(Image.new("F", (3_000, 3_000)), "TIFF", compression="tiff_adobe_deflate"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", MEASURED, *(str(tmp_path / name) for name in files)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 300, f"{grown} MiB"


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"a text that was renamed", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (png(0, 5, 8, 2, bytes(5)), "not an image"),
        (png(5, 0, 8, 2, b""), "not an image"),
        (saved(Image.new("RGB", (4, 4)), "ICO", sizes=[(4, 4)]), "not an image"),
        (png(4, 4, 8, 2, b"no deflate", packed=True), "broken"),
        (b"P5 4 4 255 ", "cut off"),
        # the second of each pair has no data at all: it is refused before any is asked for
        (png(20_000, 20_000, 1, 0, bytes(2_501 * 20_000)), "too large"),
        (png(20_000, 20_000, 1, 0, b"", packed=True), "too large"),
        (png(10_000, 10_000, 1, 0, bytes(1_251 * 10_000)), "too large at 10,000 x 10,000"),
        (png(8_193, 8_192, 1, 0, b"", packed=True), "too large at 8,193 x 8,192"),
        (png(1, 8_193, 1, 0, b"", packed=True), "too large at 1 x 8,193"),
        (tiff(10, 10, 8_208), "too large at 8,208 x 8,208"),
    ],
    ids=range(14),
)
def test_a_bad_file_gets_one_sentence_that_names_it(tmp_path, data, why):
    with pytest.raises(UserError, match=why) as caught:
        load(tmp_path, data, "bad one.png")
    assert str(tmp_path / "bad one.png") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_bomb_is_small_and_its_limit_is_not_too_low(tmp_path):
    assert len(png(20_000, 20_000, 1, 0, bytes(2_501 * 20_000))) < 50_000
    (tmp_path / "large.png").write_bytes(png(8_064, 6_048, 1, 0, bytes(1_009 * 6_048)))  # as a camera's 48 million
    assert load_image(tmp_path / "large.png").size == (8_064, 6_048)
    assert load(tmp_path, png(8_192, 1, 1, 0, bytes(1_025))).shape == (1, 8_192, 3)
    assert load(tmp_path, tiff(10, 10, 16)).max() == 0


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    for name in ("missing.png", ".", "pipe.png", "n" * 5_000, "a\0b"):
        with pytest.raises(UserError, match="not there or is not a file") as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(UserError, match=r"^image missing\.png "):
        load_image("missing.png")


KINDS = {
    "png": {},
    "jpeg": {},
    "jpeg progressive": {"progressive": True},
    "webp": {},
    "webp lossless": {"lossless": True},
    "gif": {},
    "bmp": {},
    "tiff": {},
    "tiff deflated": {"compression": "tiff_adobe_deflate"},
    "ppm": {},
}
FILES = {name: saved(Image.fromarray(noise(13, 17)), name.split()[0], **options) for name, options in KINDS.items()}


@pytest.mark.parametrize("kind", FILES)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_anywhere_raises_or_has_lost_no_pixel(tmp_path, kind, share):
    """A few last bytes mark the end only; nothing but UserError ever comes, and never an image that is half grey."""
    data, whole = FILES[kind], load(tmp_path, FILES[kind])
    cut = data[: int(share * len(data))]
    try:
        np.testing.assert_array_equal(load(tmp_path, cut), whole)
    except UserError as error:
        assert "x.png" in str(error) and "\n" not in str(error)
    else:
        assert len(data) - len(cut) <= 20


@pytest.mark.parametrize("kind", FILES)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8))
def test_a_file_with_wrong_bytes_raises_nothing_else(tmp_path, kind, flips):
    data = bytearray(FILES[kind])
    for place, change in flips:
        data[int(place * len(data))] ^= change
    try:
        load(tmp_path, bytes(data))
    except UserError as error:
        assert "x.png" in str(error) and "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Squares

SIDES = st.one_of(st.integers(1, 60), st.integers(1, 8_192))


@given(SIDES, st.integers(1, 40), st.booleans(), st.integers(1, 80), FITS, st.sampled_from([0, 255]))
def test_any_shape_becomes_the_square_and_a_plane_stays_exact(long, short, upright, side, fit, level):
    size = (short, long) if upright else (long, short)
    out = preprocess(Image.new("RGB", size, (level,) * 3), side, fit)
    assert out.shape == (side, side, 3) and out.dtype == np.uint8
    if fit == "crop" or level == 255:
        assert (to_pixels(out[None]) == (1.0 if level else -1.0)).all()
        return
    # padded black: all of it, in the middle, white around
    black = (out == 0).all(-1)
    expected = [max(1, round(n * side / max(size))) for n in size]
    columns, rows = np.flatnonzero(black.any(0)), np.flatnonzero(black.any(1))
    assert [len(columns), len(rows)] == expected
    assert black.sum() == expected[0] * expected[1] and (out[~black] == 255).all()
    for places in (columns, rows):
        assert abs(places[0] - (side - 1 - places[-1])) <= 1


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 50), st.integers(0, 99))
def test_crop_is_to_resize_all_and_keep_the_middle(w, h, side, seed):
    assume(max(w, h) <= 30 * min(w, h))
    image = Image.fromarray(noise(h, w, seed=seed))
    width, height = round(w * side / min(w, h)), round(h * side / min(w, h))
    whole = image.resize((width, h), Image.Resampling.LANCZOS).resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - side) // 2, (height - side) // 2
    expected = np.asarray(whole)[top : top + side, left : left + side].astype(int)
    error = np.abs(preprocess(image, side, "crop") - expected)
    assert error.max() <= 2 and error.mean() < 0.2


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_an_image_of_the_right_size_is_left_alone_and_all_is_repeatable(fit):
    image = Image.fromarray(noise(32, 32))
    np.testing.assert_array_equal(preprocess(image, 32, fit), noise(32, 32))
    other = Image.fromarray(noise(40, 70))
    np.testing.assert_array_equal(preprocess(other, 32, fit), preprocess(other, 32, fit))


@pytest.mark.parametrize("turned", [False, True])
def test_crop_keeps_the_middle_and_pad_keeps_the_ends(turned):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:40, 1] = pixels[:, 40:, 2] = 255  # red, green, blue
    pixels = pixels.swapaxes(0, 1) if turned else pixels
    crop, pad = (preprocess(Image.fromarray(pixels), 20, fit) for fit in ("crop", "pad"))
    assert (crop == (0, 255, 0)).all()
    pad = pad.swapaxes(0, 1) if turned else pad
    assert pad[10, [1, 10, 18]].argmax(-1).tolist() == [0, 1, 2]
    assert (pad[:6] == 255).all() and (pad[-6:] == 255).all()


def test_the_longest_image_at_the_releases_size_takes_no_memory():
    """Resized as a whole before cropping it would be 8192 * 512 pixels wide: 6 GB."""
    assert preprocess(Image.fromarray(noise(1, 8_192)), 512, "crop").shape == (512, 512, 3)


def test_preprocess_takes_rgb_only():
    with pytest.raises(ValueError, match="RGBA"):
        preprocess(Image.new("RGBA", (4, 4)), 4, "crop")


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def test_pixels_are_exact_at_both_ends_and_all_levels_return():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = to_pixels(levels)
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 3, 16, 16)
    assert pixels[0, 0, 0, 0] == -1 and pixels[0, 0, -1, -1] == 1
    np.testing.assert_array_equal(to_images(pixels), levels)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_to_images_inverts_to_pixels(b, side, seed):
    images = noise(b * side, side, seed=seed).reshape(b, side, side, 3)
    images.flags.writeable = False  # as in a memory map
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = to_pixels(images)
    assert pixels[b - 1, 2, side - 1, 0].item() == pytest.approx(images[b - 1, side - 1, 0, 2] / 127.5 - 1, abs=1e-6)
    np.testing.assert_array_equal(to_images(pixels), images)


def test_to_images_clamps_and_rounds():
    pixels = torch.tensor([-9.0, -1.0, 0.0, 0.6 / 127.5, 1.0, 1.5]).repeat(3, 1).view(1, 3, 1, 6)
    assert to_images(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    assert to_images(torch.tensor([99.4, 99.6, 100.4]).view(1, 3, 1, 1) / 127.5 - 1).ravel().tolist() == [
        99,
        100,
        100,
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Codes


class Stub(nn.Module):
    """A code is the red of its 2x2 patch. Notes the sizes of its batches and that nothing is recorded."""

    def __init__(self, grid: int = 2):
        super().__init__()
        self.cfg = SimpleNamespace(codes_per_image=grid * grid, resolution=2 * grid)
        self.grid, self.batches, self.decoder = grid, [], nn.Identity()
        self.weight = nn.Parameter(torch.ones(()))

    def note(self, x):
        assert torch.is_inference_mode_enabled() and not self.training
        self.batches.append(len(x))

    def encode(self, pixels):
        self.note(pixels)
        return ((pixels[:, 0, ::2, ::2] * self.weight + 1) * 127.5).round().long().flatten(1)

    def decode(self, codes):
        self.note(codes)
        patches = (codes.view(-1, 1, self.grid, self.grid) / 127.5 - 1) * self.weight
        return patches.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)


@given(st.integers(0, 7), st.integers(1, 8))
def test_codes_and_back_in_batches_of_any_size(b, batch_size):
    codes = torch.from_numpy(noise(b, 4, 1)[..., 0].astype(np.int64))
    stub = Stub()
    tokenizer = ImageTokenizer(stub)
    images = tokenizer.decode(codes, batch_size)
    assert images.shape == (b, 4, 4, 3) and images.dtype == np.uint8
    stub.batches.clear()
    again = tokenizer.encode(images, batch_size)
    assert again.dtype == torch.int64 and torch.equal(again, codes)
    assert sum(stub.batches) == b and all(n <= batch_size for n in stub.batches)


def test_codes_can_be_learnt_from():
    """They index an embedding that is trained, which autograd refuses for tensors made in inference mode."""
    codes = ImageTokenizer(Stub()).encode(noise(4, 4)[None])
    table = nn.Embedding(256, 2)
    table(codes).sum().backward()
    assert table.weight.grad[codes[0, 0]].abs().sum() > 0


@given(st.integers(1, 9))
def test_missing_codes_are_like_the_first(n_given):
    codes = torch.arange(10, 19)[None].repeat(2, 1)
    codes[1] += 100
    image = ImageTokenizer(Stub(grid=3)).decode(codes[:, :n_given])
    shown = image[:, ::2, ::2, 0].reshape(2, 9).tolist()
    for first, row in zip((10, 110), shown, strict=True):
        assert row == [first + i if i < n_given else first for i in range(9)]
    assert codes[0].tolist() == list(range(10, 19))


@pytest.mark.parametrize("n_given", [0, 5])
def test_no_codes_or_too_many_are_refused(n_given):
    with pytest.raises(ValueError, match=f"1 to 4 codes, not {n_given}"):
        ImageTokenizer(Stub()).decode(torch.zeros(1, n_given, dtype=torch.int64))


def test_the_real_network():
    """An image's codes do not hang on its batch; its pixels are those of the network, clamped."""
    torch.manual_seed(0)
    cfg = VQGANConfig(resolution=16, ch=8, ch_mult=(1, 2), z_channels=4, embed_dim=4, n_codes=32, n_groups=4)
    vqgan = VQGAN(cfg)
    tokenizer = ImageTokenizer(vqgan)
    images = noise(3 * 16, 16).reshape(3, 16, 16, 3)
    codes = tokenizer.encode(images, batch_size=2)
    assert codes.shape == (3, cfg.codes_per_image) and not vqgan.training
    assert codes.min() >= 0 and codes.max() < 32
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert (codes == alone).float().mean() > 0.98  # rounding may tip a tie
    with torch.no_grad():
        np.testing.assert_array_equal(tokenizer.decode(codes), to_images(vqgan.decode(codes)))
