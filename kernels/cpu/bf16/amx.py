"""AMX tiles, the matrix unit of newer Xeons, for Numba: eight registers of 16 rows of 64 bytes.

    c (16, 16) float32 += a (16, 32) bfloat16 * b (32, 16) bfloat16        one instruction, 16 cycles: tdpbf16ps

which is 16 times the arithmetic of float32 vectors. Matmuls make (32, 32) blocks, four tiles of sums at a time, so that
each tile that is loaded is used twice. Every kernel configures the tiles when it starts and releases them when it ends.
Operands are those of pairs.py. Strides are bytes, k is a multiple of 32.
"""

import ctypes
from functools import cache

from llvmlite import ir
from numba.core import cgutils

from nanochameleon.kernels.cpu.simd import VI, address, call_of, count, i64, instruction, types

i8, void = ir.IntType(8), ir.VoidType()
bytes_at = i8.as_pointer()


@cache
def refused() -> str | None:
    """The reason why this process may not use AMX tiles, or None. Asks Linux for them, once a process."""
    permission, tile_data, arch_prctl = 0x1023, 18, 158  # ARCH_REQ_XCOMP_PERM: Documentation/arch/x86/xstate.rst
    try:
        status = ctypes.CDLL(None).syscall(arch_prctl, permission, tile_data)
    except (AttributeError, OSError, TypeError):
        return "this system does not hand out AMX tiles"
    return "Linux refuses AMX tiles to this process" if status else None


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
