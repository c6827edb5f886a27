"""The loss where each rank of a tensor-parallel group holds a slice of the vocabulary.

log Z = log sum_r Z_r over the ranks r, and the target's logit is on one of them. Ranks exchange three numbers a token
in place of V logits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from nanochameleon.kernels.zloss.cross_entropy import can_overwrite, zloss_cross_entropy, zloss_gradient_
from nanochameleon.losses import GradientInForward, LossSums, sum_by_modality, with_total
from nanochameleon.packing import IGNORE
from nanochameleon.vocab import Vocab


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, vocab: Vocab, z_loss: float, normalizer: float, tp_group: dist.ProcessGroup
) -> LossSums:
    """next_token_loss of the logits of all ranks, of which this rank has the next ceil(V / ranks) columns.

    Every rank gets the same sums, and the gradient of its own logits, whose memory it overwrites.
    """
    columns = -(-vocab.size // dist.get_world_size(tp_group))
    local_target = targets - dist.get_rank(tp_group) * columns  # (N,)
    # The kernels take a target beyond the columns for one that another rank has.
    in_shard = (local_target >= 0) & (local_target < logits.shape[1])
    local_target = torch.where(in_shard, local_target, logits.shape[1]).masked_fill(targets < 0, IGNORE)

    def loss_and_gradient(logits: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        cross_entropy, log_z = all_reduce_rows(logits, local_target, tp_group)
        gradient = logits if can_overwrite(logits) else logits.contiguous()
        zloss_gradient_(gradient, local_target, log_z, z_loss, 1 / normalizer)
        return cross_entropy, log_z, [gradient]

    if torch.is_grad_enabled() and logits.requires_grad:
        rows = GradientInForward.apply(loss_and_gradient, z_loss, normalizer, logits)
    else:
        rows = with_total(*all_reduce_rows(logits, local_target, tp_group), z_loss, normalizer)
    return sum_by_modality(*rows, targets, vocab)


def all_reduce_rows(logits: Tensor, local_target: Tensor, tp_group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log Z (N,) over the columns of all ranks."""
    valid, n_columns = local_target >= 0, logits.shape[1]
    # 1. log Z of this rank's columns, for which any of them serves as a target
    local_lse = zloss_cross_entropy(logits, local_target.clamp(max=0))[1]
    # 2. log Z = m + log sum_r exp(log Z_r - m): with the largest m taken off, no power overflows
    largest = local_lse.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, tp_group)
    total = (local_lse - largest).exp()
    dist.all_reduce(total, dist.ReduceOp.SUM, tp_group)
    log_z = largest + total.log()
    # 3. The target's logit, from the one rank that has it
    target_logit = logits.gather(1, local_target.clamp(0, n_columns - 1)[:, None])[:, 0].to(log_z.dtype)
    target_logit = target_logit.masked_fill(~valid | (local_target >= n_columns), 0.0)
    dist.all_reduce(target_logit, dist.ReduceOp.SUM, tp_group)
    return (log_z - target_logit).masked_fill(~valid, 0.0), log_z.masked_fill(~valid, 0.0)
