"""Fills in the tables of docs/results/gpu.md: text and rows in, text out.

A cell to fill ends with a comment that names its figure, which no reader of the rendered page sees:

    | decode, B16 H32 S2048 | 0.185 | not measured <!-- decode --> |
"""

import re
from collections.abc import Sequence

from nanochameleon.bench.gpu.plan import Plan
from nanochameleon.bench.rows import Row

CELL = re.compile(r"[^|\n]*<!-- ([\w-]+) -->[ ]*")
DRY_NOTE = "**A dry run at tiny sizes on a CPU. The figures below show that the command works, and nothing else.**\n\n"


def figures(plan: Plan) -> dict[str, tuple[str, str, str]]:
    """The figures of the page, by name: (case, variant, unit) of the row that holds each."""
    compiled = "eager" if plan.dry else "compile"
    large, small = (case.name for case in plan.steps)
    (first, _), (last, _) = plan.models
    found = {
        "copy": ("copy", "torch", "TB/s"),
        "matmul": (f"matmul {plan.matmul_dim}", "torch", "TFLOP/s"),
        "toy-fp32": ("toy, few steps, fp32", "train.py", "s"),
        "toy-bf16": ("toy, few steps, bf16", "train.py", "s"),
    }
    for name, words in (("packed", "packed"), ("causal", ""), ("vendor", "packed vendor"), ("cuda", "packed cuda")):
        variant = f"nano {compiled} bf16 {words}".strip()
        found |= {
            f"large-{name}": (large, variant, "tokens/s"),
            f"large-{name}-gib": (f"{large}, peak", variant, "GiB"),
        }
    found["large-packed-eager"] = (large, "nano eager bf16 packed", "tokens/s")
    found["large-causal-eager"] = (large, "nano eager bf16", "tokens/s")
    found["large-mfu"] = (f"{large}, MFU", f"nano {compiled} bf16", "")
    found["small"] = (small, f"nano {compiled} bf16", "tokens/s")
    ways = {
        "one": "one document a sequence", "model": "as the model runs it", "flash": "flash by documents",
        "efficient": "memory-efficient by documents", "mask": "dense mask", "own": "own CUDA kernels",
    }  # fmt: skip
    for name, way in ways.items():
        for which in ("f", "f+b"):
            found[f"attention-{name}-{which.replace('+', '')}"] = (f"attention with documents {which}", way, "ms")
    return found | kernel_figures(plan) | generation_figures(first, last)


def kernel_figures(plan: Plan) -> dict[str, tuple[str, str, str]]:
    narrow, wide = (f"zloss {n} x {v} bf16 f+b" for n, v in plan.kernels.zloss)
    (half, whole), (linear,) = (
        [f"attention B{b} H{h} T{t} D{e} bf16" for b, t, h, e in plan.kernels.attention],
        [f"linear_zloss {n} x {d} x {v} bf16 f+b" for n, v, d in plan.kernels.linear],
    )
    many, one, grouped = (f"decode B{n} H{h} G{g} S{s} D{e} bf16 f" for n, h, g, s, e in plan.kernels.decode)
    found = {
        "zloss-wide": (wide, "in place"), "zloss-wide-copy": (wide, "copy"), "zloss-narrow": (narrow, "in place"),
        "zloss-narrow-copy": (narrow, "copy"), "linear": (linear, "cuda"), "linear-reference": (linear, "reference"),
        "decode": (many, "attention alone"), "decode-vendor": (many, "attention alone, vendor"),
        "decode-one": (one, "attention alone"), "decode-grouped": (grouped, "attention alone"),
    }  # fmt: skip
    for name, case in (("whole", whole), ("half", half)):
        for variant in ("cuda", "vendor"):
            found |= {f"{name}-{variant}-{p.replace('+', '')}": (f"{case} {p}", variant) for p in ("f", "f+b")}
        found[f"{name}-alone"] = (f"{case} f", "attention alone")
        found[f"{name}-alone-vendor"] = (f"{case} f", "attention alone, vendor")
        found[f"{name}-gradient-alone"] = (f"{case} f+b", "gradient of attention alone")
    in_ms = {name: (*each, "ms") for name, each in found.items()}
    return in_ms | {"linear-mib": (f"{linear} memory", "cuda", "MiB")}


def generation_figures(first: str, last: str) -> dict[str, tuple[str, str, str]]:
    found = {"company": ("requests with the same tokens in company", "nano", "of 16")}
    for key, name in (("first", first), ("last", last)):
        found[f"{key}-graphs"] = (f"{name}, texts with the same tokens with CUDA graphs", "nano", "of 4")
        found[f"{key}-start"] = (f"{name} start to first token", "nano", "ms")
        for batch in (1, 16):
            case = f"{name} text batch {batch}"
            found[f"{key}-{batch}"] = (case, "nano", "ms a step")
            found[f"{key}-{batch}-sampled"] = (case, "nano sampled", "ms a step")
            found[f"{key}-{batch}-alone"] = (f"{name} step of batch {batch}", "nano", "ms")
    found["image"] = (f"{last} guided image", "nano", "ms a code")
    found["image-plain"] = (f"{last} guided image", "nano without guidance", "ms a code")
    return found


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def fill(page: str, measured: Sequence[tuple[Row, str]], figures: dict[str, tuple[str, str, str]]) -> str:
    """Write each measured figure into its cell, with the machine and the day. Other cells stay as they are.

    measured: rows, each with its day. Raises KeyError for a cell whose figure does not exist.
    """
    found = {(row.case, row.variant): (row, day) for row, day in measured}

    def cell(match: re.Match) -> str:
        case, variant, unit = figures[match[1]]
        row, day = found.get((case, variant), (None, ""))
        if row is None or unit not in ("", row.unit):
            return match[0]
        return f" {number(row.value)} {row.unit} ({row.device}, {day}) <!-- {match[1]} --> "

    return CELL.sub(cell, page)
