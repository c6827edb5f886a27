"""2^x and 1 / x for a register of floats (simd.py): 2^x = 2^n 2^f, n an integer and 2^f a polynomial.

exp2       relative error 2e-7
exp2_bf16  relative error 4e-6: for results that are rounded to bfloat16. Needs AVX-512
"""

import numpy as np
from llvmlite import ir

from nanochameleon.kernels.cpu.simd import FEATURES, FUSE, VI, V, W, call_of, constant, four, i16, i32, instruction, vec

HAS_SCALEF = "+avx512f" in FEATURES and "+avx512dq" in FEATURES  # vreduceps: x - floor x; vscalefps: y 2^floor x
TO_INTEGER = 1.5 * 2**23 + 127  # adding it rounds x to an integer n, and leaves n + 127 in the lowest bits


def polynomial(degree: int, centre: float) -> list[float]:
    """Coefficients that fit 2^f within 1/2 of the centre with least relative error, from Chebyshev points."""
    x = centre + 0.5 * np.cos(np.pi * (np.arange(4_000) + 0.5) / 4_000)
    powers = np.vander(x, degree + 1, increasing=True) / np.exp2(x)[:, None]
    return np.linalg.lstsq(powers, np.ones(4_000), rcond=None)[0].astype(np.float32).tolist()


NEAREST, ABOVE_FLOOR, COARSE = polynomial(5, 0.0), polynomial(5, 0.5), polynomial(4, 0.5)


def horner(b, coefficients: list[float], *xs) -> list:
    """The polynomial of each x, in step: while one register waits for its last instruction, the others have theirs."""
    ys = [constant(coefficients[-1])] * len(xs)
    for c in coefficients[-2::-1]:
        ys = [b.fadd(b.fmul(y, x, flags=FUSE), constant(c), flags=FUSE) for x, y in zip(xs, ys, strict=True)]
    return ys


def at_least(b, x, least: float):
    """max(x, least); NaN stays NaN."""
    return b.select(b.fcmp_ordered("<", x, constant(least)), constant(least), x)


def at_most(b, x, most: float):
    """min(x, most); NaN stays NaN."""
    return b.select(b.fcmp_ordered(">", x, constant(most)), constant(most), x)


def into_exponent(b, n):
    return b.shl(n, ir.Constant(VI, [23] * W))


def scaled(b, coefficients: list[float], *xs) -> list:
    """2^x in AVX-512: one instruction for x - floor x, the polynomial, one for the exponent."""
    passed, every, floor, current = ir.Constant(V, ir.Undefined), ir.Constant(i16, -1), 9, ir.Constant(i32, 4)

    def call(name: str, *args):
        return call_of(b, f"llvm.x86.avx512.mask.{name}.ps.512", V, *args, passed, every, current)

    ys = horner(b, coefficients, *(call("reduce", x, ir.Constant(i32, floor)) for x in xs))
    return [call("scalef", y, x) for x, y in zip(xs, ys, strict=True)]


def exp2_of(b, *xs) -> list:
    """2^x in 8 instructions of AVX-512, or in 13 of other processors.

    n is the integer below x with AVX-512, else the nearest one.

    NaN stays NaN and overflow is infinity: divergence must be seen. Results below 2^-126 are at most 2^-126.
    """
    if HAS_SCALEF:
        return scaled(b, ABOVE_FLOOR, *xs)
    xs = [at_most(b, at_least(b, x, -126.0), 128.0) for x in xs]
    ns = [b.fadd(x, constant(TO_INTEGER)) for x in xs]  # the lowest bits, shifted into the exponent, are the float 2^n
    fs = [b.fsub(x, b.fsub(n, constant(TO_INTEGER))) for x, n in zip(xs, ns, strict=True)]
    ys = horner(b, NEAREST, *fs)
    return [b.fmul(y, b.bitcast(into_exponent(b, b.bitcast(n, VI)), V)) for y, n in zip(ys, ns, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Instructions that kernels call


@instruction(vec, vec)
def exp2(b, x):
    """2^x. NaN stays NaN; infinity from 127.5 on, with AVX-512 above 128; results below 2^-126 are at most 2^-126."""
    return exp2_of(b, x)[0]


@instruction(four, vec, vec, vec, vec)
def exp2_four(b, x0, x1, x2, x3):
    """exp2 of four registers, in step."""
    return exp2_of(b, x0, x1, x2, x3)


@instruction(vec, vec)
def exp2_bf16(b, x):
    return scaled(b, COARSE, x)[0]


@instruction(vec, vec)
def inverse_bf16(b, x):
    """1 / x to 14 bits, more than bfloat16 holds: with AVX-512 2 cycles, where a division takes 16."""
    if W < 16:
        return b.fdiv(constant(1.0), x)
    return call_of(b, "llvm.x86.avx512.rcp14.ps.512", V, x, ir.Constant(V, ir.Undefined), ir.Constant(i16, -1))
