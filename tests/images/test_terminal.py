"""Images in a terminal: every way of showing one carries the pixels as they were."""

import base64
import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from nanochameleon.images.terminal import as_terminal, terminal_mode


@pytest.fixture(autouse=True, scope="module")
def a_wide_terminal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        yield


images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 64), st.just(3)))


def decode_half_blocks(text):
    """The inverse, from the escape sequences alone: colours above, colours below (missing in an odd last row)."""
    rows = []
    for line in text.split("\n"):
        cells = re.findall("\x1b\\[38;2;(\\d+);(\\d+);(\\d+);(?:48;2;(\\d+);(\\d+);(\\d+)|49)m\u2580", line)
        assert line.endswith("\x1b[0m") and line.count("\u2580") == len(cells)
        rows.append([list(map(int, cell[:3])) for cell in cells])
        if cells[0][3]:
            rows.append([list(map(int, cell[3:])) for cell in cells])
    return np.array(rows, np.uint8)


@given(images)
def test_half_blocks_decode_to_the_colours_they_were_given(image):
    assert np.array_equal(decode_half_blocks(as_terminal(image, "blocks")), image)


@given(st.integers(65, 300), st.integers(1, 40))
def test_a_wide_image_is_scaled_to_64_columns_and_keeps_its_shape(width, height):
    shown = decode_half_blocks(as_terminal(np.full((height, width, 3), (9, 8, 7), np.uint8)))
    assert shown.shape == (max(1, round(height * 64 / width)), 64, 3)
    assert (shown == (9, 8, 7)).all()


@given(images, st.integers(0, 99))
def test_kitty_and_iterm_carry_the_image_enlarged(image, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (60, 60, 3), dtype=np.uint8)  # more than one kitty chunk
    for original in (image, noise):
        kitty = re.findall("\x1b_G([^;]*);([^\x1b]*)\x1b\\\\", as_terminal(original, "kitty"))
        assert all(len(chunk) <= 4096 for _, chunk in kitty)
        assert [control[-1] for control, _ in kitty] == ["1"] * (len(kitty) - 1) + ["0"]
        iterm = as_terminal(original, "iterm").removeprefix("\x1b]1337;File=inline=1;size=").removesuffix("\a")
        for data in ("".join(chunk for _, chunk in kitty), iterm.split(":")[1]):
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            scale = 256 // original.shape[1]
            assert np.array_equal(shown[::scale, ::scale], original) and shown.shape[1] == scale * original.shape[1]
        assert int(iterm.split(":")[0]) == len(base64.b64decode(iterm.split(":")[1]))


@pytest.mark.parametrize(
    ("env", "isatty", "mode"),
    [
        ({"TERM": "xterm-kitty"}, True, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, True, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, True, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, True, "iterm"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, True, "blocks"),
        ({"TERM": "xterm-256color"}, True, "blocks"),
        ({"TERM": "dumb"}, True, None),
        ({"TERM": "xterm-kitty"}, False, None),
    ],
)
def test_the_environment_decides_how_images_are_shown(env, isatty, mode):
    assert terminal_mode(env, isatty) == mode


def test_no_line_is_wider_than_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert decode_half_blocks(as_terminal(np.full((96, 96, 3), (9, 8, 7), np.uint8))).shape == (40, 40, 3)


@pytest.mark.parametrize(
    ("encoding", "mode"), [("utf-8", "blocks"), (None, "blocks"), ("ascii", None), ("latin-1", None)]
)
def test_text_that_lacks_the_block_shows_no_image(encoding, mode):
    assert terminal_mode({"TERM": "xterm"}, True, encoding) == mode
    assert terminal_mode({"TERM": "xterm-kitty"}, True, encoding) == "kitty"
