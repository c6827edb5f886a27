"""RMSNorm and the residual sum next to it for CPUs: one pass over each row, where torch's operations make six.

With r = 1 / sqrt(mean x^2 + eps): norm(x) = x r w. For its gradient g, with u = g w:
    dx = r (u - x r^2 mean(u x)),   dw = sum g x r.

Rows go through scratch in the L1 cache, in float32, padded with zeros to whole registers. Each chunk keeps its own sum
of dw. Addresses and sizes are int64. Which of the three ops is run: rms_norm.py.
"""

import math
from typing import NamedTuple

import numpy as np

from nanochameleon.kernels.cpu.launch import kernel
from nanochameleon.kernels.cpu.parallel_for import args_unpacker
from nanochameleon.kernels.cpu.simd import (
    AHEAD,
    ZERO,
    W,
    clear,
    hsum,
    load,
    njit,
    prefetch,
    read_row,
    splat,
    store,
    write_row,
)


class KernelArgs(NamedTuple):
    x: int  # (N, D), of `size` bytes a number (4 float32, 2 bfloat16)
    branch: int  # (N, D), of `branch_size`, or 0
    weight: int  # (width,) float32
    s: int  # like x: the sum, or 0
    y: int  # (N, D), of `y_size`: what the next matmuls read
    ds: int  # gradients: 0 in the forward pass and where there is none
    dy: int
    dx: int
    d_branch: int
    d_weight: int  # (parts, width) float32
    d: int
    width: int  # D rounded up to whole registers
    size: int
    branch_size: int
    y_size: int
    eps: float


unpack_args = args_unpacker(KernelArgs)
ONE = np.float32(1)


@njit
def inverse_rms(row, args):
    """1 / sqrt(mean x^2 + eps), with two running sums, since one would wait for itself."""
    a, b = splat(ZERO), splat(ZERO)
    pair = args.width // (2 * W) * 2 * W
    for i in range(0, pair, 2 * W):
        x, y = load(row + 4 * i), load(row + 4 * (i + W))
        a += x * x
        b += y * y
    if pair < args.width:
        x = load(row + 4 * pair)
        a += x * x
    return ONE / math.sqrt(hsum(a + b) / np.float32(args.d) + args.eps)


@njit
def norm(row, args):
    """Normalise a row, in place."""
    r = splat(inverse_rms(row, args))
    for i in range(0, args.width, W):
        store(row + 4 * i, load(row + 4 * i) * r * load(args.weight + 4 * i))


@njit
def norm_backward(row, g, args, d_weight):
    """The gradient g of the normed row -> that of the row, in place; adds to d_weight."""
    inverse, s = inverse_rms(row, args), splat(ZERO)
    r = splat(inverse)
    for i in range(0, args.width, W):
        x, y = load(row + 4 * i), load(g + 4 * i)
        store(d_weight + 4 * i, load(d_weight + 4 * i) + y * x * r)
        u = y * load(args.weight + 4 * i)
        store(g + 4 * i, u)
        s += u * x
    mean = splat(hsum(s) / np.float32(args.d) * inverse * inverse)
    for i in range(0, args.width, W):
        store(g + 4 * i, (load(g + 4 * i) - load(row + 4 * i) * mean) * r)


@njit
def ahead(p, size, args):
    """Prefetch what comes AHEAD bytes after a row at p."""
    for i in range(AHEAD, AHEAD + size * args.d, 64):
        prefetch(p + i)


@njit
def read(p, size, n, args, row):
    ahead(p + size * n, size, args)
    read_row(p + size * n, size, args.d, row)


@njit
def write(p, size, n, args, row):
    ahead(p + size * n, size, args)
    write_row(p + size * n, size, args.d, row, ONE)


@njit
def add_row(p, size, n, args, row, extra):
    """row += the row that begins n numbers after p."""
    read(p, size, n, args, extra)
    for i in range(0, args.width, W):
        store(row + 4 * i, load(row + 4 * i) + load(extra + 4 * i))


@kernel
def add_norm(args, chunk, first, last, row):
    """s = x + branch, y = norm(s); without a branch y = norm(x)."""
    args = unpack_args(args)
    extra = row + 4 * args.width
    for n in range(first * args.d, last * args.d, args.d):
        read(args.x, args.size, n, args, row)
        if args.branch != 0:
            add_row(args.branch, args.branch_size, n, args, row, extra)
            write(args.s, args.size, n, args, row)
        norm(row, args)
        write(args.y, args.y_size, n, args, row)


@kernel
def add_norm_backward(args, chunk, first, last, row):
    """dx = ds + the norm's gradient at x. Addresses ds and d_branch may be 0; d_branch gets a copy of dx."""
    args = unpack_args(args)
    d_weight, g, extra = args.d_weight + 4 * chunk * args.width, row + 4 * args.width, row + 8 * args.width
    clear(d_weight, args.width)
    for n in range(first * args.d, last * args.d, args.d):
        read(args.x, args.size, n, args, row)
        read(args.dy, args.y_size, n, args, g)
        norm_backward(row, g, args, d_weight)
        if args.ds != 0:
            add_row(args.ds, args.size, n, args, g, extra)
        if args.d_branch != 0:
            write(args.d_branch, args.branch_size, n, args, g)
        write(args.dx, args.size, n, args, g)


@kernel
def norm_add(args, chunk, first, last, row):
    """s = x + norm(branch). Its gradient is the norm's alone: `add_norm_backward` without ds."""
    args = unpack_args(args)
    extra = row + 4 * args.width
    for n in range(first * args.d, last * args.d, args.d):
        read(args.branch, args.branch_size, n, args, row)
        norm(row, args)
        add_row(args.x, args.size, n, args, row, extra)
        write(args.s, args.size, n, args, row)
