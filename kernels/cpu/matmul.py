"""Float32 matmul on register tiles: ROWS x n registers of sums stay in registers while k runs.

Attention is built around it, and so is the engine's decode step. All strides count floats.
"""

from llvmlite import ir
from numba import njit, types

from nanochameleon.kernels.cpu.simd import (
    FUSE,
    V,
    W,
    address,
    count,
    f32,
    i64,
    instruction,
    load_at,
    pointer,
    splat_of,
    store_at,
)

ROWS, COLUMNS = 4, (4 if W == 16 else 3)  # ROWS x COLUMNS sums: 16 of 32 registers, or 12 of 16
STRIP = COLUMNS * W


def emit_matmul(b, rows: int, n: int, a, lda, a_step, p, ldb, k, start: list) -> list:
    """Emit start[r, v] + sum_k a[r * lda + k * a_step] * p[k * ldb + v], as one loop over k."""
    lda, a_step, ldb = (b.mul(stride, ir.Constant(i64, 4)) for stride in (lda, a_step, ldb))
    shifts = [b.mul(lda, ir.Constant(i64, r)) for r in range(rows)]
    before, loop, after = b.block, b.append_basic_block("k"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    left, at_a, at_p = (b.phi(i64) for _ in range(3))
    sums = [b.phi(V) for _ in start]
    columns = [load_at(b, at_p, W * v) for v in range(n)]
    new = []
    for r in range(rows):
        scalar = splat_of(b, b.load(pointer(b, b.add(at_a, shifts[r]), f32), align=4))
        new += [b.fadd(b.fmul(scalar, columns[v], flags=FUSE), sums[r * n + v], flags=FUSE) for v in range(n)]
    less = b.sub(left, ir.Constant(i64, 1))
    steps = [(left, k, less), (at_a, a, b.add(at_a, a_step)), (at_p, p, b.add(at_p, ldb))]
    steps += zip(sums, start, new, strict=True)
    for phi, first, following in steps:
        phi.add_incoming(first, before)
        phi.add_incoming(following, loop)
    b.cbranch(b.icmp_signed(">", less, ir.Constant(i64, 0)), loop, after)
    b.position_at_end(after)
    return new


def for_each_size(b, rows, n, emit) -> None:
    """Emit emit(r, v) for r = ROWS and 1 and v = 1 .. COLUMNS, each in an `if` that compares with rows and n."""
    for r in (ROWS, 1):
        with b.if_then(b.icmp_signed("==", rows, ir.Constant(i64, r))):
            for v in range(1, COLUMNS + 1):
                with b.if_then(b.icmp_signed("==", n, ir.Constant(i64, v))):
                    emit(r, v)


@instruction(types.void, count, count, address, count, count, address, count, address, count, count)
def block_matmul_add(b, rows, n, a, lda, a_step, p, ldb, c, ldc, k):
    """c[r, :] += sum_k a[r * lda + k * a_step] p[k, :] for `rows` (ROWS or 1) rows of n vectors."""

    def emit(r: int, v: int) -> None:
        at = [b.add(c, b.mul(ldc, ir.Constant(i64, 4 * i))) for i in range(r)]
        start = [load_at(b, at[i], W * j) for i in range(r) for j in range(v)]
        for i, x in enumerate(emit_matmul(b, r, v, a, lda, a_step, p, ldb, k, start)):
            store_at(b, x, at[i // v], W * (i % v))

    for_each_size(b, rows, n, emit)


@njit
def matmul_add(m, n, a, lda, a_step, p, ldb, c, ldc, k):
    """c (m, n) += a p, n a multiple of W."""
    for j in range(0, n, STRIP):
        vectors = min(STRIP, n - j) // W
        i = 0
        while i < m:
            rows = ROWS if i + ROWS <= m else 1
            block_matmul_add(rows, vectors, a + 4 * i * lda, lda, a_step, p + 4 * j, ldb, c + 4 * (i * ldc + j), ldc, k)
            i += rows
