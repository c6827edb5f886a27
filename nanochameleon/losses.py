"""The transformer's loss: next token and z-loss, as SUMS and counts by modality, never as a mean.

Means of batches with different numbers of tokens do not combine; sums do. Divide by the global count, once, at the end.
"""

from dataclasses import dataclass

from torch import Tensor

from nanochameleon.kernels.zloss import zloss_cross_entropy
from nanochameleon.packing import IGNORE
from nanochameleon.vocab import Vocab


@dataclass(frozen=True)
class LossParts:
    """Sums over the supervised tokens (0-dim tensors): `cross_entropy` and `z` carry gradients, the others do not."""

    cross_entropy: Tensor  # nats
    z: Tensor  # sum of (log Z)^2
    log_z: Tensor  # sum of log Z
    count: Tensor  # supervised tokens
    image_cross_entropy: Tensor  # the share of picture codes
    image_count: Tensor

    def total(self, z_loss: float, count: Tensor | float) -> Tensor:
        """What is minimised: (cross-entropy + z_loss * z) / count, `count` being that of the whole global batch."""
        return (self.cross_entropy + z_loss * self.z) / count


def next_token_loss(logits: Tensor, targets: Tensor, vocab: Vocab) -> LossParts:
    """logits (N, V), targets (N,) already shifted (targets[i] follows token i; IGNORE where nothing is to be learnt).

    Both terms are masked by the TARGETS, so padding and document ends do not enter the z-loss. No supervised token at
    all gives zeros, not NaN.
    """
    kept = targets != IGNORE
    cross_entropy, log_z = zloss_cross_entropy(logits, targets)  # zeros where a target is ignored
    image = kept & vocab.is_image(targets)
    return LossParts(
        cross_entropy=cross_entropy.sum(),
        z=log_z.square().sum(),
        log_z=log_z.detach().sum(),
        count=kept.sum().float(),
        image_cross_entropy=cross_entropy.detach()[image].sum(),
        image_count=image.sum().float(),
    )
