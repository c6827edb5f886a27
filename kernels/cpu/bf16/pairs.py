"""Operands of matmuls of bfloat16 pairs (matmul.py), in memory:

    a   rows: adjacent numbers that are summed over
    b   rows of pairs: word n of row r holds (b[2r, n], b[2r + 1, n]), both for one step of the sum ("VNNI")

Two moves make either from rows of numbers, both exact:

    store_pairs   two rows -> one row of pairs: b for sums over rows; pair_rows where they are bfloat16 already
    transpose     of words (simd.py). Of rows taken as words it makes pairs of the transpose: b for sums along rows.
                  Of pairs it makes rows of the transpose: a for sums over rows
"""

from llvmlite import ir

from nanochameleon.kernels.cpu.simd import (
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
    instruction,
    load,
    njit,
    splat_of,
    store,
    store_at,
    types,
    vec,
)

BLOCK = 32  # rows and columns of a block
BLOCK_ROW = 2 * BLOCK  # bytes of bfloat16: one register of AVX-512
SQUARE = BLOCK * BLOCK_ROW
HALVES = ir.VectorType(i16, 2 * W)


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


def low_half(b, words):
    """The first bfloat16 of each word, as float32."""
    return b.bitcast(b.shl(words, ir.Constant(VI, [16] * W)), V)


def high_half(b, words):
    return b.bitcast(b.and_(words, ir.Constant(VI, [0xFFFF0000] * W)), V)


@instruction(vec, address)
def load_low(b, p):
    """The first bfloat16 of each of W words at p, as float32."""
    return low_half(b, b.load(b.inttoptr(p, VI.as_pointer()), align=4))


@instruction(vec, address)
def load_high(b, p):
    """The second bfloat16 of each word, as float32."""
    return high_half(b, b.load(b.inttoptr(p, VI.as_pointer()), align=4))


@instruction(types.void, address, address, address)
def split_words(b, p, first, second):
    """W words at p -> a row of their first numbers, and a row of their second ones."""
    words = b.load(b.inttoptr(p, VI.as_pointer()), align=4)
    for target, bits in ((first, words), (second, b.lshr(words, ir.Constant(VI, [16] * W)))):
        b.store(b.trunc(bits, VH), b.inttoptr(target, VH.as_pointer()), align=2)


@instruction(types.void, address, address, address)
def pair_rows(b, x, y, p):
    """2 W bfloat16 numbers at x and at y -> 2 W words (x[i], y[i]) at p."""
    x, y = (b.load(b.inttoptr(z, HALVES.as_pointer()), align=2) for z in (x, y))
    for part in range(2):
        order = [n for i in range(part * W, part * W + W) for n in (i, 2 * W + i)]
        words = b.shuffle_vector(x, y, ir.Constant(ir.VectorType(i32, 2 * W), order))
        store_at(b, b.bitcast(words, V), p, W * part)


@instruction(types.void, address, vec, vec)
def store_row(b, p, x, y):
    """Store 2 W bfloat16 numbers: x, then y."""
    x, y = (b.bitcast(_nearest(b, z), HALVES) for z in (x, y))
    odd = ir.Constant(ir.VectorType(i32, 2 * W), [2 * i + 1 for i in range(2 * W)])
    b.store(b.shuffle_vector(x, y, odd), b.inttoptr(p, HALVES.as_pointer()), align=2)


@instruction(vec, vec, count, count, vec)
def between(b, x, low, high, y):
    """x in the lanes [low, high), else y."""
    lanes = ir.Constant(VI, list(range(W)))
    low, high = (splat_of(b, b.trunc(n, i32), VI) for n in (low, high))
    inside = b.and_(b.icmp_signed(">=", lanes, low), b.icmp_signed("<", lanes, high))
    return b.select(inside, x, y)


def _load_halves(b, p, n):
    """The first n of a register of bfloat16 numbers and zeros, and the mask of the n."""
    lanes, word = ir.Constant(HALVES, list(range(2 * W))), ir.VectorType(i32, 2 * W)
    few = b.insert_element(ir.Constant(HALVES, ir.Undefined), b.trunc(n, i16), ir.Constant(i32, 0))
    mask = b.icmp_signed("<", lanes, b.shuffle_vector(few, few, ir.Constant(word, [0] * 2 * W)))
    args = b.inttoptr(p, HALVES.as_pointer()), ir.Constant(i32, 2), mask, ir.Constant(HALVES, [0] * 2 * W)
    return call_of(b, f"llvm.masked.load.v{2 * W}i16.p0", HALVES, *args), mask


@instruction(types.void, address, count, address)
def copy_first(b, p, n, target):
    """Copy n bfloat16 numbers, padded with zeros to a register; n may be larger than that."""
    b.store(_load_halves(b, p, n)[0], b.inttoptr(target, HALVES.as_pointer()), align=2)


@instruction(types.void, address, count, address)
def copy_only(b, p, n, target):
    """Copy n bfloat16 numbers, at most a register, and write nothing after them."""
    halves, mask = _load_halves(b, p, n)
    args = halves, b.inttoptr(target, HALVES.as_pointer()), ir.Constant(i32, 2), mask
    call_of(b, f"llvm.masked.store.v{2 * W}i16.p0", ir.VoidType(), *args)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of bfloat16 numbers: 32 rows of 64 bytes


@njit
def whole_block(p, row, n, m, spare):
    """(address, bytes from row to row) of a block that has n rows and m columns, padded with zeros to a full block.

    A full block with word-aligned rows stays where it is; others are copied to `spare`.
    """
    if n >= BLOCK and m >= BLOCK and row % 4 == 0:
        return p, row
    n = max(0, min(n, BLOCK))
    for r in range(n):
        copy_first(p + row * r, m, spare + BLOCK_ROW * r)
    clear(spare + BLOCK_ROW * n, W * (BLOCK - n))
    return spare, BLOCK_ROW


@njit
def copy_block(p, row, n, m, target, target_row):
    """Copy the first n rows and m columns, at most BLOCK each."""
    for r in range(min(n, BLOCK)):
        if m >= BLOCK:
            store(target + target_row * r, load(p + row * r))
        else:
            copy_only(p + row * r, m, target + target_row * r)
