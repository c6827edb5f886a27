"""What makes the image tokenizer draw well, beyond each pixel's error: a perceptual and an adversarial term.

Both are optional parts of the VQGAN's loss (arXiv 2012.09841); its codebook terms live in quantizer.py. Left out: LPIPS
and the face and object losses of Make-A-Scene, which need trained networks that would have to be downloaded.

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
    """How differently edges run in two batches of images, at several scales.

    Mean |filter(x) - filter(y)| of three fixed edge filters, summed over the images at sides R, R/2, R/4, ..., plus
    the mean |x - y| of what remains below the coarsest. Of two errors with the same mean absolute value, one that
    makes, moves or blurs an edge costs more than one that is spread over a plane, which is what a pixel loss lacks.

    It needs no download, no seed and one bank of 3x3 filters a scale, where the features of an untrained network bring
    chance at several times the price. Unlike LPIPS it knows nothing of objects, and two pieces of the same texture
    differ. It is a norm of x - y, so zero only at x = y: with edges repeated beyond the border only a plane of one
    colour has a Laplacian of zero, and such a plane is what the last term sees.
    """

    def __init__(self, n_scales: int = 3):
        super().__init__()
        self.n_scales = n_scales
        self.register_buffer("filters", torch.tensor(EDGE_FILTERS).unsqueeze(1), persistent=False)  # (3, 1, 3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two (B, C, R, R), R at least 2**n_scales -> a scalar."""
        difference = (x - y).flatten(0, 1).unsqueeze(1)  # the filters are linear, so one pass serves both
        loss = difference.new_zeros(())
        for _ in range(self.n_scales):
            loss = loss + F.conv2d(F.pad(difference, (1, 1, 1, 1), mode="replicate"), self.filters).abs().mean()
            difference = F.avg_pool2d(difference, 2)
        return loss + difference.abs().mean()


# ---------------------------------------------------------------------------------------------------------------------
# Adversarial


class PatchDiscriminator(nn.Module):
    """A logit for every patch of an image, real above 0 (PatchGAN, arXiv 1611.07004).

    (B, 3, R, R) -> (B, 1, S, S) with S = R / 2**n_layers - 2; a logit sees 9 * 2**n_layers - 2 pixels a side, and the
    rest only through GroupNorm, which stands for BatchNorm so that no image is judged by its batch. Each of the
    n_layers halves the side and doubles the channels, up to 8 times `ch`; one more only doubles them.
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
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the mean of max(0, 1 - real) plus half the mean of max(0, 1 + fake): no more reward beyond a margin of 1."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def generator_loss(fake_logits: Tensor) -> Tensor:
    """What the decoder minimises to be taken for real: minus the mean logit."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """The weight at which both losses pull equally hard on `last_layer` (arXiv 2012.09841, equation 7); no gradient.

    |grad of reconstruction| / (|grad of generator| + 1e-4), at most 1e4. The paper has 1e-6 for the small number,
    its code 1e-4. Both graphs are kept, so that the losses can still be differentiated.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (of_generator,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    return (of_reconstruction.norm() / (of_generator.norm() + 1e-4)).clamp(0, 1e4).detach()
