"""The image tokenizer's network: the release's layout, and what a code may depend on."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.config import VQGANConfig
from nanochameleon.images.vqgan import VQGAN, join_windows, split_windows

TINY = VQGANConfig(
    resolution=16, ch=8, ch_mult=(1, 2, 2), n_res_blocks=1, z_channels=6, embed_dim=5, n_codes=12, n_groups=4,
    mid_attention=True,
)  # fmt: skip


def tiny(**changes) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(dataclasses.replace(TINY, **changes)).eval()


def test_the_release_has_its_number_of_parameters_and_its_names():
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig())
    names = {name: tuple(p.shape) for name, p in vqgan.named_parameters()}
    assert sum(p.numel() for p in vqgan.parameters()) == 68_718_467
    expected = {
        "quantize.embedding.weight": (8_192, 256),
        "quant_conv.weight": (256, 256, 1, 1),
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.0.downsample.conv.bias": (128,),
        "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.mid.block_2.norm1.weight": (512,),
        "decoder.up.4.block.2.conv2.weight": (512, 512, 3, 3),
        "decoder.up.1.upsample.conv.weight": (128, 128, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: names.get(name) for name in expected} == expected
    assert "decoder.up.0.upsample.conv.weight" not in names and "encoder.down.4.downsample.conv.weight" not in names
    assert len(vqgan.state_dict()) == len(names)  # training's moving averages are not part of a file


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_join_inverts_cut_and_windows_are_in_raster_order(b, c, across, side):
    x = torch.arange(b * c * (across * side) ** 2).view(b, c, across * side, across * side)
    windows = split_windows(x, side)
    assert torch.equal(join_windows(windows, across), x)
    for n, window in enumerate(windows):
        image, place = divmod(n, across**2)
        row, column = (side * i for i in divmod(place, across))
        assert torch.equal(window, x[image, :, row : row + side, column : column + side])


@pytest.mark.parametrize("window", [None, 4, 8, 16])
def test_shapes_from_pixels_to_codes_and_back(window):
    vqgan = tiny(window=window)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    reconstruction, latents, quantized, codes = vqgan(pixels)
    assert reconstruction.shape == pixels.shape and latents.shape == quantized.shape == (2, 5, 4, 4)
    assert codes.shape == (2, 16) and torch.equal(codes, vqgan.encode(pixels))
    torch.testing.assert_close(vqgan.decode(codes), reconstruction, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 1_000))
def test_with_a_window_a_code_depends_on_its_own_pixels_alone(row, column, seed):
    vqgan = tiny(window=4)
    torch.manual_seed(seed)
    pixels, other = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    here = (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
    other[here] = pixels[here]
    first, second = vqgan.latents(pixels), vqgan.latents(other)
    torch.testing.assert_close(first[..., row, column], second[..., row, column], rtol=1e-4, atol=1e-5)
    changed = (first - second).abs().amax(1)[0] > 1e-3
    assert changed.sum() == 15 and not changed[row, column]


def test_without_a_window_every_code_sees_the_whole_image():
    vqgan = tiny()
    pixels = torch.rand(1, 3, 16, 16)
    other = pixels.clone()
    other[..., 0, 0] = -1
    assert ((vqgan.latents(pixels) - vqgan.latents(other)).abs().amax(1) > 0).all()


def test_equal_windows_get_equal_codes_wherever_they_stand():
    vqgan = tiny(window=4)
    pixels = (torch.rand(1, 3, 4, 4) * 2 - 1).repeat(2, 1, 4, 4)
    assert len(vqgan.encode(pixels).unique()) == 1


def test_the_encoder_reads_a_multiple_of_64_windows_and_the_codes_do_not_depend_on_the_filling():
    """torch compiles every convolution for each number of images that it meets: 12 of 94 ms of a training step."""
    vqgan, seen = tiny(window=4), []
    vqgan.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    pixels = torch.rand(9, 3, 16, 16) * 2 - 1
    alone = torch.cat([vqgan.encode(image[None]) for image in pixels])
    assert torch.equal(vqgan.encode(pixels), alone)
    assert seen == [64] * 9 + [192]  # 16 windows each, and 144


@pytest.mark.parametrize("window", [None, 8])
def test_the_reconstruction_teaches_every_parameter_but_the_codebook(window):
    vqgan = tiny(window=window)
    vqgan(torch.rand(2, 3, 16, 16))[0].square().sum().backward()
    without = {name for name, p in vqgan.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"quantize.embedding.weight"}


@pytest.mark.parametrize("changes", [dict(resolution=18), dict(window=6), dict(window=5), dict(window=32)])
def test_sizes_that_do_not_divide_are_refused(changes):
    with pytest.raises(ValueError, match="divide"):
        dataclasses.replace(TINY, **changes)
