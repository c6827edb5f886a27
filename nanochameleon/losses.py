"""The transformer's loss: next-token cross-entropy with z-loss, and its sums by modality for the log.

    loss = sum_i (cross_entropy_i + z_loss * (log Z_i)^2) / normalizer

Everything is a SUM over tokens. Means of micro-batches or ranks with different numbers of tokens do not combine; sums
do. The caller passes the normalizer: the number of supervised tokens in the whole global batch.

Shapes: N tokens, V the vocabulary, D the model's width. A negative target (packing.IGNORE) has no loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanochameleon.kernels.zloss.cross_entropy import can_overwrite, zloss_cross_entropy, zloss_cross_entropy_
from nanochameleon.kernels.zloss.linear import linear_zloss_cross_entropy
from nanochameleon.vocab import Vocab


class LossSums(NamedTuple):
    """0-dim tensors, sums over the supervised tokens. Only `loss` carries a gradient."""

    loss: Tensor  # what is minimised, divided by the normalizer
    cross_entropy: Tensor  # nats
    log_z_squared: Tensor
    log_z: Tensor
    count: Tensor  # supervised tokens
    image_cross_entropy: Tensor  # of image tokens; text is the rest
    image_count: Tensor


def next_token_loss(
    logits: Tensor,
    targets: Tensor,
    vocab: Vocab,
    z_loss: float = 0.0,
    normalizer: float = 1.0,
    overwrite_logits: bool = False,
) -> LossSums:
    """logits (N, V); targets (N,) are already shifted: targets[i] follows token i.

    Both terms are masked by the targets, so padding and document ends do not enter the z-loss. No supervised token at
    all gives zeros, not NaN.

    overwrite_logits: write the gradient over the logits, which saves a copy; the caller must not read them again.
    """

    def loss_and_gradient(logits: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        # Why the gradient is made here and not in the backward pass: z_loss and normalizer are known already. For
        #     loss = sum_i (log Z_i - x_i[y_i] + z_loss (log Z_i)^2) / normalizer
        # the chain rule gives, with the softmax p_i = d log Z_i / dx_i,
        #     d loss / dx_i[v] = (p_i[v] (1 + 2 z_loss log Z_i) - [v = y_i]) / normalizer
        # Each row is read once, for log Z_i, and overwritten with its gradient while it is still in cache.
        gradient = logits  # (N, V)
        if not (overwrite_logits and can_overwrite(logits)):
            gradient = torch.empty_like(logits, memory_format=torch.contiguous_format).copy_(logits)
        cross_entropy, log_z = zloss_cross_entropy_(gradient, targets, z_loss, 1 / normalizer)  # (N,) each
        return cross_entropy, log_z, [gradient]

    if torch.is_grad_enabled() and logits.requires_grad:
        rows = GradientInForward.apply(loss_and_gradient, z_loss, normalizer, logits)
    else:
        rows = with_total(*zloss_cross_entropy(logits, targets), z_loss, normalizer)
    return sum_by_modality(*rows, targets, vocab)


def fused_next_token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: Vocab, z_loss: float = 0.0, normalizer: float = 1.0
) -> LossSums:
    """next_token_loss of the logits hidden @ weight.T, of which only a chunk of rows exists at a time.

    hidden (N, D), weight (V, D). With a large vocabulary all logits would be most of the memory of a training step.
    """

    def loss_and_gradients(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        cross_entropy, log_z, *gradients = linear_zloss_cross_entropy(hidden, weight, targets, z_loss, 1 / normalizer)
        return cross_entropy, log_z, gradients

    rows = GradientInForward.apply(loss_and_gradients, z_loss, normalizer, hidden, weight)
    return sum_by_modality(*rows, targets, vocab)


class GradientInForward(torch.autograd.Function):
    """An autograd node for compute(*inputs) -> cross-entropy (N,), log Z (N,) and the gradient of each input.

    The forward pass makes the gradients, and the backward pass only hands them on.
    """

    @staticmethod
    def forward(ctx, compute: Callable, z_loss: float, normalizer: float, *inputs: Tensor) -> tuple[Tensor, ...]:
        cross_entropy, log_z, ctx.gradients = compute(*inputs)
        ctx.mark_non_differentiable(cross_entropy, log_z)
        return with_total(cross_entropy, log_z, z_loss, normalizer)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor, *_) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward was called twice on a loss that holds one gradient: compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None  # from here on their memory belongs to autograd
        # Training calls loss.backward(), where upstream is 1. A CPU reads it and saves a pass over the gradients. A GPU
        # would have to finish the forward pass first, so it multiplies: with the fused output layer the gradients are
        # those of hidden and weight, far smaller than the logits.
        if torch.compiler.is_compiling() or upstream.device.type != "cpu" or float(upstream) != 1:
            gradients = [gradient.mul_(upstream) for gradient in gradients]
        return None, None, None, *gradients


def with_total(cross_entropy: Tensor, log_z: Tensor, z_loss: float, normalizer: float) -> tuple[Tensor, Tensor, Tensor]:
    """Put the loss (0-dim), the sum of these terms (N,), in front of them."""
    return (cross_entropy.sum() + z_loss * log_z.square().sum()) / normalizer, cross_entropy, log_z


def sum_by_modality(loss: Tensor, cross_entropy: Tensor, log_z: Tensor, targets: Tensor, vocab: Vocab) -> LossSums:
    """Add up the tokens. cross_entropy and log_z (N,) are 0 where a target is ignored, so sums leave those out."""
    image = vocab.is_image(targets)  # (N,)
    return LossSums(
        loss=loss,
        cross_entropy=cross_entropy.sum(),
        log_z_squared=log_z.square().sum(),
        log_z=log_z.sum(),
        count=(targets >= 0).sum().float(),
        image_cross_entropy=cross_entropy.masked_fill(~image, 0.0).sum(),  # cross_entropy[image] would sync a GPU
        image_count=image.sum().float(),
    )
