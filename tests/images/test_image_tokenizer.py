"""Squares, pixels and codes: exact at both ends, and inverses of each other."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from image_bytes import random_pixels
from PIL import Image
from torch import nn

from nanochameleon.config import VQGANConfig
from nanochameleon.images import windows
from nanochameleon.images.tokenizer import ImageTokenizer, preprocess, to_images, to_pixels
from nanochameleon.images.vqgan import VQGAN

FITS = st.sampled_from(["crop", "pad"])

# ---------------------------------------------------------------------------------------------------------------------
# Squares

SIDES = st.one_of(st.integers(1, 60), st.integers(1, 8_192))


@given(SIDES, st.integers(1, 40), st.booleans(), st.integers(1, 80), FITS, st.sampled_from([0, 255]))
def test_an_image_of_any_shape_becomes_a_square_and_one_colour_stays_exact(long, short, upright, side, fit, level):
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
def test_crop_equals_resizing_all_and_keeping_the_middle(w, h, side, seed):
    assume(max(w, h) <= 30 * min(w, h))
    image = Image.fromarray(random_pixels(h, w, seed=seed))
    width, height = round(w * side / min(w, h)), round(h * side / min(w, h))
    whole = image.resize((width, h), Image.Resampling.LANCZOS).resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - side) // 2, (height - side) // 2
    expected = np.asarray(whole)[top : top + side, left : left + side].astype(int)
    error = np.abs(preprocess(image, side, "crop") - expected)
    assert error.max() <= 2 and error.mean() < 0.2


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_an_image_of_the_right_size_is_not_changed_and_preprocessing_is_repeatable(fit):
    image = Image.fromarray(random_pixels(32, 32))
    np.testing.assert_array_equal(preprocess(image, 32, fit), random_pixels(32, 32))
    other = Image.fromarray(random_pixels(40, 70))
    np.testing.assert_array_equal(preprocess(other, 32, fit), preprocess(other, 32, fit))


@pytest.mark.parametrize("rotated", [False, True])
def test_crop_keeps_the_middle_and_pad_keeps_the_ends(rotated):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:40, 1] = pixels[:, 40:, 2] = 255  # red, green, blue
    pixels = pixels.swapaxes(0, 1) if rotated else pixels
    crop, pad = (preprocess(Image.fromarray(pixels), 20, fit) for fit in ("crop", "pad"))
    assert (crop == (0, 255, 0)).all()
    pad = pad.swapaxes(0, 1) if rotated else pad
    assert pad[10, [1, 10, 18]].argmax(-1).tolist() == [0, 1, 2]
    assert (pad[:6] == 255).all() and (pad[-6:] == 255).all()


def test_the_longest_image_at_the_releases_size_takes_no_memory():
    """Resized as a whole before cropping it would be 8192 * 512 pixels wide: 6 GB."""
    assert preprocess(Image.fromarray(random_pixels(1, 8_192)), 512, "crop").shape == (512, 512, 3)


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
    images = random_pixels(b * side, side, seed=seed).reshape(b, side, side, 3)
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
        self.cfg = SimpleNamespace(codes_per_image=grid * grid, resolution=2 * grid, window=None)
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
    codes = torch.from_numpy(random_pixels(b, 4, 1)[..., 0].astype(np.int64))
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
    codes = ImageTokenizer(Stub()).encode(random_pixels(4, 4)[None])
    table = nn.Embedding(256, 2)
    table(codes).sum().backward()
    assert table.weight.grad[codes[0, 0]].abs().sum() > 0


@given(st.integers(1, 9))
def test_the_first_code_stands_for_missing_ones(n_given):
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
    """An image's codes do not depend on its batch; its pixels are those of the network, clamped."""
    torch.manual_seed(0)
    cfg = VQGANConfig(resolution=16, ch=8, ch_mult=(1, 2), z_channels=4, embed_dim=4, n_codes=32, n_groups=4)
    vqgan = VQGAN(cfg)
    tokenizer = ImageTokenizer(vqgan)
    images = random_pixels(3 * 16, 16).reshape(3, 16, 16, 3)
    codes = tokenizer.encode(images, batch_size=2)
    assert codes.shape == (3, cfg.codes_per_image) and not vqgan.training
    assert codes.min() >= 0 and codes.max() < 32
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert (codes == alone).float().mean() > 0.98  # rounding may tip a tie
    with torch.no_grad():
        np.testing.assert_array_equal(tokenizer.decode(codes), to_images(vqgan.decode(codes)))


@given(st.data())
def test_codes_of_windows_are_looked_up_and_stay_those_of_the_network(data):
    """Whatever came before, and when so many windows are known that they are forgotten."""
    side = data.draw(st.sampled_from([4, 8, 16]))
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(
        resolution=16, ch=4, ch_mult=(1, 1), n_res_blocks=1, z_channels=4, embed_dim=4, n_codes=32, n_groups=2,
        mid_attention=False, window=side,
    ))  # fmt: skip
    tokenizer, encoded = ImageTokenizer(vqgan), []
    tokenizer.windows.encode = lambda windows: encoded.append(windows) or tokenizer.encode_windows(windows)
    with pytest.MonkeyPatch.context() as patch:
        most = data.draw(st.sampled_from([0, 3, 10**6]))
        patch.setattr(windows, "KNOWN_BYTES", most * 3 * side**2)
        for numbers in data.draw(st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=3)):
            images = np.array([random_pixels(16, 16, seed=n) for n in numbers], np.uint8).reshape(-1, 16, 16, 3)
            codes = tokenizer.encode(images)
            assert codes.shape == (len(numbers), 64) and codes.dtype == torch.int64
            with torch.no_grad():
                expected = [vqgan.encode(to_pixels(image[None])) for image in images]
            assert all((row == alone).float().mean() > 0.96 for row, alone in zip(codes, expected, strict=True))
    seen = [window.tobytes() for part in encoded for window in part]
    assert most < 10**6 or len(seen) == len(set(seen))  # each different window is encoded once
