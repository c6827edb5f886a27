"""A linear layer's weight gradient on tiles (amx.py): c (out, in) float32 = g^T x, sums over the T rows of a batch.

The sum runs down the rows of both, so both have to be turned into what tiles take:

    x   pairs of rows, a product's b: once, by all threads, in blocks of 32 columns that lie behind one another
    g   its transpose, a product's a: a panel of 32 outputs and SPAN rows at a time, which stays in the first-level
        cache for all of x; a thread's panels follow one another on the same rows of x, which stay in the second level

Each number of c is summed in one order, whatever the threads. T, out and in are filled up to multiples of 32 with
zeros, c too: its caller leaves the margins out. Addresses and sizes are int64.
"""

from typing import NamedTuple

from nanochameleon.kernels.amx import (
    BLOCK,
    block_product,
    block_product_add,
    pair_rows,
    release_tiles,
    take_tiles,
)
from nanochameleon.kernels.launch import kernel
from nanochameleon.kernels.region_numba import reader
from nanochameleon.kernels.simd import W, clear, njit, peek_bf16, poke_bf16, transpose

ROW = 2 * BLOCK  # bytes of a block's row
SQUARE = BLOCK * ROW  # and of a block
SPAN = 512  # rows of g and x at a time: of a panel 32 KB, of 256 columns of x 256 KB
PANEL_ROW = 2 * SPAN + 64  # bytes: rows a whole number of pages apart would fall onto the same places of the cache
WIDTH = 1_024  # columns of x at a time
SCRATCH = (BLOCK * PANEL_ROW + 3 * SQUARE) // 4  # floats


class Job(NamedTuple):
    g: int  # (T, out) bfloat16, rows `g_row` bytes apart
    x: int  # (T, in) bfloat16, rows `x_row` bytes apart
    pairs: int  # (in / 32, T / 2, 32) words, rounded up
    c: int  # (out, in) float32, rounded up to whole blocks
    t: int
    n_out: int
    n_in: int
    g_row: int
    x_row: int


read_job = reader(Job)


@njit
def blocks(n):
    return (n + BLOCK - 1) // BLOCK


@njit
def whole_block(p, row, n, m, spare):
    """(place, bytes from row to row) of a block of which n rows and m columns are there: itself, or in spare memory,
    with zeros for what is not."""
    if n >= BLOCK and m >= BLOCK:
        return p, row
    clear(spare, SQUARE // 4)
    for r in range(min(n, BLOCK)):
        for i in range(min(m, BLOCK)):
            poke_bf16(spare + ROW * r + 2 * i, peek_bf16(p + row * r + 2 * i))
    return spare, ROW


@njit
def to_pairs(p, row, out):
    """A block as 16 rows of 32 words."""
    for r in range(0, BLOCK, 2):
        pair_rows(p + row * r, p + row * (r + 1), out + ROW * r)


@kernel
def pack(job, part, first, last, spare):
    """x in pairs, [first, last) of its blocks of rows."""
    job = read_job(job)
    for k in range(first, last):
        t = BLOCK * k
        for j in range(blocks(job.n_in)):
            at = job.x + job.x_row * t + ROW * j
            p, row = whole_block(at, job.x_row, job.t - t, job.n_in - BLOCK * j, spare)
            to_pairs(p, row, job.pairs + SQUARE * (j * blocks(job.t) + k))


@njit
def transpose_panel(job, panel, first, last, out, spare):
    """Rows' blocks [first, last) of a panel of g -> (32 outputs, rows) at out."""
    words = spare + SQUARE
    for k in range(first, last):
        at, left = job.g + job.g_row * BLOCK * k + ROW * panel, job.n_out - BLOCK * panel
        p, row = whole_block(at, job.g_row, job.t - BLOCK * k, left, spare)
        to_pairs(p, row, words)
        for i in range(0, BLOCK, W):
            transpose(words + 4 * i, BLOCK, out + PANEL_ROW * i + ROW * (k - first), PANEL_ROW // 4)


@kernel
def multiply(job, part, first, last, scratch):
    """Panels [first, last) of c: 32 outputs each."""
    job = read_job(job)
    steps, columns, spare = blocks(job.t), blocks(job.n_in), scratch + BLOCK * PANEL_ROW
    row, span, width = 4 * BLOCK * columns, SPAN // BLOCK, WIDTH // BLOCK
    take_tiles()
    for left in range(0, columns, width):
        for k in range(0, steps, span):
            n = min(span, steps - k)
            for panel in range(first, last):
                transpose_panel(job, panel, k, k + n, scratch, spare)
                for j in range(left, min(left + width, columns)):
                    pairs, c = job.pairs + SQUARE * (j * steps + k), job.c + row * BLOCK * panel + 4 * BLOCK * j
                    if k == 0:
                        block_product(scratch, PANEL_ROW, pairs, 4 * BLOCK, c, row, BLOCK * n)
                    else:
                        block_product_add(scratch, PANEL_ROW, pairs, 4 * BLOCK, c, row, BLOCK * n)
    release_tiles()
