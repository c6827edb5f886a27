"""The tables of docs/scaling.md, from scaling.py's arithmetic: `python -m nanochameleon.bench.scaling` prints them."""

from nanochameleon.config import ModelConfig
from nanochameleon.errors import exit_on_user_error, say
from nanochameleon.presets import chameleon_7b, chameleon_34b
from nanochameleon.training.flops import (
    PEAKS,
    Layout,
    flops_per_token,
    gpu_hours,
    memory,
    messages,
    parameters,
    step_seconds,
)

IDS = 9.2e12  # that the paper's models have read (Table 1)
PAPER_HOURS = {"7B": 856_481, "34B": 4_282_407}  # of A100s (Table 2)
SEVEN, BIG = chameleon_7b().model, chameleon_34b().model
LAYOUTS = [
    ("7B", SEVEN, Layout(8, micro_batch=4)),
    ("7B", SEVEN, Layout(64, micro_batch=4)),
    ("34B", BIG, Layout(64, tensor=8, batch_ids=3 * 2**22, micro_batch=4)),
    ("34B", BIG, Layout(512, tensor=8, batch_ids=3 * 2**22, micro_batch=4)),
]
RATES = {"38.5%": 0.385, "57%": 0.57}  # of the peak: measured for one GPU by transformers with torch.compile; our aim
LINKS = {"between": 40e9, "within": 300e9}  # B/s a GPU: a 400 Gbit/s card each; NVLink


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    return "\n".join([row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows)])


def layout_name(layout: Layout) -> str:
    shared = f"{layout.tensor} share a layer, " if layout.tensor > 1 else ""
    return f"{layout.gpus} GPUs: {shared}{layout.data} shards, {layout.micro_batch} rows at a time"


def memory_table() -> str:
    rows = []
    for name, cfg, layout in LAYOUTS:
        parts = {key: f"{value / 2**30:.1f}" for key, value in memory(cfg, layout).items()}
        rows.append((name, layout_name(layout), *parts.values()))
    return table(("model", "layout", "state", "gathered", "activations", "logits", "**GiB a GPU**"), rows)


def messages_table() -> str:
    rows = []
    for name, cfg, layout in LAYOUTS:
        sent = messages(cfg, layout)
        rows.append((name, layout_name(layout), f"{sent['sharding'] / 1e9:.0f}", f"{sent['tensor'] / 1e9:.0f}"))
    return table(("model", "layout", "sharding, GB a GPU and step", "tensor parallelism"), rows)


def speed_table() -> str:
    rows = []
    for name, cfg, layout in LAYOUTS:
        for label, share in RATES.items():
            speeds = LINKS | {"flop_rate": share * PEAKS["H100"]}
            seconds = step_seconds(cfg, layout, **speeds)
            parts = (f"{seconds[key]:.1f}" for key in ("arithmetic", "tensor", "sharding", "total"))
            ids = layout.batch_ids / seconds["total"]
            hours, days = gpu_hours(cfg, layout, IDS, **speeds), IDS / ids / 86_400
            cost = f"{hours:,.0f}, {hours / PAPER_HOURS[name]:.2f} of the paper's"
            rows.append((name, layout.gpus, label, *parts, f"{ids:,.0f}", cost, f"{days:,.0f}"))
    parts = ("arithmetic, s", "tensor, s", "sharding, s", "**step, s**")
    return table(("model", "GPUs", "rate", *parts, "ids/s", "GPU hours", "days"), rows)


def size_table() -> str:
    def cells(name: str, cfg: ModelConfig) -> tuple:
        size = parameters(cfg)
        return name, f"{size['total']:,}", f"{size['embedding']:,}", f"{flops_per_token(cfg, 4_096) / 1e9:.1f}"

    return table(("model", "parameters", "of them embedding", "GFLOP an id, rows of 4,096"), [
        cells("7B", SEVEN), cells("34B", BIG),
    ])  # fmt: skip


def tables() -> str:
    return "\n\n".join((size_table(), memory_table(), messages_table(), speed_table()))


if __name__ == "__main__":
    exit_on_user_error(lambda: say(tables()))
