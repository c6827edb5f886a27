"""The CUDA files without a GPU: they compile for every architecture without spills, and calls fit their signatures.

Whether they are right is for a machine with a GPU: `python -m nanochameleon.bench kernels --device cuda` checks every
case against float64 before it times it.
"""

import re
from pathlib import Path

import pytest
import torch

from nanochameleon.kernels import gpu, nvrtc

FOLDER = Path(gpu.__file__).parent
FILES = sorted(FOLDER.glob("*.cu"))
SPILLS = 0  # bytes a kernel may put aside


def source(file: str) -> str:
    return (FOLDER / f"{file}.cu").read_text()


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_compiles_and_spills_nothing(path, architecture):
    cubin = nvrtc.compile_source(path.read_text(), path.name, architecture)
    assert cubin.code.startswith(b"\x7fELF")
    spills = cubin.spills()
    assert spills and all(count <= SPILLS for count in spills.values()), spills


def test_spills_and_errors_are_seen():
    greedy = """
    extern "C" __global__ void __launch_bounds__(1024) greedy(float* x) {
      float a[96];
      for (int i = 0; i < 96; i++) a[i] = x[threadIdx.x + i * 1024];
      __syncthreads();
      for (int r = 0; r < 96; r++) for (int i = 0; i < 96; i++) a[i] = a[i] * a[(i + 1) % 96] + x[r];
      for (int i = 0; i < 96; i++) x[threadIdx.x + i * 1024] = a[i];
    }"""
    unrolled = greedy.replace("for (int i", '_Pragma("unroll") for (int i')
    assert nvrtc.compile_source(unrolled, "g.cu", "sm_80").spills()["greedy"] > 0
    with pytest.raises(RuntimeError, match=r"g\.cu does not compile for sm_80:(.|\n)*undefined"):
        nvrtc.compile_source("__global__ void f() { undefined(); }", "g.cu", "sm_80")


def test_a_compiled_file_is_kept_until_the_source_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAMELEON_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "k.cu"
    path.write_text('extern "C" __global__ void k() {}')
    first = nvrtc.cubin_file(path, "sm_80")
    monkeypatch.setattr(nvrtc, "compile_source", None)  # not called again
    assert nvrtc.cubin_file(path, "sm_80") == first and first.read_bytes().startswith(b"\x7fELF")
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAMELEON_CACHE", str(tmp_path / "cache"))
    path.write_text('extern "C" __global__ void k(int) {}')
    assert nvrtc.cubin_file(path, "sm_80") != first


KINDS = {torch.bfloat16: ("u32", "u16"), torch.float32: ("float", "float2"), torch.int64: ("long long",)}


def parameters(file: str, name: str) -> list[str]:
    """Types of a kernel's parameters; those of a macro's kernels with its own arguments put in."""
    text = source(file).replace("\\\n", "\n")
    stem, _, last = name.rpartition("_")
    found = re.search(rf"{name}\s*\(([^)]*)\)", text) or re.search(rf"{stem}_##\w+\s*\(([^)]*)\)", text)
    kinds = {"bf16": "u16", "fp32": "float"}
    types = [re.sub(r"\bconst\b|\w+$", "", each.strip()).strip() for each in found[1].split(",")]
    return [re.sub(r"^T\b", kinds.get(last, "T"), each).replace(" *", "*") for each in types]


@pytest.fixture
def launches(monkeypatch):
    """Records launches in place of making them, having compared each with the kernel's signature."""
    made = []

    def start(file, name, grid, block, *arguments, shared=0):
        wanted = parameters(file, name)
        assert len(wanted) == len(arguments), (name, wanted)
        for kind, x in zip(wanted, arguments, strict=True):
            if isinstance(x, torch.Tensor):
                assert x.is_contiguous()
                allowed = KINDS.get(x.dtype, ("int",))
                assert kind.endswith("*") and kind[:-1].strip() in allowed, (name, kind, x.dtype)
            elif x is not None:
                assert kind == {int: "int", float: "float", gpu.Long: "long long"}[type(x)], (name, kind, x)
        assert all(size > 0 for size in grid) and block % 32 == 0 and block <= 1024
        made.append(name)

    monkeypatch.setattr(gpu, "start", start)
    return made


@pytest.mark.parametrize("dtype", gpu.NAMES)
def test_calls_of_the_loss_fit_their_kernels(launches, dtype):
    logits, targets, rows = torch.zeros(3, 40, dtype=dtype), torch.zeros(3, dtype=torch.long), torch.zeros(3)
    gpu.zloss_forward(logits, targets)
    gpu.zloss_backward(rows, rows, logits, targets, rows)
    gpu.zloss_overwrite(logits, targets, 1e-5, 1.0, 227)
    gpu.zloss_overwrite(torch.zeros(3, 41, dtype=dtype), targets, 1e-5, 1.0, 227)  # not 16 bytes at a time
    gpu.zloss_forward(logits[:0], targets[:0])
    steps = ["forward", "backward", "overwrite", "forward", "backward"]
    assert launches == [f"{step}_{gpu.NAMES[dtype]}" for step in steps]


def test_calls_of_attention_fit_their_kernels(launches):
    q, k = (torch.zeros(2, 5, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
    turns, docs = torch.zeros(2, 5, 64), torch.zeros(2, 5, dtype=torch.long)
    for weight in (torch.ones(4, 64), None):
        gpu.norm_rotary(q, turns, weight, weight, 1e-5)
        d_x, d_weight, d_bias = gpu.norm_rotary_backward(q, q, turns, weight, 1e-5)
        assert d_x.shape == q.shape and d_weight.shape == d_bias.shape == (4, 64)
    gpu.attention(q, k, k, docs)
    gpu.attention(q, k, k, docs, simple=True)
    assert launches == ["norm_rotary", "norm_rotary_backward"] * 2 + ["attention_64", "attention_simple_64"]


def test_the_first_position_of_a_document():
    docs = torch.tensor([[3, 3, -1, 3, -1], [0, 1, 1, 2, 2]])
    assert gpu.first_of_document(docs).tolist() == [[0, 0, 2, 0, 2], [0, 1, 1, 3, 3]]
