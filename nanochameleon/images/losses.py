"""Two terms of the image tokenizer's loss beyond each pixel's error: perceptual and adversarial.

Both are optional parts of the VQGAN's loss (arXiv 2012.09841); the codebook terms are in quantizer.py. Left out: LPIPS
and Make-A-Scene's losses on faces and objects, which need trained networks that would have to be downloaded.

Shapes: B images, R their side. All losses are means over everything, as floats of no dimension.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Perceptual

EDGE_FILTERS = (  # derivatives per pixel: across, down (Sobel), and the Laplacian
    ((-1 / 8, 0, 1 / 8), (-2 / 8, 0, 2 / 8), (-1 / 8, 0, 1 / 8)),
    ((-1 / 8, -2 / 8, -1 / 8), (0, 0, 0), (1 / 8, 2 / 8, 1 / 8)),
    ((0, 1 / 4, 0), (1 / 4, -1, 1 / 4), (0, 1 / 4, 0)),
)


class PerceptualLoss(nn.Module):
    """How much the edges of two batches of images differ, at several scales.

    Mean |filter(x) - filter(y)| of three fixed edge filters, summed over the images at sides R, R/2, R/4, ..., plus
    the mean |x - y| below the coarsest scale. Of two errors with the same mean absolute value, one that adds, moves or
    blurs an edge costs more than one that is spread over a plane. A pixel loss does not tell them apart.

    It needs no download and no seed, and costs one bank of 3x3 filters a scale; the features of an untrained network
    are random and cost several times as much. Unlike LPIPS it knows nothing of objects, and two pieces of the same
    texture differ. It is a norm of x - y, so zero only at x = y: with replicated borders only a plane of one colour has
    a Laplacian of zero, and the last term measures that plane.
    """

    def __init__(self, n_scales: int = 3):
        super().__init__()
        self.n_scales = n_scales
        self.register_buffer("filters", torch.tensor(EDGE_FILTERS).unsqueeze(1), persistent=False)  # (3, 1, 3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two (B, C, R, R), R at least 2**n_scales -> a scalar."""
        # the filters are linear, so filter(x) - filter(y) takes one pass
        difference = (x - y).flatten(0, 1).unsqueeze(1)  # (B * C, 1, R, R)
        loss = difference.new_zeros(())
        for _ in range(self.n_scales):
            loss = loss + F.conv2d(F.pad(difference, (1, 1, 1, 1), mode="replicate"), self.filters).abs().mean()
            difference = F.avg_pool2d(difference, 2)  # half the side
        return loss + difference.abs().mean()


# ---------------------------------------------------------------------------------------------------------------------
# Adversarial


class PatchDiscriminator(nn.Module):
    """A logit for every patch of an image, real above 0 (PatchGAN, arXiv 1611.07004).

    (B, 3, R, R) -> (B, 1, S, S) with S = R / 2**n_layers - 2. A logit sees 9 * 2**n_layers - 2 pixels a side, and the
    rest through GroupNorm alone, which replaces BatchNorm so that no image is judged by its batch. Each of the n_layers
    halves the side and doubles the channels, up to 8 times `ch`; one more layer doubles the channels alone.
    """

    def __init__(self, ch: int, n_layers: int):
        super().__init__()
        widths = [ch * min(2**i, 8) for i in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (c_in, c_out) in enumerate(pairwise(widths), 1):
            layers += [
                nn.Conv2d(c_in, c_out, 4, stride=2 if i < n_layers else 1, padding=1),
                nn.GroupNorm(math.gcd(8, c_out), c_out),
                nn.LeakyReLU(0.2),
            ]
        # the last convolution gives a logit a patch; there is no sigmoid, since the losses are hinge losses
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the mean of max(0, 1 - real) plus half the mean of max(0, 1 + fake): no reward beyond a margin of 1."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2  # logits (B, 1, S, S) -> a scalar


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The decoder's loss for images that are taken for real: minus the mean logit."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """The weight at which both losses pull equally hard on `last_layer` (arXiv 2012.09841, equation 7); no gradient.

    |grad of reconstruction| / (|grad of generator| + 1e-4), at most 1e4. The small number is 1e-6 in the paper, 1e-4 in
    its code. Both graphs are kept, so that the losses can still be differentiated.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (of_generator,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    return (of_reconstruction.norm() / (of_generator.norm() + 1e-4)).clamp(0, 1e4).detach()
