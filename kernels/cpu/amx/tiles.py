"""AMX tiles, the matrix unit of newer Xeons, for Numba: eight registers of 16 rows of 64 bytes.

    c (16, 16) float32 += a (16, 32) bfloat16 * b (32, 16) bfloat16        one instruction, 16 cycles: tdpbf16ps

which is 16 times the arithmetic of float32 vectors. Its operands in memory:

    a   rows: 32 adjacent numbers that are summed over
    b   rows of pairs: word n of row r holds (b[2r, n], b[2r + 1, n]), both for one step of the sum ("VNNI")

Two moves make either from rows of numbers, both exact:

    store_pairs   two rows -> one row of pairs: b for sums over rows; pair_rows where they are bfloat16 already
    transpose     of words (simd.py). Of rows taken as words it makes pairs of the transpose: b for sums along rows.
                  Of pairs it makes rows of the transpose: a for sums over rows

Matmuls make (32, 32) blocks, four tiles of sums at a time, so that each tile that is loaded is used twice. Strides are
bytes, k is a multiple of 32. Every kernel configures the tiles when it starts and releases them when it ends.

Machines without these instructions never compile this: `why_unavailable` says what is missing.
"""

import ctypes
from functools import cache

from llvmlite import ir
from numba.core import cgutils

from nanochameleon.kernels.cpu.simd import (
    FEATURES,
    VH,
    VI,
    V,
    W,
    address,
    call_of,
    clear,
    count,
    i16,
    i32,
    i64,
    instruction,
    load,
    load1_bf16,
    njit,
    splat_of,
    store,
    store1_bf16,
    store_at,
    types,
    vec,
)

BLOCK = 32  # rows and columns of a block: two tiles by two
BLOCK_ROW = 2 * BLOCK  # bytes of bfloat16: one register, since AMX comes with AVX-512
SQUARE = BLOCK * BLOCK_ROW
NEEDED = ("amx-tile", "amx-bf16", "avx512f", "avx512dq", "avx512bw")
i8, void = ir.IntType(8), ir.VoidType()
bytes_at = i8.as_pointer()


@cache
def why_unavailable() -> str | None:
    """The reason why this machine has no AMX tiles, or None. Asks Linux for them, once a process."""
    missing = [name for name in NEEDED if f"+{name}" not in FEATURES]
    if missing:
        return f"this processor has no {missing[0].upper()}"
    permission, tile_data, arch_prctl = 0x1023, 18, 158  # ARCH_REQ_XCOMP_PERM: Documentation/arch/x86/xstate.rst
    try:
        refused = ctypes.CDLL(None).syscall(arch_prctl, permission, tile_data)
    except (AttributeError, OSError, TypeError):
        return "this system does not hand out AMX tiles"
    return "Linux refuses AMX tiles to this process" if refused else None


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


@instruction(types.void)
def configure_tiles(b):
    """Configure eight tiles of 16 rows of 64 bytes, until release_tiles."""
    words = [1, 0, 0, 0] + [64 << 16 | 64] * 4 + [0] * 4 + [0x10101010] * 2 + [0] * 2  # palette, bytes a row, rows
    memory = cgutils.alloca_once_value(b, ir.Constant(VI, words))
    call_of(b, "llvm.x86.ldtilecfg", void, b.bitcast(memory, bytes_at))


@instruction(types.void)
def release_tiles(b):
    call_of(b, "llvm.x86.tilerelease", void)


def _tile(b, name: str, number: int, at, stride) -> None:
    call_of(b, f"llvm.x86.{name}", void, ir.Constant(i8, number), b.inttoptr(at, bytes_at), stride)


def _block(b, a, lda, p, ldp, c, ldc, k, add: bool) -> None:
    """Tiles 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 columns of p."""

    def part(start, stride, row: int, column: int = 0):
        return b.add(b.add(start, b.mul(stride, ir.Constant(i64, 16 * row))), ir.Constant(i64, 64 * column))

    for i in range(4):
        if add:
            _tile(b, "tileloadd64", i, part(c, ldc, i // 2, i % 2), ldc)
        else:
            call_of(b, "llvm.x86.tilezero", void, ir.Constant(i8, i))
    with cgutils.for_range(b, b.sdiv(k, ir.Constant(i64, 32))) as loop:
        along = b.add(a, b.mul(loop.index, ir.Constant(i64, 64)))
        down = b.add(p, b.mul(loop.index, b.mul(ldp, ir.Constant(i64, 16))))
        for i in range(2):
            _tile(b, "tileloadd64", 4 + i, part(along, lda, i), lda)
            _tile(b, "tileloadd64", 6 + i, part(down, ldp, 0, i), ldp)
        for i in range(4):
            call_of(b, "llvm.x86.tdpbf16ps", void, *(ir.Constant(i8, n) for n in (i, 4 + i // 2, 6 + i % 2)))
    for i in range(4):
        _tile(b, "tilestored64", i, part(c, ldc, i // 2, i % 2), ldc)


@instruction(types.void, address, count, address, count, address, count, count)
def tile_matmul(b, a, lda, p, ldp, c, ldc, k):
    """c (32, 32) = a (32, k) times p, the (k, 32) in pairs of rows."""
    _block(b, a, lda, p, ldp, c, ldc, k, False)


@instruction(types.void, address, count, address, count, address, count, count)
def tile_matmul_add(b, a, lda, p, ldp, c, ldc, k):
    """c (32, 32) += a (32, k) times p."""
    _block(b, a, lda, p, ldp, c, ldc, k, True)


# ---------------------------------------------------------------------------------------------------------------------
# Operands in bfloat16


def _nearest(b, x):
    """Bits whose upper half is the nearest bfloat16, ties upwards: one addition. Infinity and NaN stay the same."""
    return b.add(b.bitcast(x, VI), ir.Constant(VI, [0x8000] * W))


@instruction(vec, vec)
def rounded(b, x):
    """Round to the nearest bfloat16 numbers, as float32."""
    return b.bitcast(b.and_(_nearest(b, x), ir.Constant(VI, [0xFFFF0000] * W)), V)


@instruction(types.void, address, vec, vec)
def store_pairs(b, p, x, y):
    """Store W words (x[i], y[i]) of two bfloat16."""
    low = b.lshr(_nearest(b, x), ir.Constant(VI, [16] * W))
    high = b.and_(_nearest(b, y), ir.Constant(VI, [0xFFFF0000] * W))
    b.store(b.or_(low, high), b.inttoptr(p, VI.as_pointer()), align=4)


@instruction(vec, address)
def load_low(b, p):
    """The first bfloat16 of each of W words at p, as float32."""
    return b.bitcast(b.shl(b.load(b.inttoptr(p, VI.as_pointer()), align=4), ir.Constant(VI, [16] * W)), V)


@instruction(vec, address)
def load_high(b, p):
    """The second bfloat16 of each word, as float32."""
    return b.bitcast(b.and_(b.load(b.inttoptr(p, VI.as_pointer()), align=4), ir.Constant(VI, [0xFFFF0000] * W)), V)


@instruction(types.void, address, address, address)
def split_words(b, p, first, second):
    """W words at p -> a row of their first numbers, and a row of their second ones."""
    words = b.load(b.inttoptr(p, VI.as_pointer()), align=4)
    for target, bits in ((first, words), (second, b.lshr(words, ir.Constant(VI, [16] * W)))):
        b.store(b.trunc(bits, VH), b.inttoptr(target, VH.as_pointer()), align=2)


@instruction(types.void, address, address, address)
def pair_rows(b, x, y, p):
    """2 W bfloat16 numbers at x and at y -> 2 W words (x[i], y[i]) at p."""
    halves = ir.VectorType(i16, 2 * W)
    x, y = (b.load(b.inttoptr(z, halves.as_pointer()), align=2) for z in (x, y))
    for part in range(2):
        order = [n for i in range(part * W, part * W + W) for n in (i, 2 * W + i)]
        words = b.shuffle_vector(x, y, ir.Constant(ir.VectorType(i32, 2 * W), order))
        store_at(b, b.bitcast(words, V), p, W * part)


@instruction(types.void, address, vec, vec)
def store_row(b, p, x, y):
    """Store 2 W bfloat16 numbers: x, then y."""
    halves = ir.VectorType(i16, 2 * W)
    x, y = (b.bitcast(_nearest(b, z), halves) for z in (x, y))
    odd = ir.Constant(ir.VectorType(i32, 2 * W), [2 * i + 1 for i in range(2 * W)])
    b.store(b.shuffle_vector(x, y, odd), b.inttoptr(p, halves.as_pointer()), align=2)


@instruction(vec, vec, count, count, vec)
def between(b, x, low, high, y):
    """x in the lanes [low, high), else y."""
    lanes = ir.Constant(VI, list(range(W)))
    low, high = (splat_of(b, b.trunc(n, i32), VI) for n in (low, high))
    inside = b.and_(b.icmp_signed(">=", lanes, low), b.icmp_signed("<", lanes, high))
    return b.select(inside, x, y)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of bfloat16 numbers: 32 rows of 64 bytes


@njit
def whole_block(p, row, n, m, spare):
    """(address, bytes from row to row) of a block that has n rows and m columns, padded with zeros to a full block.

    A full block with word-aligned rows stays where it is; others are copied to `spare`.
    """
    if n >= BLOCK and m >= BLOCK and row % 4 == 0:
        return p, row
    clear(spare, SQUARE // 4)
    copy_block(p, row, n, m, spare, BLOCK_ROW)
    return spare, BLOCK_ROW


@njit
def copy_block(p, row, n, m, target, target_row):
    """Copy the first n rows and m columns, at most BLOCK each."""
    for r in range(min(n, BLOCK)):
        here, there = p + row * r, target + target_row * r
        if m >= BLOCK:
            store(there, load(here))
        else:
            for i in range(m):
                store1_bf16(there + 2 * i, load1_bf16(here + 2 * i))
