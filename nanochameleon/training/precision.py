"""The dtype of matmuls in training: bf16 or fp32, whichever is faster here. Weights, sums and norms stay in fp32.

A processor with bf16 instructions is known by name, so the choice is the same each time. Others are measured.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

MIN_SPEEDUP = 1.4  # of bf16 over fp32, for what it loses in precision


def precision_dtype(precision: str) -> torch.dtype:
    return torch.float32 if precision == "fp32" else torch.bfloat16


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """A context in which matmuls run in this precision, "fp32" or "bf16"."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def matmul_flops(dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """Measured floating point operations a second of a matmul of the model's width; the best of four runs counts."""
    a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((2_048, dim), (dim, 4 * dim)))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - start)
    return 2 * 2_048 * dim * 4 * dim / min(times[1:])


def pick_precision(dim: int, device: torch.device) -> tuple[str, str]:
    """Return "bf16" or "fp32", and why. Where the processor does not decide, both take turns and their best counts."""
    faster, why = by_processor(device)
    if faster is None:
        rates = [[matmul_flops(dim, dtype, device) for dtype in (torch.bfloat16, torch.float32)] for _ in range(5)]
        bf16, fp32 = map(max, zip(*rates, strict=True))
        faster, why = bf16 > MIN_SPEEDUP * fp32, f"bf16 was measured at {bf16 / fp32:.1f} times the speed of fp32"
    return "bf16" if faster else "fp32", why


def by_processor(device: torch.device) -> tuple[bool | None, str]:
    """Return whether bf16 is faster, and why; None where that has to be measured."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"this GPU has compute capability {major}.{minor}"
    if device.type != "cpu":
        return None, ""
    return by_features(getattr(torch.cpu, "get_capabilities", dict)())


def by_features(has: Mapping[str, object]) -> tuple[bool | None, str]:
    """The same for a CPU with these torch.cpu.get_capabilities(); {} is an older torch."""
    if has.get("amx_bf16"):
        return True, "this processor has AMX"
    if has.get("avx512_bf16"):  # twice the speed of fp32 on AMD (sse4a), not on Intel, whose fp32 has two units
        return bool(has.get("sse4a")), f"this processor has AVX512-BF16{'' if has.get('sse4a') else ' and no AMX'}"
    if not has or has.get("bf16"):  # ARM's bf16 helps only where torch has matmuls for it
        return None, ""
    return False, "this processor has no bf16 of its own"
