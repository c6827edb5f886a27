"""What training minimises: the model and its loss as one module, a batch of tokens in, sums out.

DDP and FSDP wrap it as a whole. The optimizer and the division of a batch among ranks are in train.py and parallel/.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.ops import matmul_dtype
from nanochameleon.losses import LossSums, fused_next_token_loss, next_token_loss
from nanochameleon.packing import Batch
from nanochameleon.training.precision import autocast
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

FUSED_FROM = 32_768  # tokens of vocabulary: from here on the logits would be most of a step's memory


class Sums(NamedTuple):
    """Sums over a batch: the loss's, and the norms of the last block's output (paper figure 5a)."""

    next_token: LossSums
    output_norm: Tensor  # Euclidean norms
    n_tokens: Tensor  # padding included


class Objective(nn.Module):
    """The model and its loss as one module, since DDP and FSDP act where a module is called.

    tp_group: the process group that shares each layer, None without tensor parallelism.
    fused_output: output layer and loss in one op that never holds all logits. "auto" turns it on for a vocabulary of
    FUSED_FROM tokens or more. Tensor parallelism has its own loss on a slice of the vocabulary instead.
    """

    def __init__(self, model: Chameleon, vocab: Vocab, precision: str, tp_group=None, fused_output: str = "auto"):
        super().__init__()
        self.model, self.vocab, self.precision, self.tp_group = model, vocab, precision, tp_group
        self.fused = tp_group is None and (
            fused_output == "on" or (fused_output == "auto" and vocab.size >= FUSED_FROM)
        )

    def forward(self, batch: Batch, dropout_seeds: Tensor | None, z_loss: float = 0.0, normalizer: float = 1.0) -> Sums:
        """batch: B sequences of T tokens. dropout_seeds (B,): one for each sequence."""
        fused = self.fused and torch.is_grad_enabled()
        with autocast(self.precision, batch.tokens.device):
            inputs = batch.tokens, batch.positions, batch.documents or Documents.of(batch.doc_ids)
            features = self.model.forward_features(*inputs, dropout_seeds=dropout_seeds)  # (B, T, D)
            hidden = self.model.norm(features).flatten(0, 1)  # (N, D), N = B T
            # the fused op runs outside autocast, so its input gets autocast's dtype here
            x = hidden.to(matmul_dtype(hidden)) if fused else self.model.logits(hidden)  # (N, D) or (N, V)
        loss = self.fused_loss if fused else self.loss_of_logits
        norms = features.detach().float().norm(dim=-1)  # (B, T)
        n_tokens = torch.full((), float(norms.numel()), device=norms.device)  # torch.tensor would copy it from the CPU
        return Sums(loss(x, batch.targets.flatten(), z_loss, normalizer), norms.sum(), n_tokens)

    def fused_loss(self, hidden: Tensor, targets: Tensor, z_loss: float, normalizer: float) -> LossSums:
        return fused_next_token_loss(hidden, self.model.output.weight, targets, self.vocab, z_loss, normalizer)

    def loss_of_logits(self, logits: Tensor, targets: Tensor, z_loss: float, normalizer: float) -> LossSums:
        """The loss of logits (N, V), which are not read afterwards: their gradient overwrites them."""
        if self.tp_group is None:
            return next_token_loss(logits, targets, self.vocab, z_loss, normalizer, overwrite_logits=True)
        from nanochameleon.parallel.vocab_parallel import vocab_parallel_cross_entropy

        return vocab_parallel_cross_entropy(logits, targets, self.vocab, z_loss, normalizer, self.tp_group)
