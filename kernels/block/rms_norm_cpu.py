"""RMSNorm and the residual sum beside it for the CPU: one pass over each row, where torch's operations make six.

With r = 1 / sqrt(mean x^2 + eps): norm(x) = x r w, and for the gradient g of it, with u = g w:
    dx = r (u - x r^2 mean(u x)),   dw = sum g x r.

Rows go through scratch in the first-level cache, in float32, filled with zeros up to whole registers. Each part keeps
its own sum of dw. Addresses and sizes are int64.
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
    x: int  # (N, D), of `size` bytes a number: 4 float32, 2 bfloat16
    branch: int  # (N, D), of `branch_size`, or 0
    weight: int  # (width,) float32
    s: int  # like x: the sum, or 0
    y: int  # (N, D), of `y_size`: what the next products read
    ds: int  # the gradients of all these, 0 in the forward pass and where there is none
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
def inverse_rms(row, job):
    a, b = splat(ZERO), splat(ZERO)
    pair = job.width // (2 * W) * 2 * W
    for i in range(0, pair, 2 * W):
        x, y = load(row + 4 * i), load(row + 4 * (i + W))
        a += x * x
        b += y * y
    if pair < job.width:
        x = load(row + 4 * pair)
        a += x * x
    return ONE / math.sqrt(hsum(a + b) / np.float32(job.d) + job.eps)


@njit
def norm(row, job):
    """In place."""
    r = splat(inverse_rms(row, job))
    for i in range(0, job.width, W):
        store(row + 4 * i, load(row + 4 * i) * r * load(job.weight + 4 * i))


@njit
def norm_backward(row, g, job, d_weight):
    """The gradient g of the norm of this row -> that of the row, in place; adds to d_weight."""
    inverse, s = inverse_rms(row, job), splat(ZERO)
    r = splat(inverse)
    for i in range(0, job.width, W):
        x, y = load(row + 4 * i), load(g + 4 * i)
        store(d_weight + 4 * i, load(d_weight + 4 * i) + y * x * r)
        u = y * load(job.weight + 4 * i)
        store(g + 4 * i, u)
        s += u * x
    mean = splat(hsum(s) / np.float32(job.d) * inverse * inverse)
    for i in range(0, job.width, W):
        store(g + 4 * i, (load(g + 4 * i) - load(row + 4 * i) * mean) * r)


@njit
def ahead(p, size, job):
    """Asks for what follows a row at p."""
    for i in range(AHEAD, AHEAD + size * job.d, 64):
        prefetch(p + i)


@njit
def read(p, size, n, job, row):
    ahead(p + size * n, size, job)
    read_row(p + size * n, size, job.d, row)


@njit
def write(p, size, n, job, row):
    ahead(p + size * n, size, job)
    write_row(p + size * n, size, job.d, row, ONE)


@njit
def add_row(p, size, n, job, row, extra):
    """row += the row that begins at number n of p."""
    read(p, size, n, job, extra)
    for i in range(0, job.width, W):
        store(row + 4 * i, load(row + 4 * i) + load(extra + 4 * i))


@kernel
def add_norm(job, part, first, last, row):
    """s = x + branch, y = norm(s); without a branch y = norm(x)."""
    job = unpack_args(job)
    extra = row + 4 * job.width
    for n in range(first * job.d, last * job.d, job.d):
        read(job.x, job.size, n, job, row)
        if job.branch != 0:
            add_row(job.branch, job.branch_size, n, job, row, extra)
            write(job.s, job.size, n, job, row)
        norm(row, job)
        write(job.y, job.y_size, n, job, row)


@kernel
def add_norm_backward(job, part, first, last, row):
    """x is what was normed. dx = ds + the norm's gradient, or that alone where ds is 0; d_branch the same, unless 0."""
    job = unpack_args(job)
    d_weight, g, extra = job.d_weight + 4 * part * job.width, row + 4 * job.width, row + 8 * job.width
    clear(d_weight, job.width)
    for n in range(first * job.d, last * job.d, job.d):
        read(job.x, job.size, n, job, row)
        read(job.dy, job.y_size, n, job, g)
        norm_backward(row, g, job, d_weight)
        if job.ds != 0:
            add_row(job.ds, job.size, n, job, g, extra)
        if job.d_branch != 0:
            write(job.d_branch, job.branch_size, n, job, g)
        write(job.dx, job.size, n, job, g)


@kernel
def norm_add(job, part, first, last, row):
    """s = x + norm(branch). Its gradient is the norm's alone: `add_norm_backward` without ds."""
    job = unpack_args(job)
    extra = row + 4 * job.width
    for n in range(first * job.d, last * job.d, job.d):
        read(job.branch, job.branch_size, n, job, row)
        norm(row, job)
        add_row(job.x, job.size, n, job, row, extra)
        write(job.s, job.size, n, job, row)
