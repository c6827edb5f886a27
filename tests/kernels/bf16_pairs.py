"""Kernels on pairs of bfloat16 for tests: with AVX-512 but without VDPBF16PS, dot.py multiplies pairs by FMAs."""

import pytest

from nanochameleon.kernels.cpu.bf16 import matmul

REFUSED = matmul.why_unavailable() if matmul.ON_TILES or not matmul.has() else None
needs_bf16_pairs = pytest.mark.skipif(REFUSED is not None or not matmul.has(), reason=f"no AVX-512, or {REFUSED}")


@pytest.fixture(scope="module", autouse=True)
def emulated_pairs():
    """Without the instruction nobody would choose these kernels; the tests of a module run them all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "why_unavailable", lambda: REFUSED)
        yield
