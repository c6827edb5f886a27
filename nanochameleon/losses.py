"""The transformer's loss: next token and z-loss, as SUMS and counts by modality, never as a mean.

Means of batches with different numbers of tokens do not combine; sums do. Divide by the global count, once, at the end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanochameleon.kernels.zloss.cross_entropy import Expected, fits_in_place, zloss_cross_entropy, zloss_cross_entropy_
from nanochameleon.packing import IGNORE
from nanochameleon.vocab import Vocab


class LossParts(NamedTuple):
    """Sums over the supervised tokens (0-dim tensors): `cross_entropy` and `z` carry gradients, the others do not."""

    cross_entropy: Tensor  # nats
    z: Tensor  # sum of (log Z)^2
    log_z: Tensor  # sum of log Z
    count: Tensor  # supervised tokens
    image_cross_entropy: Tensor  # the share of image codes
    image_count: Tensor

    def total(self, z_loss: float, count: Tensor | float) -> Tensor:
        """What is minimised: (cross-entropy + z_loss * z) / count, `count` being that of the whole global batch."""
        return (self.cross_entropy + z_loss * self.z) / count


def next_token_loss(
    logits: Tensor, targets: Tensor, vocab: Vocab, ranks=None, expected: Expected | None = None
) -> LossParts:
    """logits (N, V), targets (N,) already shifted (targets[i] follows token i; IGNORE where nothing is to be learnt).

    Both terms are masked by the TARGETS, so padding and document ends do not enter the z-loss. No supervised token at
    all gives zeros, not NaN. ranks: the process group over which the columns of the logits are spread; each of its
    ranks gets the same sums.

    expected: the loss that will be made of the sums. Given, the logits are used up: where it is faster, their gradient
    takes their place, which spares a second pass and as much memory. It is right for any other loss, too.
    """
    kept = targets != IGNORE
    if ranks is None and expected and fits_in_place(logits):
        cross_entropy, log_z = zloss_cross_entropy_(logits, targets, *expected)
    elif ranks is None:
        cross_entropy, log_z = zloss_cross_entropy(logits, targets)  # zeros where a target is ignored
    else:
        cross_entropy, log_z = spread_cross_entropy(logits, targets, vocab.size, ranks)
    image = kept & vocab.is_image(targets)
    return LossParts(
        cross_entropy=cross_entropy.sum(),
        z=log_z.square().sum(),
        log_z=log_z.detach().sum(),
        count=kept.sum().float(),
        image_cross_entropy=cross_entropy.detach()[image].sum(),
        image_count=image.sum().float(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Logits whose columns are spread over ranks


def spread_cross_entropy(logits: Tensor, targets: Tensor, n_columns: int, ranks) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log Z (N,) of logits of which each rank has a stretch of ceil(n_columns / ranks) columns.

    log Z = log sum_r Z_r, and the logit of the target is that of the one rank that has it: two sums of N numbers over
    the ranks in place of N x V logits.
    """
    import torch.distributed as dist

    width = -(-n_columns // dist.get_world_size(ranks))
    here = targets - dist.get_rank(ranks) * width
    mine = (targets != IGNORE) & (here >= 0) & (here < logits.shape[1])
    # any target will do where the rank has none: its log Z is all that is asked for
    cross_entropy, part = zloss_cross_entropy(logits, torch.where(mine, here, 0).where(targets != IGNORE, IGNORE))
    own = (part - cross_entropy).masked_fill(~mine, 0.0)
    log_z, own = AddUp.apply(part, own, ranks)
    log_z = log_z.masked_fill(targets == IGNORE, 0.0)
    return log_z - own, log_z


class AddUp(torch.autograd.Function):
    """Each rank's log Z_r and part of the target's logit, (N,) each -> log sum_r Z_r and the sum of the parts."""

    @staticmethod
    def forward(ctx, part: Tensor, own: Tensor, ranks) -> tuple[Tensor, Tensor]:
        import torch.distributed as dist

        largest, own = part.clone(), own.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, ranks)
        total = (part - largest).exp()
        dist.all_reduce(total, dist.ReduceOp.SUM, ranks)
        dist.all_reduce(own, dist.ReduceOp.SUM, ranks)
        log_z = largest + total.log()
        ctx.save_for_backward(part, log_z)
        return log_z, own

    @staticmethod
    def backward(ctx, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor, None]:
        """d log Z / d log Z_r = Z_r / Z; every rank computes the same loss, so its upstream gradient is the whole."""
        part, log_z = ctx.saved_tensors
        return g * (part - log_z).exp(), h, None
