"""SIMD registers as values in Numba: `Vec` is a register of W float32 lanes.

Plain Numba loops reach a third of this processor's arithmetic: LLVM vectorises one loop at a time and keeps the sums
of a matmul in memory. Here `Vec` is LLVM's <W x float>, and a kernel is ordinary Python on addresses:

    x = load(p)                                 # W floats from an address
    store(p, exp2(x * c - splat(m)))

W is 16 with AVX-512 and 8 elsewhere (on Arm, two registers). LLVM picks the instructions, so nothing here is written
for one processor. Not here: 2^x (exp2.py), matmuls (matmul.py), and any meaning of the numbers.

Two rules. Never compile a function that uses `Vec` with fastmath, which would rewrite these instructions too. An
address does not keep its array alive: the caller of a kernel holds the tensors.
"""

import functools
import operator

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

# What Numba compiles for. An empty NUMBA_CPU_FEATURES, or NUMBA_CPU_NAME=generic, means none, not the host's.
FEATURES = (get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES).split(",")
W = 16 if "+avx512f" in FEATURES else 8  # lanes

f32, i16, i32, i64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
V, VI, VH = ir.VectorType(f32, W), ir.VectorType(i32, W), ir.VectorType(i16, W)
AHEAD = 2_048  # bytes that kernels prefetch ahead: the processor's own prefetcher loses track of several streams
FUSE = ("contract",)  # a * b + c may become one instruction; nothing else is reordered


class VecType(types.Type):
    def __init__(self):
        super().__init__(name=f"Vec{W}")


vec = VecType()


@register_model(VecType)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, V)


def _operator(function, build) -> None:
    """Defines one of Python's operators as Vec x Vec -> Vec."""
    template = type(function.__name__, (ConcreteTemplate,), {"cases": [signature(vec, vec, vec)]})
    infer_global(function)(template)
    lower_builtin(function, vec, vec)(lambda context, b, sig, args: build(b, *args))


_operator(operator.add, lambda b, x, y: b.fadd(x, y, flags=FUSE))
_operator(operator.iadd, lambda b, x, y: b.fadd(x, y, flags=FUSE))
_operator(operator.sub, lambda b, x, y: b.fsub(x, y, flags=FUSE))
_operator(operator.mul, lambda b, x, y: b.fmul(x, y, flags=FUSE))

# ---------------------------------------------------------------------------------------------------------------------
# LLVM builders that several instructions share: b is llvmlite's IRBuilder


def pointer(b, address, kind, elements: int = 0):
    """A pointer to `kind`, this many floats after an address."""
    return b.inttoptr(b.add(address, ir.Constant(i64, 4 * elements)), kind.as_pointer())


def load_at(b, address, elements: int = 0):
    return b.load(pointer(b, address, V, elements), align=4)


def store_at(b, value, address, elements: int = 0) -> None:
    b.store(value, pointer(b, address, V, elements), align=4)


def constant(x: float) -> ir.Constant:
    return ir.Constant(V, [x] * W)


def splat_of(b, x, kind=V):
    one = b.insert_element(ir.Constant(kind, ir.Undefined), x, ir.Constant(i32, 0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(VI, [0] * W))


def call_of(b, name: str, result, *args, **flags):
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args, **flags)


def _reduce(b, op: str, x, *start):
    return call_of(b, f"llvm.vector.reduce.{op}.v{W}f32", f32, *start, x, fastmath=("reassoc",))


def larger(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def lanes_below(b, n):
    """Mask of lanes 0 .. n - 1, for n int64."""
    lanes = ir.Constant(VI, list(range(W)))
    return b.icmp_signed("<", lanes, splat_of(b, b.trunc(n, i32), VI))


# ---------------------------------------------------------------------------------------------------------------------
# Instructions that kernels call


def instruction(result, *arguments):
    """Turns a function (builder, *LLVM values) -> LLVM value, several or None into a Numba intrinsic of these types."""

    def wrap(build):
        def codegen(context, b, signature, args):
            value = build(b, *args)
            if isinstance(result, types.BaseTuple):
                return context.make_tuple(b, result, value)
            return context.get_dummy_value() if value is None else value

        def typed(context, *args):
            return result(*arguments), codegen

        functools.update_wrapper(typed, build)  # Numba counts the parameters: b takes the place of the context
        return intrinsic(typed)

    return wrap


address, number, count = types.int64, types.float32, types.int64
pair, four = types.UniTuple(vec, 2), types.UniTuple(vec, 4)


@instruction(vec, address)
def load(b, p):
    """Load W floats."""
    return load_at(b, p)


@instruction(types.void, address, vec)
def store(b, p, x):
    store_at(b, x, p)


@instruction(types.void, address)
def prefetch(b, p):
    """Ask for the cache line at p early."""
    byte = ir.IntType(8).as_pointer()
    call_of(b, "llvm.prefetch", ir.VoidType(), b.inttoptr(p, byte), i32(0), i32(3), i32(1))


@instruction(vec, address)
def load_bf16(b, p):
    """Load W bfloat16 numbers as float32."""
    return _widen(b, b.load(b.inttoptr(p, VH.as_pointer()), align=2))


def _widen(b, half):
    # a bfloat16 is the upper half of a float32
    return b.bitcast(b.shl(b.zext(half, VI), ir.Constant(VI, [16] * W)), V)


def _round_bf16(b, bits, kind, n):
    """Float32 bits -> bits of the nearest bfloat16, ties to even. A NaN with all low bits set is not kept."""
    odd = b.and_(b.lshr(bits, ir.Constant(kind, n(16))), ir.Constant(kind, n(1)))
    return b.lshr(b.add(b.add(bits, odd), ir.Constant(kind, n(0x7FFF))), ir.Constant(kind, n(16)))


@instruction(types.void, address, vec)
def store_bf16(b, p, x):
    b.store(_narrow(b, x), b.inttoptr(p, VH.as_pointer()), align=2)


@instruction(pair, address)
def load2_bf16(b, p):
    """Load 2 W bfloat16 numbers as float32: those at even places, and those at odd places. Cheaper than in order."""
    words = b.load(b.inttoptr(p, VI.as_pointer()), align=2)  # the even number is the lower half of a word
    return b.bitcast(b.shl(words, ir.Constant(VI, [16] * W)), V), b.bitcast(_upper(b, words), V)


@instruction(types.void, address, vec, vec)
def store2_bf16(b, p, even, odd):
    """Store 2 W numbers as load2_bf16 loads them. Ties are rounded away from zero, which takes a third of the time."""
    even, odd = (b.add(b.bitcast(x, VI), ir.Constant(VI, [0x8000] * W)) for x in (even, odd))
    words = b.or_(b.lshr(even, ir.Constant(VI, [16] * W)), _upper(b, odd))
    b.store(words, b.inttoptr(p, VI.as_pointer()), align=2)


def _upper(b, words):
    return b.and_(words, ir.Constant(VI, [0xFFFF0000] * W))


def _narrow(b, x):
    return b.trunc(_round_bf16(b, b.bitcast(x, VI), VI, lambda c: [c] * W), VH)


def _masked(b, name: str, kind, result, *args):
    """Calls llvm.masked.load or llvm.masked.store for lanes of `kind`."""
    lanes = f"v{W}{'f32' if kind is V else 'i16'}"
    return call_of(b, f"llvm.masked.{name}.{lanes}.p0", result, *args)


@instruction(vec, address, count, vec)
def load_first(b, p, n, x):
    """Load n floats; the other lanes come from x. No memory after the n floats is read."""
    args = b.inttoptr(p, V.as_pointer()), ir.Constant(i32, 4), lanes_below(b, n), x
    return _masked(b, "load", V, V, *args)


@instruction(vec, address, count, vec)
def load_first_bf16(b, p, n, x):
    mask = lanes_below(b, n)
    args = b.inttoptr(p, VH.as_pointer()), ir.Constant(i32, 2), mask, ir.Constant(VH, [0] * W)
    return b.select(mask, _widen(b, _masked(b, "load", VH, VH, *args)), x)


@instruction(types.void, address, count, vec)
def store_first(b, p, n, x):
    """Store the first n lanes."""
    _masked(b, "store", V, ir.VoidType(), x, b.inttoptr(p, V.as_pointer()), ir.Constant(i32, 4), lanes_below(b, n))


@instruction(types.void, address, count, vec)
def store_first_bf16(b, p, n, x):
    half, at = _narrow(b, x), b.inttoptr(p, VH.as_pointer())
    _masked(b, "store", VH, ir.VoidType(), half, at, ir.Constant(i32, 2), lanes_below(b, n))


@instruction(number, address)
def load1(b, p):
    """Load one float."""
    return b.load(b.inttoptr(p, f32.as_pointer()), align=4)


@instruction(types.void, address, number)
def store1(b, p, x):
    b.store(x, b.inttoptr(p, f32.as_pointer()), align=4)


@instruction(number, address)
def load1_bf16(b, p):
    half = b.load(b.inttoptr(p, i16.as_pointer()), align=2)
    return b.bitcast(b.shl(b.zext(half, i32), ir.Constant(i32, 16)), f32)


@instruction(types.void, address, number)
def store1_bf16(b, p, x):
    half = b.trunc(_round_bf16(b, b.bitcast(x, i32), i32, lambda c: c), i16)
    b.store(half, b.inttoptr(p, i16.as_pointer()), align=2)


@instruction(count, address)
def load1_int(b, p):
    """Load one int64."""
    return b.load(b.inttoptr(p, i64.as_pointer()), align=8)


@instruction(types.void, address, count)
def store1_int(b, p, n):
    b.store(n, b.inttoptr(p, i64.as_pointer()), align=8)


@instruction(vec, number)
def splat(b, x):
    """Broadcast x to every lane."""
    return splat_of(b, x)


@instruction(vec, vec, count, vec)
def blend_first(b, x, n, y):
    """Lanes 0 .. n - 1 of x, the other lanes of y."""
    return b.select(lanes_below(b, n), x, y)


@instruction(vec, vec, vec)
def vmax(b, x, y):
    """Lane-wise maximum; y where x is NaN. A running maximum y skips NaN, which shows up in the sum of 2^x instead."""
    return larger(b, x, y)


@instruction(vec, vec, vec)
def vdiv(b, x, y):
    return b.fdiv(x, y)


@instruction(vec, vec)
def vsqrt(b, x):
    return call_of(b, f"llvm.sqrt.v{W}f32", V, x)


@instruction(number, vec)
def hsum(b, x):
    """Sum of all lanes."""
    return _reduce(b, "fadd", x, ir.Constant(f32, 0.0))


@instruction(number, vec)
def hmax(b, x):
    """Maximum of all lanes; NaN may be passed over or win. LLVM's own reduction compares W times, one after another."""
    d = W // 2
    while d:
        x = larger(b, x, b.shuffle_vector(x, x, ir.Constant(VI, [i ^ d for i in range(W)])))
        d //= 2
    return b.extract_element(x, ir.Constant(i32, 0))


def _rope(b, x, cos_sin, signs):
    # (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin): each lane needs its neighbour, and sin with a sign
    swap, even, odd = ([f(i) for i in range(W)] for f in (lambda i: i ^ 1, lambda i: i & ~1, lambda i: i | 1))
    shuffles = (x, swap), (cos_sin, even), (cos_sin, odd)
    other, cos, sin = (b.shuffle_vector(v, v, ir.Constant(VI, m)) for v, m in shuffles)
    sin = b.fmul(sin, ir.Constant(V, signs * (W // 2)))
    return b.fadd(b.fmul(x, cos, flags=FUSE), b.fmul(other, sin, flags=FUSE), flags=FUSE)


@instruction(vec, vec, vec)
def rope(b, x, cos_sin):
    """Rotate pairs (x[2i], x[2i+1]), Meta's order, by angles given as (cos, sin) pairs in the same lanes."""
    return _rope(b, x, cos_sin, [-1.0, 1.0])


@instruction(vec, vec, vec)
def rope_backward(b, x, cos_sin):
    """Rotate by the opposite angle: the inverse of `rope`, and its gradient, since a rotation is orthogonal."""
    return _rope(b, x, cos_sin, [1.0, -1.0])


def butterfly(d: int) -> tuple[ir.Constant, ir.Constant]:
    """Shuffle masks for two registers x, y cut into blocks of d lanes, such as x = A B, y = C D -> A C and B D."""
    low = ir.Constant(VI, [i if i & d == 0 else W + i - d for i in range(W)])
    high = ir.Constant(VI, [i + d if i & d == 0 else W + i for i in range(W)])
    return low, high


@instruction(vec, address)
def row_sums(b, p):
    """(W, W) floats -> the sum of each row, in its lane: log2 W times, pairs of rows are folded into one register."""
    rows, d = [load_at(b, p, W * i) for i in range(W)], W // 2
    while d:
        low, high = butterfly(d)
        pairs = [(rows[i], rows[i + d]) for i in range(d)]
        rows = [b.fadd(b.shuffle_vector(x, y, low), b.shuffle_vector(x, y, high)) for x, y in pairs]
        d //= 2
    return rows[0]


@instruction(types.void, address, count, address, count)
def transpose(b, source, lds, target, ldt):
    """Transpose (W, W) floats, rows lds and ldt floats apart: log2 W times, blocks of half the size are swapped."""
    rows = [load_at(b, b.add(source, b.mul(lds, ir.Constant(i64, 4 * i)))) for i in range(W)]
    d = W // 2
    while d:
        low, high = butterfly(d)
        for i in range(W):
            if i & d == 0:
                x, y = rows[i], rows[i + d]
                rows[i], rows[i + d] = b.shuffle_vector(x, y, low), b.shuffle_vector(x, y, high)
        d //= 2
    for i in range(W):
        store_at(b, rows[i], b.add(target, b.mul(ldt, ir.Constant(i64, 4 * i))))


# ---------------------------------------------------------------------------------------------------------------------
# Rows of e numbers in memory, of `size` bytes each: 4 is float32, 2 is bfloat16

ZERO = np.float32(0)


@njit
def read_row(p, size, e, out):
    """Load e numbers as float32 into `out`, padded with zeros to a whole register."""
    whole = e // W * W
    if size == 4:
        for i in range(0, whole, W):
            store(out + 4 * i, load(p + 4 * i))
    else:
        for i in range(0, whole, W):
            store(out + 4 * i, load_bf16(p + 2 * i))
    if whole < e:
        store(out + 4 * whole, splat(ZERO))
        for i in range(whole, e):
            store1(out + 4 * i, load1(p + 4 * i) if size == 4 else load1_bf16(p + 2 * i))


@njit
def write_row(p, size, e, x, factor):
    """Store e float32 numbers at x times factor."""
    whole = e // W * W
    for i in range(0, whole, W):
        y = load(x + 4 * i) * splat(factor)
        if size == 4:
            store(p + 4 * i, y)
        else:
            store_bf16(p + 2 * i, y)
    for i in range(whole, e):
        y = load1(x + 4 * i) * factor
        if size == 4:
            store1(p + 4 * i, y)
        else:
            store1_bf16(p + 2 * i, y)


@njit
def dot_rows(x, y, width):
    """Dot product of two padded float32 rows."""
    s = splat(ZERO)
    for i in range(0, width, W):
        s += load(x + 4 * i) * load(y + 4 * i)
    return hsum(s)


@njit
def clear(p, floats):
    """Set `floats` numbers to zero, rounded up to whole registers."""
    for i in range(0, floats, W):
        store(p + 4 * i, splat(ZERO))
