"""The loss and its gradient in six rungs, from the formula to the shipped kernel. Each rung changes one thing.

    python kernels/zloss/steps.py           check every rung against float64, time it, print a table
    python kernels/zloss/steps.py --cuda    the same for steps.cu, on a GPU; without one, in the emulator

A row of V logits x with target y, where p_v = exp(x_v) / Z is the softmax:

    log Z = log sum_v exp(x_v)
    loss = log Z - x_y + z_loss (log Z)^2
    gradient_v = d (scale loss) / d x_v = scale ((1 + 2 z_loss log Z) p_v - [v = y])

Every rung takes logits (N, V) float32, targets (N,) below V, z_loss and scale. It returns cross-entropy (N,), log Z
(N,) and the gradient (N, V). A row with a negative target is ignored: zeros. Figures are in docs/results/kernels.md.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import Tensor

from nanochameleon.kernels import ladder
from nanochameleon.kernels.cpu.exp2 import exp2
from nanochameleon.kernels.cpu.simd import ZERO, W, hmax, hsum, load, splat, vmax
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.kernels.gpu import launch
from nanochameleon.kernels.ladder import Ladder, Limit, Rung, cuda_source, python_source
from nanochameleon.kernels.zloss import cpu
from nanochameleon.kernels.zloss.cpu import FOUR, LOG2E, LOWEST, NEG_INF, load_tail, store_any
from nanochameleon.kernels.zloss.cross_entropy import zloss_cross_entropy_, zloss_cross_entropy_reference

Results = tuple[Tensor, Tensor, Tensor]  # cross-entropy (N,), log Z (N,), gradient (N, V)

# ---------------------------------------------------------------------------------------------------------------------
# 1. The formula. Each of torch's operations reads and writes an array of (N, V); autograd keeps some of them.


def formula(logits: Tensor, targets: Tensor, z_loss: float, scale: float) -> Results:
    x = logits.detach().requires_grad_()
    cross_entropy, log_z = zloss_cross_entropy_reference(x, targets)
    (gradient,) = torch.autograd.grad(scale * (cross_entropy + z_loss * log_z.square()).sum(), x)
    return cross_entropy.detach(), log_z.detach(), gradient


# ---------------------------------------------------------------------------------------------------------------------
# 2. Plain loops. No arrays in between: a logit is read when it is needed. A row is read three times, two of them to
#    find log Z, and the second and third time it comes from cache.


@njit
def zloss_loops(logits, targets, z_loss, scale, cross_entropy, log_z, gradient):
    n_rows, n_columns = logits.shape
    for n in range(n_rows):
        y = targets[n]
        if y < 0:
            cross_entropy[n], log_z[n] = 0.0, 0.0
            gradient[n, :] = 0.0
            continue
        # 1. log Z = m + log sum_v exp(x_v - m): with the largest m taken off, no power overflows
        largest, total = -np.inf, 0.0
        for v in range(n_columns):
            largest = max(largest, logits[n, v])
        for v in range(n_columns):
            total += math.exp(logits[n, v] - largest)
        log_z[n] = z = largest + math.log(total)
        cross_entropy[n] = z - logits[n, y]
        # 2. d loss / dx_v = scale ((1 + 2 z_loss log Z) p_v - [v = y])
        for v in range(n_columns):
            gradient[n, v] = scale * (1 + 2 * z_loss * z) * math.exp(logits[n, v] - z)
        gradient[n, y] -= scale


# ---------------------------------------------------------------------------------------------------------------------
# 3. Online softmax. One pass finds maximum and sum: when a larger logit comes, the sum so far is scaled down.


@njit
def zloss_online(logits, targets, z_loss, scale, cross_entropy, log_z, gradient):
    n_rows, n_columns = logits.shape
    for n in range(n_rows):
        y = targets[n]
        if y < 0:
            cross_entropy[n], log_z[n] = 0.0, 0.0
            gradient[n, :] = 0.0
            continue
        # 1. total = sum of exp(x - largest) over the logits so far
        largest, total = float(LOWEST), 0.0
        for v in range(n_columns):
            x = float(logits[n, v])
            if x > largest:
                total *= math.exp(largest - x)
                largest = x
            total += math.exp(x - largest)
        log_z[n] = z = largest + math.log(total)
        cross_entropy[n] = z - logits[n, y]
        # 2. The gradient, as before
        for v in range(n_columns):
            gradient[n, v] = scale * (1 + 2 * z_loss * z) * math.exp(logits[n, v] - z)
        gradient[n, y] -= scale


# ---------------------------------------------------------------------------------------------------------------------
# What rungs 4 and 5 share: a register holds W float32 numbers, 16 with AVX-512, else 8 (../cpu/simd.py)


@njit
def load_four(p, i, v):
    """Numbers [i, i + 4 W) of a row of v at address p, as four registers; -infinity after the row's end."""
    if i + FOUR <= v:
        at = p + 4 * i
        return load(at), load(at + 4 * W), load(at + 8 * W), load(at + 12 * W)
    return (
        load_tail(p, 4, i, v),
        load_tail(p, 4, i + W, v),
        load_tail(p, 4, i + 2 * W, v),
        load_tail(p, 4, i + 3 * W, v),
    )


@njit
def store_four(p, i, v, x0, x1, x2, x3):
    """Store four registers at numbers [i, i + 4 W) of a row, as far as it has them."""
    store_any(p, 4, i, v, x0)
    store_any(p, 4, i + W, v, x1)
    store_any(p, 4, i + 2 * W, v, x2)
    store_any(p, 4, i + 3 * W, v, x3)


@njit
def power(x, shift):
    """e^(x - shift) = 2^((x - shift) log2 e): an exponent's bits, times a polynomial of degree 5 (../cpu/exp2.py)."""
    return exp2((x - splat(shift)) * splat(LOG2E))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Registers and a polynomial. The same online softmax on 4 W logits at a time: a polynomial instead of a call for
#    each, one comparison with the maximum for all of them, and four sums, so that no addition waits for another.


@njit
def zloss_registers(logits, targets, z_loss, scale, cross_entropy, log_z, gradient):
    n_rows, n_columns = logits.shape
    for n in range(n_rows):
        y, p, q = targets[n], logits.ctypes.data + 4 * n * n_columns, gradient.ctypes.data + 4 * n * n_columns
        if y < 0:
            cross_entropy[n], log_z[n] = 0.0, 0.0
            gradient[n, :] = 0.0
            continue
        # 1. Lanes of a, b, c and d add up to the sum of exp(x - largest) over the logits so far
        largest, a, b, c, d = LOWEST, splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for i in range(0, n_columns, FOUR):
            x0, x1, x2, x3 = load_four(p, i, n_columns)
            block = hmax(vmax(vmax(x0, x1), vmax(x2, x3)))
            if block > largest:
                less = splat(np.float32(math.exp(largest - block)))
                a, b, c, d, largest = a * less, b * less, c * less, d * less, block
            a, b = a + power(x0, largest), b + power(x1, largest)
            c, d = c + power(x2, largest), d + power(x3, largest)
        log_z[n] = z = largest + np.float32(math.log(hsum((a + b) + (c + d))))
        cross_entropy[n] = z - logits[n, y]
        # 2. The gradient, W numbers at a time
        factor = splat(np.float32(scale * (1 + 2 * z_loss * z)))
        for i in range(0, n_columns, W):
            store_any(q, 4, i, n_columns, power(load_tail(p, 4, i, n_columns), z) * factor)
        gradient[n, y] -= scale


# ---------------------------------------------------------------------------------------------------------------------
# 5. In place. The forward pass leaves the gradient where the logits were: memory is read once and written once, as by a
#    copy. While a row is in cache, its powers overwrite it, and each is computed once. They need the largest logit
#    first; a pass that finds it costs little, because the row must come from memory anyway.


@njit
def zloss_in_place(logits, targets, z_loss, scale, cross_entropy, log_z):
    n_rows, n_columns = logits.shape
    for n in range(n_rows):
        y, p = targets[n], logits.ctypes.data + 4 * n * n_columns
        if y < 0:
            cross_entropy[n], log_z[n] = 0.0, 0.0
            logits[n, :] = 0.0
            continue
        # 1. The largest logit: the row comes from memory
        at_target, most = logits[n, y], splat(NEG_INF)
        for i in range(0, n_columns, FOUR):
            x0, x1, x2, x3 = load_four(p, i, n_columns)
            most = vmax(most, vmax(vmax(x0, x1), vmax(x2, x3)))
        # 2. The powers overwrite the row
        largest, a, b, c, d = hmax(most), splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for i in range(0, n_columns, FOUR):
            x0, x1, x2, x3 = load_four(p, i, n_columns)
            x0, x1, x2, x3 = power(x0, largest), power(x1, largest), power(x2, largest), power(x3, largest)
            store_four(p, i, n_columns, x0, x1, x2, x3)
            a, b, c, d = a + x0, b + x1, c + x2, d + x3
        total = hsum((a + b) + (c + d))
        log_z[n] = z = largest + np.float32(math.log(total))
        cross_entropy[n] = z - at_target
        # 3. The gradient overwrites the powers: p_v = exp(x_v - largest) / total
        factor = splat(np.float32(scale * (1 + 2 * z_loss * z) / total))
        for i in range(0, n_columns, W):
            store_any(p, 4, i, n_columns, load_tail(p, 4, i, n_columns) * factor)
        logits[n, y] -= scale


# ---------------------------------------------------------------------------------------------------------------------
# 6. The shipped kernel (overwrite in cpu.py). No pass for the largest: the target's logit is near enough, unless a sum
#    comes near overflow. The processor is asked for each cache line a page ahead, and four polynomials are computed in
#    step. It also takes bfloat16, has a thread for each part of the rows, and is compiled once for all processes.


def shipped(logits: Tensor, targets: Tensor, z_loss: float, scale: float) -> Results:
    with use_kernels("numba"):
        return *zloss_cross_entropy_(logits, targets, z_loss, scale), logits


# ---------------------------------------------------------------------------------------------------------------------
# The ladder


def loops(name: str, change: str, function: Callable, in_place: bool = False) -> Rung:
    """A rung in Numba, which takes arrays and writes its results into arrays, as a function of tensors."""

    def run(logits: Tensor, targets: Tensor, z_loss: float, scale: float) -> Results:
        cross_entropy, log_z = torch.empty(len(logits)), torch.empty(len(logits))
        gradient = logits if in_place else torch.empty_like(logits)
        outputs = (cross_entropy, log_z) if in_place else (cross_entropy, log_z, gradient)
        function(logits.numpy(), targets.numpy(), z_loss, scale, *(x.numpy() for x in outputs))
        return cross_entropy, log_z, gradient

    return Rung(name, change, run, python_source(function))


def on_cpu() -> Ladder:
    rungs = (
        Rung("formula", "torch's operations, each over all logits, and autograd", formula, python_source(formula)),
        loops("loops", "a logit is read when it is needed", zloss_loops),
        loops("online", "one pass for maximum and sum", zloss_online),
        loops("registers", "4 W logits at a time, exp as a polynomial, four sums", zloss_registers),
        loops("in place", "the gradient overwrites the logits", zloss_in_place, in_place=True),
        Rung(
            "shipped",
            "the target's logit is taken off, not the largest",
            shipped,
            python_source(cpu.overwrite.function),
        ),
    )
    return ladder_of(rungs, torch.device("cpu"), 2_048, 4_096)


def on_gpu(load: Callable, device: torch.device) -> Ladder:
    """The rungs of steps.cu, which `load` compiles, and the shipped kernel."""
    file = Path(__file__).with_name("steps.cu")

    def rung(name: str, change: str, rows: int, threads: int) -> Rung:
        kernel = f"zloss_{name.replace(' ', '_')}"
        return Rung(name, change, launched(load(file, kernel), rows, threads), cuda_source(file, kernel))

    rungs = (
        rung("thread a row", "the loops of a CPU, a thread for each row", rows=64, threads=64),
        rung("block a row", "256 threads share a row; a tree in shared memory", rows=1, threads=256),
        rung("warps", "shuffles instead of shared memory, loads of 16 bytes", rows=1, threads=256),
        Rung("shipped", "the row is loaded once", shipped_on_gpu, cuda_source(file.with_name("zloss.cu"), "overwrite")),
    )
    return ladder_of(rungs, device, 2_048, 65_536)


def launched(kernel: Callable, rows: int, threads: int) -> Callable[..., Results]:
    """A rung of steps.cu as a function of tensors. rows: how many rows a block of `threads` takes."""

    def run(logits: Tensor, targets: Tensor, z_loss: float, scale: float) -> Results:
        (n, v), (cross_entropy, log_z) = logits.shape, (logits.new_empty(len(logits)) for _ in range(2))
        numbers = np.int32(n), np.int32(v), np.float32(z_loss), np.float32(scale)
        kernel((-(-n // rows),), (threads,), (logits, targets, cross_entropy, log_z, *numbers))
        return cross_entropy, log_z, logits

    return run


def shipped_on_gpu(logits: Tensor, targets: Tensor, z_loss: float, scale: float) -> Results:
    kilobytes = launch.shared_kilobytes(logits.device.index)
    return *launch.zloss_overwrite(logits, targets, z_loss, scale, kilobytes), logits


def ladder_of(rungs: tuple[Rung, ...], device: torch.device, n: int, v: int) -> Ladder:
    return Ladder(
        "Loss and gradient",
        rungs,
        reference=formula,
        results=("cross-entropy", "log Z", "gradient"),
        scales=scales,
        problems=lambda: problems(device),
        timed=lambda: inputs(n, v, device=device),
        limit=Limit("a copy of the logits", copying),
    )


def copying(logits: Tensor, *_) -> Callable[[], Tensor]:
    """A job that reads and writes as much memory as a rung must."""
    return partial(torch.empty_like(logits).copy_, logits)


def scales(logits: Tensor, targets: Tensor, z_loss: float, scale: float) -> tuple[float, float, float]:
    """log Z and the target's logit cancel, and a rounded log Z changes each power by as much."""
    value = 2 * logits.abs().max().item() + 1 if logits.numel() else 1.0
    return 4 * value, 4 * value, 4 * value * scale * (1 + 2 * z_loss * value)


def inputs(n: int, v: int, size: float = 1.0, offset: float = 0.0, ignored: float = 0.0, device="cpu") -> tuple:
    """(logits, targets, z_loss, scale), the same in every run."""
    generator = torch.Generator().manual_seed(n + v)
    logits, targets = (
        offset + size * torch.randn(n, v, generator=generator),
        torch.randint(v, (n,), generator=generator),
    )
    targets[torch.rand(n, generator=generator) < ignored] = -1
    return logits.to(device), targets.to(device), 1e-3, 1 / n


def problems(device: torch.device) -> Iterator[tuple]:
    """Small, each of another kind: a single logit, sizes around a register's, far from zero, ignored rows."""
    for n, v in ((1, 1), (3, 2), (5, 37), (2, 64), (4, 65), (2, 1_025)):
        yield inputs(n, v, device=device)
    yield inputs(6, 100, ignored=0.5, device=device)
    yield inputs(3, 70, ignored=1.0, device=device)
    for offset in (-1e4, 1e4):
        yield inputs(3, 200, size=30.0, offset=offset, device=device)


if __name__ == "__main__":
    sys.exit(ladder.main(__doc__.partition("\n")[0], lambda: [on_cpu()], lambda *where: [on_gpu(*where)]))
