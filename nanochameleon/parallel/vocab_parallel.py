"""The loss where each rank of a tensor-parallel group holds a slice of the vocabulary.

log Z = log sum_r Z_r over the ranks r, and the target's logit is on one of them. Ranks exchange three numbers a token
in place of V logits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from nanochameleon.kernels.zloss.cross_entropy import can_overwrite, zloss_cross_entropy, zloss_gradient_
from nanochameleon.losses import KnownGradients, LossSums, sum_up
from nanochameleon.packing import IGNORE
from nanochameleon.vocab import Vocab


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, vocab: Vocab, z_loss: float, normalizer: float, tp_group: dist.ProcessGroup
) -> LossSums:
    """next_token_loss of logits (N, V / ranks), of which each rank has the next ceil(V / ranks) columns.

    Every rank gets the same sums, and the gradient of its own columns, whose memory it overwrites.
    """
    gradient = logits.detach()
    if not can_overwrite(gradient):
        gradient = gradient.contiguous()
    # 1. Which rank has the target's logit
    columns = -(-vocab.size // dist.get_world_size(tp_group))
    valid, local_target = targets >= 0, targets - dist.get_rank(tp_group) * columns  # (N,)
    in_shard = valid & (local_target >= 0) & (local_target < logits.shape[1])
    # 2. log Z and the target's logit over all ranks
    local_lse = zloss_cross_entropy(gradient, targets.clamp(max=0))[1]  # any column serves as a target here
    index = local_target.clamp(0, logits.shape[1] - 1)[:, None]
    target_logit = gradient.gather(1, index)[:, 0].to(local_lse.dtype).masked_fill(~in_shard, 0.0)
    log_z = all_reduce_logsumexp(local_lse, tp_group)
    dist.all_reduce(target_logit, dist.ReduceOp.SUM, tp_group)
    cross_entropy = (log_z - target_logit).masked_fill(~valid, 0.0)
    log_z = log_z.masked_fill(~valid, 0.0)
    sums = sum_up(cross_entropy, log_z, targets, vocab, z_loss, normalizer)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return sums
    # 3. The gradient of this rank's columns. A target of another rank is given as one from V / ranks on.
    local_target = torch.where(in_shard, local_target, logits.shape[1]).masked_fill(~valid, IGNORE)
    zloss_gradient_(gradient, local_target, log_z, z_loss, 1 / normalizer)
    return sums._replace(loss=KnownGradients.apply(sums.loss, [gradient], logits))


def all_reduce_logsumexp(local_lse: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """log sum_r exp(local_lse of rank r), (N,): the largest first, so that no power overflows."""
    largest = local_lse.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, tp_group)
    total = (local_lse - largest).exp()
    dist.all_reduce(total, dist.ReduceOp.SUM, tp_group)
    return largest + total.log()
