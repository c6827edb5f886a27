"""What a model costs, as arithmetic: parameters, operations, memory, messages, hours. docs/scaling.md is made of it.

All counts are of the transformer; B bytes, FLOP floating point operations, ids are tokens of either kind.
"""

from dataclasses import dataclass

from nanochameleon.config import ModelConfig

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2_250e12}  # FLOP/s in bf16, dense, by name of the GPU


def parameters(cfg: ModelConfig) -> dict[str, int]:
    """By part: embedding, output, layers, and the total."""
    kv, vectors = cfg.kv_heads * cfg.head_dim, 4 * cfg.qk_norm_groups * cfg.head_dim if cfg.qk_norm else 0
    layer = 2 * cfg.dim * (cfg.n_heads * cfg.head_dim + kv) + 3 * cfg.dim * cfg.ffn_dim + 2 * cfg.dim + vectors
    embedding, layers = cfg.vocab_size * cfg.dim, cfg.n_layers * layer
    return {
        "embedding": embedding, "output": embedding, "layers": layers, "total": 2 * embedding + layers + cfg.dim,
    }  # fmt: skip


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Forward and backward: 6 for each weight that is multiplied, and causal attention over rows of seq_len ids (PaLM's
    way to count, arXiv 2204.02311 appendix B, but for its mask). Recomputed activations do not count."""
    size = parameters(cfg)
    attention = 6 * cfg.n_layers * cfg.n_heads * cfg.head_dim * seq_len
    return 6.0 * (size["total"] - size["embedding"]) + attention


def peak_flops(name: str) -> float | None:
    """FLOP/s of a GPU by the name that its driver gives; None for one that is not known."""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


# ---------------------------------------------------------------------------------------------------------------------
# A mesh of GPUs


@dataclass(frozen=True)
class Layout:
    """How a model lies on GPUs, as train.py lays it (distributed.py)."""

    gpus: int
    tensor: int = 1  # ranks that share every layer
    batch_ids: int = 2**23  # of a step, over all GPUs
    seq_len: int = 4_096
    micro_batch: int = 1  # rows at a time
    recompute: bool = True

    @property
    def data(self) -> int:
        return self.gpus // self.tensor


def memory(cfg: ModelConfig, layout: Layout) -> dict[str, float]:
    """B a GPU. fp32 weights, gradients and both moments of AdamW are sharded over all GPUs; a block's bf16 weights are
    gathered while it runs, and the next one's on the way; of activations each block keeps its input (fp32), and the one
    that runs all of its own."""
    size, rows = parameters(cfg), layout.micro_batch * layout.seq_len
    layer = size["layers"] / cfg.n_layers / layout.tensor
    state = 16.0 * size["total"] / layout.gpus
    gathered = 2.0 * (2 * layer + (size["embedding"] + size["output"]) / layout.tensor)
    heads = (2 * cfg.n_heads + 2 * cfg.kv_heads) * cfg.head_dim  # q, k, v and what attention gives
    inside = rows * (8.0 * cfg.dim + 2.0 * (2 * cfg.dim + (heads + 3 * cfg.ffn_dim) / layout.tensor))
    blocks = cfg.n_layers * rows * 4.0 * cfg.dim + inside if layout.recompute else cfg.n_layers * inside
    logits = 6.0 * rows * cfg.vocab_size / layout.tensor  # bf16, and their gradient in fp32
    parts = {"state": state, "gathered": gathered, "activations": blocks, "logits": logits}
    return parts | {"total": sum(parts.values())}


def messages(cfg: ModelConfig, layout: Layout) -> dict[str, float]:
    """B that a GPU sends in a step. Sharding: each micro-batch gathers every weight in bf16 twice, forward and
    backward, and sums fp32 gradients once a step; tensor parallelism: four sums a layer of its activations in bf16, of
    which a ring sends twice the share that the others have."""
    size, micro_batches = parameters(cfg)["total"] / layout.tensor, micro_batches_of(layout)
    others, layer_others = (layout.data - 1) / layout.data, (layout.tensor - 1) / layout.tensor
    rows = layout.micro_batch * layout.seq_len
    return {
        "sharding": (2 * 2.0 * size * micro_batches + 4.0 * size) * others,
        "tensor": 2 * layer_others * 4 * cfg.n_layers * micro_batches * rows * 2.0 * cfg.dim,
    }


def micro_batches_of(layout: Layout) -> float:
    return layout.batch_ids / (layout.data * layout.micro_batch * layout.seq_len)


def step_seconds(cfg: ModelConfig, layout: Layout, flop_rate: float, between: float, within: float) -> dict[str, float]:
    """flop_rate: what a GPU reaches (FLOP/s); between, within: B/s a GPU sends to other machines, to those of its own.

    Tensor parallelism's sums stand in the way of the products; sharding's messages go beside them, and only what takes
    longer than the arithmetic counts. A forward pass again, for recomputed activations, is a third on top.
    """
    work = flops_per_token(cfg, layout.seq_len) * layout.batch_ids / layout.gpus / flop_rate
    work *= 4 / 3 if layout.recompute else 1
    sent = messages(cfg, layout)
    tensor = sent["tensor"] / within
    sharding = sent["sharding"] / (between if layout.gpus > 8 else within)
    return {"arithmetic": work, "tensor": tensor, "sharding": sharding, "total": max(work + tensor, sharding)}


def gpu_hours(cfg: ModelConfig, layout: Layout, n_ids: float, **speeds: float) -> float:
    """For a whole training of n_ids."""
    seconds = step_seconds(cfg, layout, **speeds)["total"]
    return n_ids / layout.batch_ids * seconds * layout.gpus / 3_600
