"""Checks of lesson 2, 02_images."""

import numpy as np
import torch

from checks import Wrong, close, compare, shown
from nanochameleon.config import VQGANConfig
from nanochameleon.data.sources.scenes import draw, scenes
from nanochameleon.images import quantizer
from nanochameleon.images.tokenizer import to_pixels
from nanochameleon.images.vqgan import VQGAN, split_windows
from small import WORLD, PatchTokenizer


def nearest_code(answer):
    """Codes are the library's, for vectors around 0 and for vectors that share an offset of 10,000."""
    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.tensor([[0.0, 3.0], [5.0, 1.0]]), torch.tensor([[5.0, 5.0], [0.0, 0.0], [6.0, 0.0]]))]
    for offset in (0.0, 10_000.0):
        vectors = torch.randn(200, 8, generator=generator) + offset
        inputs.append((vectors, vectors[:20] + 0.01 * torch.randn(20, 8, generator=generator)))
    compare(answer, quantizer.nearest_code, inputs)


def windows(answer):
    """Windows are the library's, for one and several images, also where an image is not square."""
    shapes = [(1, 1, 4, 4), (2, 3, 4, 4), (2, 3, 4, 8), (1, 2, 6, 2)]
    compare(answer, split_windows, [(torch.arange(float(np.prod(s))).view(s), 2) for s in shapes])


def patches(answer):
    """The number of different patches of 8 x 8 pixels in the small world."""
    close(answer, len(PatchTokenizer(WORLD).codebook), 0)


def far_change(answer):
    """The upper left quarter stays, and the first latent of an encoder without windows moves by a tenth or more."""
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(
        resolution=32, ch=8, ch_mult=(1, 2, 4), n_res_blocks=1, z_channels=32, embed_dim=32, n_codes=64, n_groups=4,
        mid_attention=False,
    )).eval()  # fmt: skip
    for scene in scenes(WORLD, seed=3, n=5):
        image = draw(scene, WORLD)
        given = answer(image.copy())
        changed = np.asarray(given)
        if changed.shape != image.shape or changed.dtype != np.uint8:
            raise Wrong(f"the answer returns a {shown(image)}, not {shown(given)}")
        if not np.array_equal(changed[:16, :16], image[:16, :16]):
            raise Wrong(f"the upper left quarter of {scene.caption()!r} has changed")
        with torch.no_grad():
            before, after = (vqgan.latents(to_pixels(x[None]))[0, :, 0, 0] for x in (image, changed))
        move = float((before - after).norm() / before.norm())
        if move < 0.1:
            raise Wrong(f"the first latent of {scene.caption()!r} moves by {move:.3f} of its length, less than 0.1")
