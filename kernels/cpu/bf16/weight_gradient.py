"""The weight gradient of a linear layer as a matmul of pairs: c (out, in) float32 = g^T x, summed over the T rows.

The sum runs down the rows of both operands, so both must be repacked:

    x   pairs of rows, operand `b`: packed once, by all threads, in blocks of 32 columns, one after the other
    g   its transpose, operand `a`: SPAN rows of a few panels of 32 outputs at a time, for all of x. A panel then stays
        in the L1 cache, and what it is multiplied by in the L2 cache

Each number of c is summed in one order, whatever the threads. T, out and in are padded with zeros to multiples of 32,
c too: the caller slices the padding off. Addresses and sizes are int64.
"""

from typing import NamedTuple

from nanochameleon.kernels.cpu.bf16.matmul import configure, matmul, matmul_add, release
from nanochameleon.kernels.cpu.bf16.pairs import BLOCK, BLOCK_ROW, SQUARE, pair_rows, whole_block
from nanochameleon.kernels.cpu.launch import kernel
from nanochameleon.kernels.cpu.parallel_for import args_unpacker
from nanochameleon.kernels.cpu.simd import W, njit, transpose

SPAN = 256  # rows of g and x at a time
PANELS = 8  # the most in a chunk
PANEL_ROW = 2 * SPAN + 64  # bytes: rows a power of two apart would map to the same cache sets
PANEL = BLOCK * PANEL_ROW
WIDTH = 32  # columns of blocks at a time: 512 KB of x
SCRATCH = (PANELS * PANEL + 3 * SQUARE) // 4  # floats


class KernelArgs(NamedTuple):
    g: int  # (T, out) bfloat16, rows `g_row` bytes apart
    x: int  # (T, in) bfloat16, rows `x_row` bytes apart
    pairs: int  # (in / 32, T / 2, 32) words, rounded up
    c: int  # (out, in) float32, rounded up to whole blocks
    t: int
    n_out: int
    n_in: int
    g_row: int
    x_row: int


unpack_args = args_unpacker(KernelArgs)


@njit
def blocks(n):
    return (n + BLOCK - 1) // BLOCK


@njit
def pack_pairs(p, row, out):
    """A block of 32 rows -> 16 rows of 32 words."""
    for r in range(0, BLOCK, 2):
        pair_rows(p + row * r, p + row * (r + 1), out + BLOCK_ROW * r)


@kernel
def pack_x(args, chunk, first, last, spare):
    """Pack x into pairs, for blocks of rows [first, last)."""
    args = unpack_args(args)
    for k in range(first, last):
        t = BLOCK * k
        for j in range(blocks(args.n_in)):
            at = args.x + args.x_row * t + BLOCK_ROW * j
            p, row = whole_block(at, args.x_row, args.t - t, args.n_in - BLOCK * j, spare)
            pack_pairs(p, row, args.pairs + SQUARE * (j * blocks(args.t) + k))


@njit
def transpose_block(args, panel, k, out, spare):
    """Transpose a block of g -> (32 outputs, 32 rows) at out."""
    at, words = args.g + args.g_row * BLOCK * k + BLOCK_ROW * panel, spare + SQUARE
    p, row = whole_block(at, args.g_row, args.t - BLOCK * k, args.n_out - BLOCK * panel, spare)
    pack_pairs(p, row, words)
    for i in range(0, BLOCK, W):
        transpose(words + 4 * i, BLOCK, out + PANEL_ROW * i, PANEL_ROW // 4)


@njit
def matmul_span(args, k, n, a, panel, j):
    """A block of c += the sum over n blocks of rows, from block k on."""
    pairs, row = args.pairs + SQUARE * (j * blocks(args.t) + k), 4 * BLOCK * blocks(args.n_in)
    c = args.c + row * BLOCK * panel + 4 * BLOCK * j
    if k == 0:
        matmul(a, PANEL_ROW, pairs, 4 * BLOCK, c, row, BLOCK, BLOCK, BLOCK * n)
    else:
        matmul_add(a, PANEL_ROW, pairs, 4 * BLOCK, c, row, BLOCK, BLOCK, BLOCK * n)


@kernel
def matmul_panels(args, chunk, first, last, scratch):
    """Panels [first, last) of c, at most PANELS, with 32 outputs each."""
    args = unpack_args(args)
    columns, steps, span = blocks(args.n_in), blocks(args.t), SPAN // BLOCK
    configure()
    for left in range(0, columns, WIDTH):
        for k in range(0, steps, span):
            n = min(span, steps - k)
            for i in range(n):
                for panel in range(first, last):
                    a = scratch + PANEL * (panel - first) + BLOCK_ROW * i
                    transpose_block(args, panel, k + i, a, scratch + PANEL * PANELS)
            for panel in range(first, last):
                for j in range(left, min(left + WIDTH, columns)):
                    matmul_span(args, k, n, scratch + PANEL * (panel - first), panel, j)
    release()
