"""Estimate what training a large model takes, and print the tables of docs/scaling.md.

    python -m nanochameleon.bench.scaling

Everything is arithmetic: bytes of memory and of communication, seconds of a step, GPU hours. Nothing is measured.
"""

from dataclasses import dataclass

from nanochameleon.config import ModelConfig
from nanochameleon.errors import exit_on_user_error, say
from nanochameleon.kernels.zloss.linear import rows_per_chunk
from nanochameleon.presets import chameleon_7b, chameleon_34b
from nanochameleon.training.flops import PEAK_FLOPS, count_parameters, flops_per_token

# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic


@dataclass(frozen=True)
class Cluster:
    """How train.py lays a model out on GPUs, and the batch it trains with (parallel/mesh.py)."""

    n_gpus: int
    tp_size: int = 1  # ranks that share every layer (tensor parallelism)
    batch_tokens: int = 2**23  # of one step, over all GPUs
    seq_len: int = 4_096
    micro_batch: int = 1  # sequences at a time
    activation_checkpointing: bool = True

    @property
    def dp_size(self) -> int:
        return self.n_gpus // self.tp_size

    @property
    def micro_batches(self) -> float:
        return self.batch_tokens / (self.dp_size * self.micro_batch * self.seq_len)


def memory_bytes(cfg: ModelConfig, cluster: Cluster) -> dict[str, float]:
    """Bytes of memory per GPU, by part."""
    size, tokens = count_parameters(cfg), cluster.micro_batch * cluster.seq_len
    # fp32 weights, gradients and both moments of AdamW, sharded over all GPUs
    state = 16.0 * size["total"] / cluster.n_gpus
    # bf16 weights of the block that runs and of the next one, which is gathered ahead
    layer = size["layers"] / cfg.n_layers / cluster.tp_size
    gathered = 2.0 * (2 * layer + (size["embedding"] + size["output"]) / cluster.tp_size)
    # each block keeps its inputs: the fp32 residual stream and, with norms before the branches, a bf16 branch. Only the
    # block that runs keeps what is inside it: the matmuls' inputs, q and k before and after QK-norm, v, and the output
    heads = (3 * cfg.n_heads + 3 * cfg.kv_heads) * cfg.head_dim
    inputs = tokens * (6.0 if cfg.norm_order == "pre" else 4.0) * cfg.dim
    inside = inputs + tokens * 2.0 * (2 * cfg.dim + (heads + 3 * cfg.ffn_dim) / cluster.tp_size)
    checkpointed = cfg.n_layers * inputs + inside
    activations = checkpointed if cluster.activation_checkpointing else cfg.n_layers * inside
    # bf16 logits, which their gradient overwrites; the fused output layer holds a chunk of rows at a time
    rows = tokens if cluster.tp_size > 1 else rows_per_chunk(tokens, "cuda")
    logits = 2.0 * rows * cfg.vocab_size / cluster.tp_size
    parts = {"state": state, "gathered": gathered, "activations": activations, "logits": logits}
    return parts | {"total": sum(parts.values())}


def communication_bytes(cfg: ModelConfig, cluster: Cluster) -> dict[str, float]:
    """Bytes that a GPU sends in one step.

    FSDP: each micro-batch gathers every bf16 weight twice, forward and backward; fp32 gradients are reduced once.
    Tensor parallelism: four all-reduces of bf16 activations per layer, and a ring sends the others' part twice.
    """
    size, tokens = count_parameters(cfg)["total"] / cluster.tp_size, cluster.micro_batch * cluster.seq_len
    dp_others, tp_others = (cluster.dp_size - 1) / cluster.dp_size, (cluster.tp_size - 1) / cluster.tp_size
    return {
        "fsdp": (2 * 2.0 * size * cluster.micro_batches + 4.0 * size) * dp_others,
        "tensor": 2 * tp_others * 4 * cfg.n_layers * cluster.micro_batches * tokens * 2.0 * cfg.dim,
    }


def step_seconds(
    cfg: ModelConfig, cluster: Cluster, flops_rate: float, between: float, within: float
) -> dict[str, float]:
    """Seconds of one step, by part.

    flops_rate: FLOPs per second that a GPU reaches. between, within: bytes per second that a GPU sends to other
    machines and inside its own. Tensor parallelism's all-reduces block the matmuls. FSDP's messages overlap with them,
    so only the longer of the two counts.
    """
    compute = flops_per_token(cfg, cluster.seq_len) * cluster.batch_tokens / cluster.n_gpus / flops_rate
    compute *= 4 / 3 if cluster.activation_checkpointing else 1  # one more forward pass
    sent = communication_bytes(cfg, cluster)
    tensor = sent["tensor"] / within
    fsdp = sent["fsdp"] / (between if cluster.n_gpus > 8 else within)
    return {"compute": compute, "tensor": tensor, "fsdp": fsdp, "total": max(compute + tensor, fsdp)}


def gpu_hours(cfg: ModelConfig, cluster: Cluster, n_tokens: float, **speeds: float) -> float:
    """GPU hours of training on `n_tokens`."""
    seconds = step_seconds(cfg, cluster, **speeds)["total"]
    return n_tokens / cluster.batch_tokens * seconds * cluster.n_gpus / 3_600


# ---------------------------------------------------------------------------------------------------------------------
# The tables

TOKENS = 9.2e12  # that the paper's models were trained on (Table 1)
PAPER_HOURS = {"7B": 856_481, "34B": 4_282_407}  # of A100s (Table 2)
SEVEN, BIG = chameleon_7b().model, chameleon_34b().model
CLUSTERS = [
    ("7B", SEVEN, Cluster(8, micro_batch=4)),
    ("7B", SEVEN, Cluster(64, micro_batch=4)),
    ("34B", BIG, Cluster(64, tp_size=8, batch_tokens=3 * 2**22, micro_batch=4)),
    ("34B", BIG, Cluster(512, tp_size=8, batch_tokens=3 * 2**22, micro_batch=4)),
]
RATES = {"38.5%": 0.385, "57%": 0.57}  # MFU: measured for one GPU by transformers with torch.compile; our aim
LINKS = {"between": 40e9, "within": 300e9}  # bytes/s per GPU: one 400 Gbit/s card each; NVLink


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    def line(*cells) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    return "\n".join([line(*head), line(*["---"] * len(head)), *(line(*cells) for cells in rows)])


def cluster_name(cluster: Cluster) -> str:
    tensor = f"tensor parallelism {cluster.tp_size}, " if cluster.tp_size > 1 else ""
    return f"{cluster.n_gpus} GPUs: {tensor}{cluster.dp_size} shards, micro-batch {cluster.micro_batch}"


def size_table() -> str:
    rows = []
    for name, cfg in (("7B", SEVEN), ("34B", BIG)):
        size = count_parameters(cfg)
        gflops = f"{flops_per_token(cfg, 4_096) / 1e9:.1f}"
        rows.append((name, f"{size['total']:,}", f"{size['embedding']:,}", gflops))
    return table(("model", "parameters", "of them embedding", "GFLOPs per token, sequences of 4,096"), rows)


def memory_table() -> str:
    rows = []
    for name, cfg, cluster in CLUSTERS:
        parts = {key: f"{value / 2**30:.1f}" for key, value in memory_bytes(cfg, cluster).items()}
        rows.append((name, cluster_name(cluster), *parts.values()))
    return table(("model", "cluster", "state", "gathered", "activations", "logits", "**GiB per GPU**"), rows)


def communication_table() -> str:
    rows = []
    for name, cfg, cluster in CLUSTERS:
        sent = communication_bytes(cfg, cluster)
        rows.append((name, cluster_name(cluster), f"{sent['fsdp'] / 1e9:.0f}", f"{sent['tensor'] / 1e9:.0f}"))
    return table(("model", "cluster", "FSDP, GB per GPU and step", "tensor parallelism"), rows)


def speed_table() -> str:
    rows = []
    for name, cfg, cluster in CLUSTERS:
        for label, mfu in RATES.items():
            speeds = LINKS | {"flops_rate": mfu * PEAK_FLOPS["H100"]}
            seconds = step_seconds(cfg, cluster, **speeds)
            parts = (f"{seconds[key]:.1f}" for key in ("compute", "tensor", "fsdp", "total"))
            rate = cluster.batch_tokens / seconds["total"]
            hours, days = gpu_hours(cfg, cluster, TOKENS, **speeds), TOKENS / rate / 86_400
            cost = f"{hours:,.0f}, {hours / PAPER_HOURS[name]:.2f} of the paper's"
            rows.append((name, cluster.n_gpus, label, *parts, f"{rate:,.0f}", cost, f"{days:,.0f}"))
    parts = ("compute, s", "tensor, s", "FSDP, s", "**step, s**")
    return table(("model", "GPUs", "MFU", *parts, "tokens/s", "GPU hours", "days"), rows)


def tables() -> str:
    return "\n\n".join((size_table(), memory_table(), communication_table(), speed_table()))


if __name__ == "__main__":
    exit_on_user_error(lambda: say(tables()))
