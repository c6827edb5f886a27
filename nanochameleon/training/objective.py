"""What is trained: the model and its loss as one module, rows of ids in, sums out. DDP and FSDP wrap it as a whole.

It leaves out the optimizer and who has which rows (train.py, distributed.py).
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanochameleon.kernels.zloss.cross_entropy import Expected
from nanochameleon.losses import LossParts, next_token_loss
from nanochameleon.packing import Batch
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab


class Sums(NamedTuple):
    """Sums over rows: the loss's parts, and of the last block's output over its tokens (paper figure 5a)."""

    parts: LossParts
    output_norm: Tensor  # Euclidean norms
    n_tokens: Tensor  # padding included


class Objective(nn.Module):
    """model: its weights are the only ones. ranks: the process group that shares each layer, None without."""

    def __init__(self, model: Chameleon, vocab: Vocab, precision: str, ranks=None):
        super().__init__()
        self.model, self.vocab, self.precision, self.ranks = model, vocab, precision, ranks

    def forward(self, batch: Batch, keys: Tensor | None, expected: Expected | None = None) -> Sums:
        """batch: B rows. keys (B,): what their dropout is drawn from, see Chameleon.forward_features. expected: see
        next_token_loss."""
        with autocast(self.precision, batch.tokens.device):
            residual = self.model.forward_features(batch.tokens, batch.positions, batch.doc_ids, dropout_seeds=keys)
            logits = self.model.logits(self.model.norm(residual).flatten(0, 1))
        parts = next_token_loss(logits, batch.targets.flatten(), self.vocab, self.ranks, expected)
        norms = residual.detach().float().norm(dim=-1)
        return Sums(parts, norms.sum(), torch.tensor(float(norms.numel()), device=norms.device))


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
