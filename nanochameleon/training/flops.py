"""Count a model's parameters and the floating-point operations (FLOPs) of a training step.

Only the transformer counts. bench/scaling.py adds the memory, communication and hours of a cluster.
"""

from nanochameleon.config import ModelConfig

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2_250e12}  # per second, in dense bf16


def count_parameters(cfg: ModelConfig) -> dict[str, int]:
    """Parameters by part: embedding, output, layers, and the total."""
    kv_dim = cfg.kv_heads * cfg.head_dim
    qk_norm = 4 * cfg.qk_norm_groups * cfg.head_dim if cfg.qk_norm else 0  # weight and bias of q_norm and of k_norm
    attention = 2 * cfg.dim * (cfg.n_heads * cfg.head_dim + kv_dim) + qk_norm
    layer = attention + 3 * cfg.dim * cfg.ffn_dim + 2 * cfg.dim  # w1, w2, w3 and both RMSNorms
    embedding, layers = cfg.vocab_size * cfg.dim, cfg.n_layers * layer
    return {
        "embedding": embedding, "output": embedding, "layers": layers, "total": 2 * embedding + layers + cfg.dim,
    }  # fmt: skip


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of `seq_len` tokens.

    6 per weight that takes part in a matmul, plus attention: PaLM's count (arXiv 2204.02311, appendix B), except that
    the causal mask halves attention here. The extra forward pass of activation checkpointing does not count.
    """
    size = count_parameters(cfg)
    attention = 6 * cfg.n_layers * cfg.n_heads * cfg.head_dim * seq_len
    return 6.0 * (size["total"] - size["embedding"]) + attention


def peak_flops(name: str) -> float | None:
    """Peak FLOPs per second of a GPU by the name its driver gives. None for an unknown GPU."""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
