"""Matmuls of bfloat16 pairs with float32 sums: on AMX tiles (amx.py) where there are some, else by VDPBF16PS (dot.py).

    c (m, n) float32 = or += a (m, k) times p, the (k, n) in pairs of rows

The operands are those of pairs.py for both instructions, so one kernel serves both. The processor decides, not the
caller: a kernel that is kept on disk holds one of the two. Tiles make whole blocks of 32 x 32 x 32: m, n and k are
multiples of STEP, in numbers. Strides are bytes.

Machines without these instructions never compile this: `why_unavailable` says what is missing.
"""

from nanochameleon.kernels.cpu.bf16.amx import configure_tiles, refused, release_tiles, tile_matmul, tile_matmul_add
from nanochameleon.kernels.cpu.bf16.dot import COLUMNS, ROWS, dot_block, dot_block_add
from nanochameleon.kernels.cpu.bf16.pairs import BLOCK
from nanochameleon.kernels.cpu.simd import FEATURES, W, njit

AVX512 = ("avx512f", "avx512dq", "avx512bw")


def has(*names: str) -> bool:
    return all(f"+{name}" in FEATURES for name in (*names, *AVX512))


ON_TILES = has("amx-tile", "amx-bf16")
STEP = BLOCK if ON_TILES else W


def why_unavailable() -> str | None:
    """The reason why this machine multiplies no pairs of bfloat16, or None."""
    if ON_TILES:
        return refused()
    return None if has("avx512bf16") else "this processor has neither AMX nor AVX512-BF16"


if ON_TILES:
    configure, release = configure_tiles, release_tiles

    @njit
    def matmul(a, lda, p, ldp, c, ldc, m, n, k):
        for i in range(0, m, BLOCK):
            for j in range(0, n, BLOCK):
                tile_matmul(a + lda * i, lda, p + 4 * j, ldp, c + ldc * i + 4 * j, ldc, k)

    @njit
    def matmul_add(a, lda, p, ldp, c, ldc, m, n, k):
        for i in range(0, m, BLOCK):
            for j in range(0, n, BLOCK):
                tile_matmul_add(a + lda * i, lda, p + 4 * j, ldp, c + ldc * i + 4 * j, ldc, k)

else:

    @njit
    def configure():
        """Nothing: vector registers are ready."""

    release = configure

    @njit
    def registers(n):
        """Registers of the next strip of n columns: two, or three where one would be left."""
        left = n // W
        return left if left <= COLUMNS else 2

    @njit
    def matmul(a, lda, p, ldp, c, ldc, m, n, k):
        j = 0
        while j < n:
            strip = registers(n - j)
            for i in range(0, m, ROWS):
                dot_block(strip, a + lda * i, lda, p + 4 * j, ldp, c + ldc * i + 4 * j, ldc, k)
            j += W * strip

    @njit
    def matmul_add(a, lda, p, ldp, c, ldc, m, n, k):
        j = 0
        while j < n:
            strip = registers(n - j)
            for i in range(0, m, ROWS):
                dot_block_add(strip, a + lda * i, lda, p + 4 * j, ldp, c + ldc * i + 4 * j, ldc, k)
            j += W * strip
