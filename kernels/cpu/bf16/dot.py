"""Matmuls of bfloat16 pairs without a matrix unit: VDPBF16PS adds 16 products of pairs to 16 float32 sums.

    c[r, :] += sum over pairs k of   a[2k] p[2k, :] + a[2k + 1] p[2k + 1, :]        twice the arithmetic of an FMA

The operands are those of AMX tiles (pairs.py): a pair of `a` is a word that all lanes get. On a Zen 4 these loops reach
235 GFLOP/s a core, and loops of FMAs 117 (matmul.py of float32). ROWS x n registers of sums stay in registers while k
runs. Strides are bytes, k is even.
"""

from llvmlite import ir

from nanochameleon.kernels.cpu.bf16.pairs import high_half, low_half
from nanochameleon.kernels.cpu.simd import (
    FEATURES,
    FUSE,
    VI,
    V,
    W,
    address,
    call_of,
    constant,
    count,
    i32,
    i64,
    instruction,
    load_at,
    pointer,
    splat_of,
    store_at,
    types,
)

ROWS, COLUMNS = 8, 3  # registers of sums: at most 24 of 32


class BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite lacks."""

    null = "0.0"

    def __str__(self) -> str:
        return "bfloat"


BFloat._create_instance()
PAIRS = ir.VectorType(BFloat(), 2 * W)


def _dot(b, sums, x, y):
    """sums + the dot products of the pairs in words x and y. FMAs, where the instruction is missing, are for tests."""
    if "+avx512bf16" not in FEATURES:
        for half in (low_half, high_half):
            sums = b.fadd(b.fmul(half(b, x), half(b, y), flags=FUSE), sums, flags=FUSE)
        return sums
    return call_of(b, "llvm.x86.avx512bf16.dpbf16ps.512", V, sums, b.bitcast(x, PAIRS), b.bitcast(y, PAIRS))


def _rows(b, n: int, a, lda, p, ldp, at: list, k, start: list) -> None:
    """Emit ROWS rows of n registers at the addresses `at`: start + a p, as one loop over pairs."""
    shifts = [b.mul(lda, ir.Constant(i64, r)) for r in range(ROWS)]
    before, loop, after = b.block, b.append_basic_block("k"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    left, at_a, at_p = (b.phi(i64) for _ in range(3))
    sums = [b.phi(V) for _ in start]
    columns = [b.bitcast(load_at(b, at_p, W * v), VI) for v in range(n)]
    new = []
    for r in range(ROWS):
        word = splat_of(b, b.load(pointer(b, b.add(at_a, shifts[r]), i32), align=2), VI)
        new += [_dot(b, sums[r * n + v], word, columns[v]) for v in range(n)]
    less = b.sub(left, ir.Constant(i64, 2))
    steps = [(left, k, less), (at_a, a, b.add(at_a, ir.Constant(i64, 4))), (at_p, p, b.add(at_p, ldp))]
    steps += zip(sums, start, new, strict=True)
    for phi, first, following in steps:
        phi.add_incoming(first, before)
        phi.add_incoming(following, loop)
    b.cbranch(b.icmp_signed(">", less, ir.Constant(i64, 0)), loop, after)
    b.position_at_end(after)
    for i, x in enumerate(new):
        store_at(b, x, at[i // n], W * (i % n))


def _block(b, n, a, lda, p, ldp, c, ldc, k, add: bool) -> None:
    at = [b.add(c, b.mul(ldc, ir.Constant(i64, r))) for r in range(ROWS)]
    for v in range(1, COLUMNS + 1):
        with b.if_then(b.icmp_signed("==", n, ir.Constant(i64, v))):
            start = [load_at(b, x, W * i) if add else constant(0.0) for x in at for i in range(v)]
            _rows(b, v, a, lda, p, ldp, at, k, start)


@instruction(types.void, count, address, count, address, count, address, count, count)
def dot_block(b, n, a, lda, p, ldp, c, ldc, k):
    """c (ROWS, n registers) = a (ROWS, k) times p, the (k, n registers) in pairs of rows; n is at most COLUMNS."""
    _block(b, n, a, lda, p, ldp, c, ldc, k, False)


@instruction(types.void, count, address, count, address, count, address, count, count)
def dot_block_add(b, n, a, lda, p, ldp, c, ldc, k):
    """c += a p."""
    _block(b, n, a, lda, p, ldp, c, ldc, k, True)
