"""SwiGLU for CPUs: silu(a) b in one pass. silu(a) = a s with s = 1 / (1 + 2^(-a log2 e)).

Backward, with g the gradient of the result: da = g b s (1 + a (1 - s)),   db = g a s.
Rows of F numbers, of `size` bytes each. Rows of a and b may be parts of one wide row, as those of da and db are.
"""

import math
from typing import NamedTuple

import numpy as np

from nanochameleon.kernels.cpu.exp2 import HAS_SCALEF, exp2, exp2_bf16, inverse_bf16
from nanochameleon.kernels.cpu.launch import kernel
from nanochameleon.kernels.cpu.parallel_for import args_unpacker
from nanochameleon.kernels.cpu.simd import (
    AHEAD,
    W,
    load,
    load_bf16,
    njit,
    prefetch,
    read_row,
    splat,
    store,
    store_bf16,
    vdiv,
    write_row,
)

MINUS_LOG2E, ONE = np.float32(-1 / math.log(2)), np.float32(1)


class KernelArgs(NamedTuple):
    a: int  # (N, F), rows `a_row` numbers apart
    b: int
    y: int  # (N, F): the result, and in the backward pass its gradient
    da: int  # (N, F), rows 2 F numbers apart
    db: int
    f: int
    a_row: int
    b_row: int
    size: int  # 4 float32, 2 bfloat16


unpack_args = args_unpacker(KernelArgs)


@njit
def inverse(x):
    return vdiv(splat(ONE), x)


def _sigmoid(exp2, inverse):
    """A sigmoid as exact as these two functions."""

    @njit
    def sigmoid(x):
        return inverse(splat(ONE) + exp2(x * splat(MINUS_LOG2E)))

    return sigmoid


def _rows(load, store, size, sigmoid):
    """gate and gate_backward for whole registers of one dtype."""

    @njit
    def gate(a, b, y, n):
        for i in range(0, size * n, size * W):
            x = load(a + i)
            for stream in (a, b, y):
                prefetch(stream + i + AHEAD)
            store(y + i, x * sigmoid(x) * load(b + i))

    @njit
    def gate_backward(a, b, g, da, db, n):
        for i in range(0, size * n, size * W):
            x, y = load(a + i), load(g + i)
            for stream in (a, b, g, da, db):
                prefetch(stream + i + AHEAD)
            s = sigmoid(x)
            store(da + i, y * load(b + i) * s * (splat(ONE) + x * (splat(ONE) - s)))
            store(db + i, y * x * s)

    return gate, gate_backward


sigmoid = _sigmoid(exp2, inverse)
sigmoid_bf16 = _sigmoid(exp2_bf16 if HAS_SCALEF else exp2, inverse_bf16)
gate, gate_backward = _rows(load, store, 4, sigmoid)
gate_bf16, gate_bf16_backward = _rows(load_bf16, store_bf16, 2, sigmoid_bf16)


@kernel
def forward(args, chunk, first, last, scratch):
    args = unpack_args(args)
    size, whole = args.size, args.f // W * W
    tail, rest = size * whole, args.f - whole
    for n in range(first, last):
        a, b, y = args.a + size * n * args.a_row, args.b + size * n * args.b_row, args.y + size * n * args.f
        if size == 4:
            gate(a, b, y, whole)
        else:
            gate_bf16(a, b, y, whole)
        if rest:
            read_row(a + tail, size, rest, scratch)
            read_row(b + tail, size, rest, scratch + 4 * W)
            gate(scratch, scratch + 4 * W, scratch, W)
            write_row(y + tail, size, rest, scratch, ONE)


@kernel
def backward(args, chunk, first, last, scratch):
    args = unpack_args(args)
    size, whole = args.size, args.f // W * W
    tail, rest = size * whole, args.f - whole
    for n in range(first, last):
        a, b, g = args.a + size * n * args.a_row, args.b + size * n * args.b_row, args.y + size * n * args.f
        da, db = args.da + 2 * size * n * args.f, args.db + 2 * size * n * args.f
        if size == 4:
            gate_backward(a, b, g, da, db, whole)
        else:
            gate_bf16_backward(a, b, g, da, db, whole)
        if rest:
            for i, row in enumerate((a, b, g)):
                read_row(row + tail, size, rest, scratch + 4 * W * i)
            gate_backward(scratch, scratch + 4 * W, scratch + 8 * W, scratch, scratch + 4 * W, W)
            write_row(da + tail, size, rest, scratch, ONE)
            write_row(db + tail, size, rest, scratch + 4 * W, ONE)
