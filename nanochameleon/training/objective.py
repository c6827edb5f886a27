"""What training minimises: the model and its loss as one module, a batch of tokens in, sums out.

DDP and FSDP wrap it as a whole. The optimizer and the division of a batch among ranks are in train.py and parallel/.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanochameleon.kernels.ops import matmul_dtype
from nanochameleon.losses import LossSums, fused_next_token_loss, next_token_loss
from nanochameleon.packing import Batch
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

FUSED_FROM = 32_768  # vocabulary: all logits of a micro-batch would be most of the memory of its step


class Sums(NamedTuple):
    """Sums over a batch: of the loss, and of the last block's output over its tokens (paper figure 5a)."""

    next_token: LossSums
    output_norm: Tensor  # Euclidean norms
    n_tokens: Tensor  # padding included


class Objective(nn.Module):
    """tp_group: the process group that shares each layer, None without tensor parallelism.

    fused_output: output layer and loss in one op that never holds all logits; "auto" is from FUSED_FROM tokens of
    vocabulary up. Tensor parallelism has its own loss on a slice of the vocabulary instead.
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
            inputs = batch.tokens, batch.positions, batch.doc_ids
            features = self.model.forward_features(*inputs, dropout_seeds=dropout_seeds)  # (B, T, D)
            hidden = self.model.norm(features).flatten(0, 1)  # (N, D), N = B T
            # the fused op gets what autocast would give the output layer
            x = hidden.to(matmul_dtype(hidden)) if fused else self.model.logits(hidden)  # (N, D) or (N, V)
        loss = self.fused_loss if fused else self.loss_of_logits
        norms = features.detach().float().norm(dim=-1)  # (B, T)
        n_tokens = torch.tensor(float(norms.numel()), device=norms.device)
        return Sums(loss(x, batch.targets.flatten(), z_loss, normalizer), norms.sum(), n_tokens)

    def fused_loss(self, hidden: Tensor, targets: Tensor, z_loss: float, normalizer: float) -> LossSums:
        return fused_next_token_loss(hidden, self.model.output.weight, targets, self.vocab, z_loss, normalizer)

    def loss_of_logits(self, logits: Tensor, targets: Tensor, z_loss: float, normalizer: float) -> LossSums:
        """Nobody reads the logits afterwards, so their gradient overwrites them."""
        if self.tp_group is None:
            return next_token_loss(logits, targets, self.vocab, z_loss, normalizer, overwrite_logits=True)
        from nanochameleon.parallel.vocab_parallel import vocab_parallel_cross_entropy

        return vocab_parallel_cross_entropy(logits, targets, self.vocab, z_loss, normalizer, self.tp_group)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Where matrix products run in `precision`; weights, sums and norms stay in fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def matmul_flops(dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of a matrix product of the model's width, the best of four."""
    a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((2_048, dim), (dim, 4 * dim)))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - start)
    return 2 * 2_048 * dim * 4 * dim / min(times[1:])


CLEARLY = 1.4  # times as fast: what bf16 has to gain for what it loses


def pick_precision(dim: int, device: torch.device) -> tuple[str, str]:
    """What matrix products run faster in on this device, "bf16" or "fp32", and why.

    Decides by the processor, so that it is the same each time. Where that does not tell, by the clock: the best of
    several measurements in turns of a product of width `dim`.
    """
    faster, why = by_processor(device)
    if faster is None:
        rates = [[matmul_flops(dim, dtype, device) for dtype in (torch.bfloat16, torch.float32)] for _ in range(5)]
        narrow, wide = map(max, zip(*rates, strict=True))
        faster, why = narrow > CLEARLY * wide, f"bf16 was measured at {narrow / wide:.1f} times the speed of fp32"
    return "bf16" if faster else "fp32", why


def by_processor(device: torch.device) -> tuple[bool | None, str]:
    """Is bf16 faster? And why. None where that has to be measured."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"this GPU has compute capability {major}.{minor}"
    if device.type != "cpu":
        return None, ""
    return by_features(getattr(torch.cpu, "get_capabilities", dict)())


def by_features(has: Mapping[str, object]) -> tuple[bool | None, str]:
    """The same of a CPU, by what torch.cpu.get_capabilities() says; {} is an older torch."""
    if has.get("amx_bf16"):
        return True, "this processor has AMX"
    if has.get("avx512_bf16"):  # twice the arithmetic of fp32 on AMD (sse4a), on Intel with its two units no more
        return bool(has.get("sse4a")), f"this processor has AVX512-BF16{'' if has.get('sse4a') else ' and no AMX'}"
    if not has or has.get("bf16"):  # ARM's bf16 helps only where torch has products for it
        return None, ""
    return False, "this processor has no bf16 of its own"
