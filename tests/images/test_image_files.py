"""Image files become RGB: right colours for every kind, little memory, one sentence for a bad file."""

import io
import os
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_bytes import chunk, encoded, load, png, random_pixels, tiff
from PIL import Image, ImageOps

from nanochameleon.errors import UserError
from nanochameleon.images import files
from nanochameleon.images.files import MemoryBudget, load_image

# ---------------------------------------------------------------------------------------------------------------------
# Colours


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_files_come_back_as_they_are(tmp_path, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(
        load(tmp_path, encoded(Image.fromarray(random_pixels(7, 5)), kind, **options)), random_pixels(7, 5)
    )


@given(st.integers(0, 255), st.tuples(*[st.integers(0, 255)] * 3))
def test_alpha_is_blended_on_white(tmp_path, alpha, colour):
    image = Image.new("RGBA", (2, 2), (*colour, alpha))
    expected = np.array(colour) * (alpha / 255) + 255 - alpha
    error = np.abs(load(tmp_path, encoded(image, "PNG")) - expected).max()
    assert error == 0 if alpha in (0, 255) else error <= 0.5 + 1e-9


def test_grey_with_alpha(tmp_path):
    data = load(tmp_path, encoded(Image.fromarray(np.array([[[100, 128], [100, 255], [100, 0]]], np.uint8)), "PNG"))
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
    assert load(tmp_path, encoded(palette(), kind))[0].tolist() == COLOURS


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", 1), ("PNG", bytes([255, 0, 255])), ("GIF", 1)])
def test_palette_with_transparency(tmp_path, kind, transparency):
    data = load(tmp_path, encoded(palette(), kind, transparency=transparency))
    assert data[0].tolist() == [COLOURS[0], [255, 255, 255], COLOURS[2]]


@pytest.mark.parametrize(("kind", "off"), [("TIFF", 0), ("JPEG", 3)])
def test_cmyk(tmp_path, kind, off):
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 255, 255, 0): (255, 0, 0), (255, 0, 0, 0): (0, 255, 255)}
    for ink, colour in (inks | {(0, 0, 0, 255): (0, 0, 0)}).items():
        data = load(tmp_path, encoded(Image.new("CMYK", (8, 8), ink), kind))
        assert np.abs(data - colour).max() <= off, (ink, data[0, 0])


def grey16(kind: str, values: list[int]) -> bytes:
    if kind == "PPM":
        return b"P5 %d 1 65535\n" % len(values) + struct.pack(f">{len(values)}H", *values)
    return encoded(Image.fromarray(np.array([values], np.uint16)), kind)


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
        load(tmp_path, encoded(Image.new(mode, (2, 2), 70_000), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (load(tmp_path, data) == (255, 0, 0)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
@given(orientation=st.integers(0, 9), height=st.sampled_from([1, 127, 128, 129, 300]))
def test_converting_in_bands_equals_converting_at_once(mode, orientation, height):
    image = Image.fromarray(random_pixels(height, 5, 4)).convert("RGBA" if mode == "RGBA" else "RGB")
    image = Image.fromarray(random_pixels(height, 5, 2).view("<u2")[..., 0]) if mode[0] == "I" else image.convert(mode)
    whole = files.blend_on_white(image)
    block = Image.Exif()
    block[0x0112] = orientation
    whole.info["exif"] = block.tobytes()
    expected = np.asarray(ImageOps.exif_transpose(whole))
    np.testing.assert_array_equal(np.asarray(files.to_rgb(image, orientation)), expected)


def test_the_budget_is_never_exceeded_and_every_thread_gets_its_part():
    budget, sizes, taken, most = MemoryBudget(10), [1, 9, 10, 4, 6, 3, 7, 2] * 6, [], []

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
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(files.DECODE_BUDGET.free) or plain(*a, **k))
    file = encoded(Image.fromarray(random_pixels(40, 40)), "WEBP", lossless=True)
    junk = b"junk" + struct.pack("<I", 2**22) + bytes(2**22)
    for data in (file, file[:4] + struct.pack("<I", len(file) - 8 + len(junk)) + file[8:] + junk):
        np.testing.assert_array_equal(load(tmp_path, data), random_pixels(40, 40))
    assert opened == [files.DECODE_BUDGET.total, 0]
    (tmp_path / "x.webp").write_bytes(b"RIFF")
    os.truncate(tmp_path / "x.webp", 2**30)
    with pytest.raises(UserError, match="it has 1,073,741,824 bytes"):
        load_image(tmp_path / "x.webp")


def test_a_broken_image_gives_its_part_of_the_budget_back(tmp_path):
    for _ in range(3):
        with pytest.raises(UserError, match="broken"):
            load(tmp_path, png(4_000, 4_000, 8, 2, b"no deflate", packed=True))
    assert files.DECODE_BUDGET.free == files.DECODE_BUDGET.total


@pytest.mark.parametrize("rotated", [False, True])
def test_only_a_jpeg_beyond_the_budget_is_reduced(tmp_path, monkeypatch, rotated):
    block = Image.Exif()
    block[0x0112] = 6 if rotated else 1
    image = Image.fromarray(np.kron(random_pixels(4, 6), np.ones((32, 32, 1), np.uint8)))  # 192 x 128
    file, needed = encoded(image, "JPEG", quality=95, exif=block), 192 * 128 * (8 if rotated else 4)
    monkeypatch.setattr(files, "DECODE_BUDGET", MemoryBudget(needed))
    whole = load(tmp_path, file)
    with Image.open(io.BytesIO(file)) as stored:
        np.testing.assert_array_equal(whole, np.asarray(ImageOps.exif_transpose(stored)))
    monkeypatch.setattr(files, "DECODE_BUDGET", MemoryBudget(needed - 1))
    half = load(tmp_path, file)
    assert half.shape == (whole.shape[0] // 2, whole.shape[1] // 2, 3)
    assert np.abs(half - whole[::2, ::2]).mean() < 12
    with pytest.raises(UserError, match="too large at 193 x 128 pixels: use at most") as caught:
        load(tmp_path, encoded(image.resize((193, 128)).convert("RGBA"), "PNG"))
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300


def test_a_progressive_jpeg_is_counted_with_its_coefficients(tmp_path, monkeypatch):
    file = encoded(Image.fromarray(random_pixels(128, 192)), "JPEG", progressive=True, subsampling=0)
    monkeypatch.setattr(files, "DECODE_BUDGET", MemoryBudget(192 * 128 * 6))
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
        "large.webp": encoded(Image.new("RGBA", (2_500, 2_500)), "WEBP", lossless=True),
        "sixteen.png": png(3_000, 3_000, 16, 0, bytes(6_001 * 3_000)),
        "alpha.png": png(3_000, 3_000, 8, 6, bytes(12_001 * 3_000)),
        "floats.tif": encoded(Image.new("F", (3_000, 3_000)), "TIFF", compression="tiff_adobe_deflate"),
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
        (encoded(Image.new("RGB", (4, 4)), "ICO", sizes=[(4, 4)]), "not an image"),
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


def test_a_path_that_is_not_a_file_is_an_error(tmp_path):
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
FILES = {
    name: encoded(Image.fromarray(random_pixels(13, 17)), name.split()[0], **options) for name, options in KINDS.items()
}


@pytest.mark.parametrize("kind", FILES)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_anywhere_raises_or_has_lost_no_pixel(tmp_path, kind, fraction):
    """Only the last few bytes may be lost without harm: they mark the end. No image is ever half grey."""
    data, whole = FILES[kind], load(tmp_path, FILES[kind])
    cut = data[: int(fraction * len(data))]
    try:
        np.testing.assert_array_equal(load(tmp_path, cut), whole)
    except UserError as error:
        assert "x.png" in str(error) and "\n" not in str(error)
    else:
        assert len(data) - len(cut) <= 20


@pytest.mark.parametrize("kind", FILES)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8))
def test_a_file_with_wrong_bytes_raises_user_error_or_is_read(tmp_path, kind, flips):
    data = bytearray(FILES[kind])
    for place, change in flips:
        data[int(place * len(data))] ^= change
    try:
        load(tmp_path, bytes(data))
    except UserError as error:
        assert "x.png" in str(error) and "\n" not in str(error)
