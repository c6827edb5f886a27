"""2^x and 1 / x for a register of floats (simd.py): 2^x = 2^n 2^f, n an integer and 2^f a polynomial.

exp2          any x, error 1e-7: overflows to infinity, NaN stays NaN
exp2_bounded  x below 127, for scores or logits minus a shift: the same accuracy in half the time
exp2_bf16     x below 127, error 4e-6: for results that are rounded to bfloat16. Needs AVX-512
"""

import math

import numpy as np
from llvmlite import ir

from nanochameleon.kernels.cpu.simd import FEATURES, FUSE, VI, V, W, call_of, constant, i16, i32, instruction, vec

HAS_SCALEF = "+avx512f" in FEATURES and "+avx512dq" in FEATURES  # vreduceps: x - floor x; vscalefps: y 2^floor x
TO_INTEGER = 1.5 * 2**23 + 127  # adding it rounds x to an integer n, and leaves n + 127 in the lowest bits


def polynomial(degree: int, centre: float) -> list[float]:
    """Coefficients that fit 2^f within 1/2 of the centre with least relative error, from Chebyshev points."""
    x = centre + 0.5 * np.cos(np.pi * (np.arange(4_000) + 0.5) / 4_000)
    powers = np.vander(x, degree + 1, increasing=True) / np.exp2(x)[:, None]
    return np.linalg.lstsq(powers, np.ones(4_000), rcond=None)[0].astype(np.float32).tolist()


NEAREST, ABOVE_FLOOR, COARSE = polynomial(5, 0.0), polynomial(5, 0.5), polynomial(4, 0.5)


def horner(b, coefficients: list[float], x):
    y = constant(coefficients[-1])
    for c in coefficients[-2::-1]:
        y = b.fadd(b.fmul(y, x, flags=FUSE), constant(c), flags=FUSE)
    return y


def at_least(b, x, least: float):
    """max(x, least); NaN stays NaN."""
    return b.select(b.fcmp_ordered("<", x, constant(least)), constant(least), x)


def into_exponent(b, n):
    return b.shl(n, ir.Constant(VI, [23] * W))


def scaled(b, coefficients: list[float], x):
    """2^x in AVX-512: one instruction for x - floor x, the polynomial, one for the exponent."""
    passed, every, floor, current = ir.Constant(V, ir.Undefined), ir.Constant(i16, -1), 9, ir.Constant(i32, 4)
    f = call_of(b, "llvm.x86.avx512.mask.reduce.ps.512", V, x, ir.Constant(i32, floor), passed, every, current)
    y = horner(b, coefficients, f)
    return call_of(b, "llvm.x86.avx512.mask.scalef.ps.512", V, y, x, passed, every, current)


def exp2_of(b, x):
    """2^x with n the nearest integer, which is added to the exponent's bits.

    Results below 2^-126 stay 2^-126, those from 2^128 on become infinity, and NaN stays NaN: divergence must be seen.
    """
    x = at_least(b, x, -126.0)
    n = call_of(b, f"llvm.rint.v{W}f32", V, x)
    y = horner(b, NEAREST, b.fsub(x, n))
    y = b.bitcast(b.add(b.bitcast(y, VI), into_exponent(b, b.fptosi(n, VI))), V)
    return b.select(b.fcmp_ordered("<", x, constant(128.0)), y, b.fadd(x, constant(math.inf)))


def exp2_bounded_of(b, x):
    """2^x for x < 127 in 8 instructions of AVX-512, or in 12 of other processors."""
    if HAS_SCALEF:
        return scaled(b, ABOVE_FLOOR, x)
    x = at_least(b, x, -126.0)
    n = b.fadd(x, constant(TO_INTEGER))  # its lowest bits, shifted into the exponent, are the float 2^n
    f = b.fsub(x, b.fsub(n, constant(TO_INTEGER)))
    return b.fmul(horner(b, NEAREST, f), b.bitcast(into_exponent(b, b.bitcast(n, VI)), V))


# ---------------------------------------------------------------------------------------------------------------------
# Instructions that kernels call


@instruction(vec, vec)
def exp2(b, x):
    return exp2_of(b, x)


@instruction(vec, vec)
def exp2_bounded(b, x):
    """2^x for x below 127; anything above is undefined. Results below 2^-126 are at most 2^-126. NaN stays NaN."""
    return exp2_bounded_of(b, x)


@instruction(vec, vec)
def exp2_bf16(b, x):
    return scaled(b, COARSE, x)


@instruction(vec, vec)
def inverse_bf16(b, x):
    """1 / x to 14 bits, more than bfloat16 holds: with AVX-512 2 cycles, where a division takes 16."""
    if W < 16:
        return b.fdiv(constant(1.0), x)
    return call_of(b, "llvm.x86.avx512.rcp14.ps.512", V, x, ir.Constant(V, ir.Undefined), ir.Constant(i16, -1))
