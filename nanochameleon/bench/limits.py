"""How fast this machine could do some work at best: the limit that a row is compared with.

    limit = the longest of   FLOPs / those of a matmul of the same type, per second
                             bytes read / those of a sum, per second
                             bytes read and written / those of a tensor scaled in place, per second

All three are measured, on the same device and threads as the rows. The best of many runs counts, since other work on
the machine only slows them. A copy is no limit: the processor also fetches the lines that it overwrites, so what works
in place can be twice as fast. Small tensors stay in a cache. So sum and scaling are measured at several sizes, and work
counts as fast as the largest one that is not larger than it.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nanochameleon.bench.measure import Job, seconds_of
from nanochameleon.bench.rows import Row, make_row
from nanochameleon.bench.work import Work

ROUNDS, MAX_SECONDS = 20, 1.0  # of one measurement; an emulated dtype can take seconds a run
DTYPES = torch.float32, torch.bfloat16
MATMUL_DIM = {"cpu": 1_024, "cuda": 8_192}
MIB = {"cpu": (1, 4, 16, 32, 64, 128), "cuda": (1_024,)}  # a GPU's cases are measured with an empty cache


@dataclass(frozen=True)
class Limits:
    """Per second, as measured."""

    flops: Mapping[torch.dtype, float]
    read: Mapping[int, float]  # by the bytes that are read
    update: Mapping[int, float]  # read and written, by the bytes of both

    def seconds(self, work: Work) -> float:
        moved = work.read + work.written
        return max(
            work.flops / self.flops[work.dtype], work.read / at_size(self.read, work.read),
            moved / at_size(self.update, moved),
        )  # fmt: skip

    def rows(self, bench: str, device: torch.device) -> Iterator[Row]:
        for dtype, flops in self.flops.items():
            name = f"matmul {str(dtype).removeprefix('torch.')}"
            yield make_row(bench, "limit", name, flops / 1e9, "GFLOP/s", device)
        for name, speeds in (("sum", self.read), ("scaled in place", self.update)):
            for size, speed in speeds.items():
                yield make_row(bench, "limit", f"{name}, {size / 2**20:.0f} MiB", speed / 1e9, "GB/s", device)


def at_size(speeds: Mapping[int, float], size: float) -> float:
    """The speed of the largest size that is not larger, or of the smallest."""
    return speeds[max((each for each in speeds if each <= size), default=min(speeds))]


def least_seconds(job: Job, device: torch.device) -> float:
    least = seconds_of(job, device)
    deadline = time.perf_counter() + MAX_SECONDS
    for _ in range(ROUNDS):
        if time.perf_counter() > deadline:
            break
        least = min(least, seconds_of(job, device))
    return least


def measure_limits(device: torch.device) -> Limits:
    sizes = [2**20 * mib for mib in MIB[device.type]]
    flops = {dtype: matmul_flops(MATMUL_DIM[device.type], dtype, device) for dtype in DTYPES}
    flops[torch.bfloat16] = max(flops.values())  # a processor without bf16 emulates it: its limit is that of fp32
    return Limits(flops, *memory_speeds(sizes, device))


def matmul_flops(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of square matrices, per second."""
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / least_seconds(lambda: x @ y, device)


def memory_speeds(sizes: Sequence[int], device: torch.device) -> tuple[dict[int, float], dict[int, float]]:
    """Bytes per second of a sum and of scaling in place, by the bytes that they move. sizes: of the tensor."""
    numbers, read, update = torch.ones(max(sizes) // 4, device=device), {}, {}
    for size in sizes:
        part = numbers[: size // 4]
        read[size] = size / least_seconds(part.sum, device)
        update[2 * size] = 2 * size / least_seconds(lambda part=part: part.mul_(1.0), device)
    return read, update
