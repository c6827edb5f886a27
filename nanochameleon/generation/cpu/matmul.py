"""Matmul of activations and weights, both as they are in memory: out[r, n] = scale[n] * sum_k x[r, k] w[n, k].

A tile is up to ROWS rows by OUTS outputs. Each pair has one register of partial sums that runs along k; at the end a
tree adds up the lanes of all registers at once. So the weights need no other layout, and a few rows cost as much as
one, since all wait for the weights. A result's bits depend on its own row and weights alone, never on the other rows.

Weights are float32, or int8 with one scale per output.
"""

from functools import cache

from llvmlite import ir
from numba import types

from nanochameleon.generation.cpu.memory import call_at
from nanochameleon.kernels.cpu.launch import compiled
from nanochameleon.kernels.cpu.simd import (
    FUSE,
    VI,
    V,
    W,
    address,
    butterfly,
    call_of,
    constant,
    count,
    f32,
    i32,
    i64,
    instruction,
    lanes_below,
    load_at,
    pointer,
)

ROWS, OUTS = 4, W // 4  # as many registers of sums as a register has lanes
TILES = 4  # tiles of ROWS rows of x, which stay in the L1 cache while all weights pass by
AHEAD = 2 * OUTS  # rows of weights: how far ahead they are prefetched
SHARES = sorted({-(-OUTS // tiles) for tiles in range(1, TILES + 1)})  # rows of weights that a tile prefetches
L2 = 2  # the cache to which they are prefetched: far fewer lines can be on their way to L1 at once

# ---------------------------------------------------------------------------------------------------------------------
# Pieces of LLVM


def masked_load(b, p, mask, kind, name: str):
    """Load the lanes of the mask; the others are 0, and their memory is not touched."""
    zeros = ir.Constant(kind, [0] * W)
    return call_of(b, f"llvm.masked.load.v{W}{name}.p0", kind, b.inttoptr(p, kind.as_pointer()), i32(1), mask, zeros)


def read(b, p, size: int, mask):
    """Load W numbers of 4 bytes (float32) or of 1 byte (int8, converted to float32)."""
    if size == 4:
        return load_at(b, p) if mask is None else masked_load(b, p, mask, V, "f32")
    kind = ir.VectorType(ir.IntType(8), W)
    codes = b.load(b.inttoptr(p, kind.as_pointer()), align=1) if mask is None else masked_load(b, p, mask, kind, "i8")
    return b.sitofp(b.sext(codes, VI), V)


def prefetch(b, p) -> None:
    """Request a cache line early."""
    byte = ir.IntType(8).as_pointer()
    call_of(b, "llvm.prefetch", ir.VoidType(), b.inttoptr(p, byte), i32(0), i32(L2), i32(1))


def hsums(b, sums: list):
    """Up to W registers -> one register of their horizontal sums, in order.

    Each level adds the halves of blocks of two registers at a time, so every sum is added up in the same order.
    """
    sums, d = [sums[i % len(sums)] for i in range(W)], W // 2
    while d:
        low, high = butterfly(d)
        pairs = zip(sums[:d], sums[d:], strict=True)
        sums = [b.fadd(b.shuffle_vector(x, y, low), b.shuffle_vector(x, y, high)) for x, y in pairs]
        d //= 2
    return sums[0]


def sums_along_k(b, xs: list, ws: list, k, size: int, ahead: list) -> list:
    """One register of partial sums for each pair of a row of x and a row of w. ahead: rows of w to prefetch."""
    whole, zero, n = b.and_(k, i64(-W)), i64(0), len(xs) * len(ws)

    def step(at, sums, mask):
        left = [read(b, b.add(p, b.mul(at, i64(4))), 4, mask) for p in xs]
        right = [read(b, b.add(p, b.mul(at, i64(size))), size, mask) for p in ws]
        products = [b.fmul(x, w, flags=FUSE) for x in left for w in right]
        return [b.fadd(product, total, flags=FUSE) for product, total in zip(products, sums, strict=True)]

    def phis(*ways):
        made = [b.phi(V) for _ in range(n)]
        for values, block in ways:
            for phi, value in zip(made, values, strict=True):
                phi.add_incoming(value, block)
        return made

    before, loop, rest, tail, end = b.block, *(b.append_basic_block(name) for name in ("k", "rest", "tail", "end"))
    nothing = [constant(0.0)] * n
    b.cbranch(b.icmp_signed(">", whole, zero), loop, rest)
    b.position_at_end(loop)
    at, sums = b.phi(i64), phis((nothing, before))
    for p in ahead:  # the processor's own prefetcher loses track of so many short streams
        prefetch(b, b.add(p, b.mul(at, i64(size))))
    new, following = step(at, sums, None), b.add(at, i64(W))
    for phi, first, value in [(at, zero, following), *zip(sums, nothing, new, strict=True)]:
        if phi is at:
            phi.add_incoming(first, before)
        phi.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", following, whole), loop, rest)
    b.position_at_end(rest)
    sums = phis((nothing, before), (new, loop))
    b.cbranch(b.icmp_signed("<", whole, k), tail, end)
    b.position_at_end(tail)
    new = step(whole, sums, lanes_below(b, b.sub(k, whole)))
    b.branch(end)
    b.position_at_end(end)
    return phis((sums, rest), (new, tail))


def emit_tile(b, size: int, rows: int, outs: int, share: int, x, stride_x, w, k, scale, out, stride_out, ahead) -> None:
    xs = [b.add(x, b.mul(stride_x, i64(r))) for r in range(rows)]
    ws = [b.add(w, b.mul(k, i64(size * j))) for j in range(outs)]
    ahead = [b.add(ahead, b.mul(k, i64(size * j))) for j in range(share)]
    total = hsums(b, sums_along_k(b, xs, ws, k, size, ahead))
    kind = ir.VectorType(f32, outs)
    for r in range(rows):
        order = ir.Constant(ir.VectorType(i32, outs), [r * outs + j for j in range(outs)])
        part = b.shuffle_vector(total, total, order)
        if size == 1:
            part = b.fmul(part, b.load(pointer(b, scale, kind), align=4))
        b.store(part, b.inttoptr(b.add(out, b.mul(stride_out, i64(r))), kind.as_pointer()), align=4)


# ---------------------------------------------------------------------------------------------------------------------
# The matmul

ARGUMENTS = 10  # of the matmul, all int64


def make_tile(size: int):
    """Make tile(...): up to ROWS rows and OUTS outputs, or 1 and 1. Weights have `size` bytes, strides are in bytes.

    `share` is how many rows of weights it prefetches, starting at address `ahead`: one of SHARES, or 0 with 1 output.
    For any other numbers it does nothing.
    """

    @instruction(types.void, count, count, count, address, count, address, count, address, address, count, address)
    def tile(b, rows, outs, share, x, stride_x, w, k, scale, out, stride_out, ahead):
        rest = x, stride_x, w, k, scale, out, stride_out, ahead  # no *args: Numba counts the parameters
        kinds = [(r, OUTS, some) for some in SHARES for r in range(1, ROWS + 1)]
        for kind in [*kinds, (1, 1, 0)]:
            same = [b.icmp_signed("==", x, i64(y)) for x, y in zip((rows, outs, share), kind, strict=True)]
            with b.if_then(b.and_(b.and_(same[0], same[1]), same[2])):
                emit_tile(b, size, *kind, *rest)

    return tile


tile_fp32, tile_int8 = make_tile(4), make_tile(1)


@cache
def matmul_address(size: int) -> int:
    """The address of the compiled matmul for weights of `size` bytes a number."""

    def matmul(x, rows, stride_x, w, k, scale, first, last, out, stride_out):
        """Outputs first .. last - 1 of `rows` rows; x, w (N, k), scale and out are addresses, strides in floats."""
        for some in range(0, rows, TILES * ROWS):
            most = min(some + TILES * ROWS, rows)
            tiles = (most - some + ROWS - 1) // ROWS
            n = first
            while n < last:
                outs, each = (OUTS, ROWS) if n + OUTS <= last else (1, 1)
                # rounded up: 3 tiles, or 4 where OUTS is 2, ask for some rows twice
                share = (OUTS + tiles - 1) // tiles if outs == OUTS else 0
                for r in range(some, most, each):
                    from_x, from_w = x + 4 * r * stride_x, w + size * n * k
                    ahead = from_w + size * k * (AHEAD + (r - some) // ROWS * share)
                    to, n_rows = out + 4 * (r * stride_out + n), min(each, most - r)
                    if size == 4:
                        tile_fp32(n_rows, outs, share, from_x, 4 * stride_x, from_w, k, 0, to, 4 * stride_out, ahead)
                    else:
                        scales = scale + 4 * n
                        tile_int8(
                            n_rows, outs, share, from_x, 4 * stride_x, from_w, k, scales, to, 4 * stride_out, ahead
                        )
                n += outs

    return compiled(matmul, ARGUMENTS).address


@instruction(types.void, *[address] * (1 + ARGUMENTS))
def call_matmul(b, function, x, rows, stride_x, w, k, scale, first, last, out, stride_out):
    call_at(b, function, x, rows, stride_x, w, k, scale, first, last, out, stride_out)
