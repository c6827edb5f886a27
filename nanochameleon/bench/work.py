"""What each case of the benches needs at least: FLOPs of matmuls, and bytes from and to memory.

Inputs are read once, results are written once, and nothing is computed twice. Attention counts the pairs of query and
key that are visible. Exponentials, norms, rotations and sums count as nothing, and so do the small tensors: tables,
targets, a number for each row. limits.py says how long a machine needs for it.
"""

from typing import NamedTuple

import torch

from nanochameleon.config import ModelConfig
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.training.flops import count_parameters


class Work(NamedTuple):
    dtype: torch.dtype  # of the matmuls
    flops: float = 0.0
    read: float = 0.0  # bytes
    written: float = 0.0  # bytes


def visible_pairs(b: int, t: int, documents: Documents | None = None) -> int:
    """Pairs of query and key in a batch of B sequences. A token sees its document up to itself."""
    lengths = torch.full((b,), t) if documents is None else documents.cu_seqlens.long().diff()
    return int((lengths * (lengths + 1) // 2).sum())


def attention_work(h: int, e: int, n_tokens: int, pairs: int, dtype: torch.dtype) -> dict[str, Work]:
    """Two matmuls forward and four backward, each over the visible pairs, for H heads of size E.

    A kernel that makes the weights again for the gradient, so as not to keep them, needs a seventh one.
    """
    matmul, heads = 2 * pairs * h * e, n_tokens * h * e * dtype.itemsize
    return {
        "f": Work(dtype, 2 * matmul, 3 * heads, heads),  # q, k, v -> out
        "f+b": Work(dtype, 6 * matmul, 4 * heads, 4 * heads),  # and d out -> dq, dk, dv
        "gradient of attention alone": Work(dtype, 4 * matmul, 5 * heads, 3 * heads),  # q, k, v, out, d out -> dq ..
    }


def zloss_work(n: int, v: int, dtype: torch.dtype) -> dict[str, Work]:
    """Logits (N, V) are read, and overwritten with their gradient."""
    logits = n * v * dtype.itemsize
    return {"f": Work(dtype, read=logits), "f+b": Work(dtype, read=logits, written=logits)}


def linear_zloss_work(n: int, v: int, d: int, dtype: torch.dtype) -> dict[str, Work]:
    """Hidden (N, D) and weight (V, D) are read, the gradients of both written, and no logits. One matmul and two."""
    matmul, tensors = 2 * n * v * d, (n + v) * d * dtype.itemsize
    return {"f": Work(dtype, matmul, tensors), "f+b": Work(dtype, 3 * matmul, tensors, tensors)}


def decode_attention_work(n: int, h: int, g: int, cache_len: int, e: int, dtype: torch.dtype) -> dict[str, Work]:
    """One query of each of H heads, for N sequences; keys and values of G heads are read."""
    return {"f": Work(dtype, 4 * n * h * cache_len * e, 2 * n * g * cache_len * e * dtype.itemsize)}


def matmul_weights(cfg: ModelConfig) -> int:
    """Weights that take part in a matmul for each token: all but the embedding and the norms."""
    attention = 2 * cfg.dim * (cfg.n_heads + cfg.kv_heads) * cfg.head_dim
    return cfg.n_layers * (attention + 3 * cfg.dim * cfg.ffn_dim) + cfg.vocab_size * cfg.dim


def training_work(cfg: ModelConfig, n_tokens: int, pairs: int, dtype: torch.dtype) -> Work:
    """Forward, backward and AdamW: each weight takes part in a matmul forward and in two backward.

    AdamW reads and writes the weights and its two averages, in float32.
    """
    attention = attention_work(cfg.n_heads, cfg.head_dim, n_tokens, pairs, dtype)["f+b"].flops
    adamw = 3 * 4 * count_parameters(cfg)["total"]
    return Work(dtype, 6 * matmul_weights(cfg) * n_tokens + cfg.n_layers * attention, adamw, adamw)


def step_work(cfg: ModelConfig, rows: int, cached: float, dtype: torch.dtype) -> Work:
    """A step of generation: one token for each of `rows`, which read `cached` positions of the KV cache in all."""
    weights = matmul_weights(cfg)
    flops = 2 * weights * rows + 4 * cfg.n_layers * cfg.n_heads * cfg.head_dim * cached
    cache = 2 * cfg.n_layers * cfg.kv_heads * cfg.head_dim * cached
    return Work(dtype, flops, (weights + cache) * dtype.itemsize)
