"""The emulator itself: each mistake it must find, in a kernel of a few lines that makes it."""

import pytest
import torch

from nanochameleon.kernels.gpu.emulator import emulator
from nanochameleon.kernels.gpu.emulator.source import EmulatorError

pytestmark = pytest.mark.usefixtures("emulated_gpu")


def launch(body: str, *tensors: torch.Tensor, block: int = 64, shared: int = 0, generation: int = 90) -> None:
    """Run `extern "C" __global__ void k(float* x, float* y)` with this body, one block."""
    names = ", ".join(f"float* {name}" for name in "xyz"[: len(tensors)])
    source = f'#include "tiles.cuh"\nextern "C" __global__ void k({names}) {{ int i = threadIdx.x; {body} }}'
    found = emulator.compiled(source, emulator.HEADERS, generation)
    emulator.start(found, "k", (1,), block, *tensors, shared=shared)


def test_threads_meet_at_barriers_and_shuffles():
    x, y = torch.arange(64.0), torch.zeros(64)
    launch(
        "__shared__ float s[64]; s[i] = x[i]; __syncthreads(); y[i] = s[63 - i] + __shfl_xor_sync(~0u, x[i], 1);", x, y
    )
    swapped = x.view(-1, 2).flip(1).flatten()
    assert torch.equal(y, x.flip(0) + swapped)


MISTAKES = {
    "a missing barrier": ("__shared__ float s[64]; s[i] = x[i]; x[i] = s[63 - i];", "order of its threads"),
    "memory that no thread has written": ("__shared__ float s[64]; __syncthreads(); x[i] = s[i];", None),
    "a barrier that some do not reach": ("if (i < 40) return; __syncwarp();", "has left, but __syncwarp"),
    "a barrier in a branch": (
        "if (i % 32 < 16) __syncthreads(); else __syncwarp();", r"waits at __syncthreads .*, where the __syncwarp"),
    "two places at once": ("if (i % 32 < 7) __syncwarp(); else __shfl_xor_sync(~0u, 1, 1);", "it is at"),
    "an address after a tensor": ("x[i + 1024] = 1;", r"argument 0 \(x\), element 1024 \(it has 64\)"),
    "an address before a tensor": ("if (i == 0) x[-1000] = 1;", r"argument 0 \(x\), element -1000"),
    "a write just before a tensor": ("if (i == 63) x[-2] = 1;", "writes outside argument 0"),
    "too little shared memory": ("((float*)dynamic_shared())[i + 1] = 1;", "after the 256 bytes"),
    "an index beyond an array": ("__shared__ float s[64]; s[i + 1] = 0;", "array's index"),
    "an odd address of 16 bytes": ("*(uint4*)(x + 4 * (i % 2) + 1) = make_uint4(0, 0, 0, 0);", "alignment"),
    "a copy that nobody waits for": (
        "float* s = (float*)dynamic_shared(); if (i < 16) cp_async(s + 4 * i, x + 4 * i, 16); cp_async_commit();"
        "cp_async_wait<1>(); __syncthreads(); float y = s[63 - i]; __syncthreads(); x[i] = y;", "order of its threads"),
    "a copy to an odd address": ("cp_async((char*)dynamic_shared() + 8, x, 16);", "cp.async to at an address"),
    "bytes that never come": (
        "__shared__ u64 b; if (i == 0) mbarrier_init(&b, 1); __syncthreads();"
        "if (i == 0) { mbarrier_expect_tx(&b, 64); cp_async_bulk(dynamic_shared(), x, 32, &b); } mbarrier_wait(&b, 0);",
        "for ever"),
    "more arrivals than expected": (
        "__shared__ u64 b; if (i == 0) mbarrier_init(&b, 1); __syncthreads();"
        "if (i == 0) { mbarrier_expect_tx(&b, 32); mbarrier_expect_tx(&b, 32); } mbarrier_wait(&b, 0);",
        "more threads arrive",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_the_launch(name):
    body, sentence = MISTAKES[name]
    x = torch.arange(64.0)
    if sentence is None:
        launch(body, x, shared=256)
        assert x.isnan().all()
    else:
        with pytest.raises(EmulatorError, match=sentence):
            launch(body, x, shared=256)


def test_a_call_that_does_not_fit_its_kernel_is_refused():
    source = 'extern "C" __global__ void k(float* x, int n, long long m, float f) { x[0] = n + m + f; }'
    found, x = emulator.compiled(source, emulator.HEADERS, 80), torch.zeros(1)
    emulator.start(found, "k", (1,), 32, x, 1, emulator.gpu.Long(2), 3.0)
    assert x.item() == 6
    for wrong in ((x, 1, 2, 3.0), (x, 1, emulator.gpu.Long(2)), (x, 1.0, emulator.gpu.Long(2), 3.0)):
        with pytest.raises(EmulatorError, match="the call gives"):
            emulator.start(found, "k", (1,), 32, *wrong)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).float()


def test_a_tensor_core_multiplies_by_the_manual_s_fragments():
    """Rows and columns of each register are written out here anew, from the tables of the PTX manual."""
    a, b, c = numbers(16, 16), numbers(8, 16), torch.zeros(16, 8)  # b: a column of B in a row
    body = """
    int g = i / 4, m = i % 4; float d[4] = {0, 0, 0, 0}; u32 a[4];
    for (int r = 0; r < 4; r++) {
      int row = r % 2 == 0 ? g : g + 8, column = m * 2 + (r < 2 ? 0 : 8);
      a[r] = pack_bf16(x[row * 16 + column], x[row * 16 + column + 1]);
    }
    const float* b = y + g * 16 + m * 2;
    mma(d, a, pack_bf16(b[0], b[1]), pack_bf16(b[8], b[9]));
    for (int r = 0; r < 4; r++) z[(r < 2 ? g : g + 8) * 8 + m * 2 + r % 2] = d[r];"""
    launch(body, a, b, c, block=32)
    assert torch.equal(c, a @ b.T)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_row_by_row_or_transposed(transposed):
    x, out = numbers(32, 8), torch.zeros(4, 8, 8)
    load = "ldmatrix_trans" if transposed else "ldmatrix"
    body = f"""
    u16* s = (u16*)dynamic_shared();
    for (int c = 0; c < 8; c++) s[8 * i + c] = to_bf16(x[8 * i + c]);
    __syncwarp();
    u32 r[4];
    {load}(r, s + 8 * i);
    for (int n = 0; n < 4; n++) {{ float* p = y + 64 * n + 2 * i; p[0] = bf16_low(r[n]); p[1] = bf16_high(r[n]); }}"""
    launch(body, x, out, block=32, shared=512)
    assert torch.equal(out, x.view(4, 8, 8).mT if transposed else x.view(4, 8, 8))


def test_bfloat16_is_rounded_as_torch_does():
    x = torch.cat(
        [torch.randn(1_000, generator=torch.Generator().manual_seed(0)), torch.tensor([torch.inf, -0.0, 3e38])]
    )
    x, y = torch.cat([x, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])])[:992].clone(), torch.zeros(992)
    launch("y[i] = bf16_low(to_bf16(x[i]));", x, y, block=992)
    assert torch.equal(y, x.bfloat16().float())
