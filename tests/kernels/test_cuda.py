"""The CUDA files without a GPU: they compile for every architecture without spills. The emulator runs them on a CPU."""

import errno
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochameleon.kernels import caches
from nanochameleon.kernels.gpu import launch as gpu
from nanochameleon.kernels.gpu import nvrtc
from nanochameleon.kernels.gpu.packages import ARCHITECTURES

FILES = sorted(gpu.KERNELS.rglob("*.cu"))
SPILLS = {"steps.cu": 32}  # bytes a rung of a ladder may put aside, with one compiler or another; what ships, none


@pytest.mark.parametrize("architecture", ARCHITECTURES.values())
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_compiles_and_spills_nothing(path, architecture):
    cubin = nvrtc.compile_source(path.read_text(), path.name, architecture)
    assert cubin.code.startswith(b"\x7fELF")
    spills = cubin.spills()
    assert spills and all(count <= SPILLS.get(path.name, 0) for count in spills.values()), spills


def test_shared_memory_fits_every_gpu(monkeypatch):
    """A block has at most 99 KB on GPUs of capability 8.6, 8.9 and 12; what a kernel declares itself counts, too."""
    declared = {}
    for path in FILES:
        log = nvrtc.compile_source(path.read_text(), path.name, "sm_80").log
        for part in log.split("Compiling entry function '")[1:]:
            found = re.search(r"(\d+) bytes smem", part)
            declared[part.split("'")[0]] = int(found[1]) if found else 0
    needs = {}

    def start(file, name, grid, block, *arguments, shared=0):
        needs[name] = shared + declared[name]
        assert declared[name] <= 48 * 1024 and (shared > 40 * 1024 or needs[name] <= 48 * 1024)

    monkeypatch.setattr(gpu, "start", start)
    for e in gpu.HEAD_DIMS:
        q, lse2, docs = torch.zeros(1, 3, 2, e, dtype=torch.bfloat16), torch.zeros(1, 2, 3), torch.zeros(1, 3).int()
        gpu.attention(q, q, q, docs)
        gpu.attention_backward(q, q, lse2, q, q, q, docs, docs)
        for t in (1, 3):  # one query for each KV head, or several
            gpu.decode_attention(q[:, :t], q.transpose(1, 2), q.transpose(1, 2), docs[:, :t].long(), 3)
    widest = torch.zeros(1, 97 * 1024 // 4)
    assert gpu.fits_one_pass(widest, 99) and not gpu.fits_one_pass(torch.zeros(1, 97 * 1024 // 4 + 4), 99)
    gpu.zloss_overwrite(widest, torch.zeros(1).long(), 0.0, 1.0, 99)
    assert len(needs) == 13 and 80 * 1024 < max(needs.values()) <= 99 * 1024, needs


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


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    """And a temporary folder of this process takes its place."""
    monkeypatch.setattr(nvrtc, "cache_folder", lambda variable, wished: None)
    monkeypatch.setattr(nvrtc.tempfile, "tempdir", str(tmp_path))
    (path := tmp_path / "k.cu").write_text('extern "C" __global__ void k() {}')
    found = nvrtc.cubin_file(path, "sm_80")
    assert found.is_relative_to(tmp_path) and found.read_bytes().startswith(b"\x7fELF")


def test_a_cache_that_cannot_be_written_gives_way_with_one_warning(tmp_path, monkeypatch, caplog):
    caches.cache_folder.cache_clear()
    caches.say.cache_clear()
    (tmp_path / "file").touch()
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setenv("NANOCHAMELEON_CACHE", str(tmp_path / "file" / "cache"))
    for source in "kl":
        (path := tmp_path / f"{source}.cu").write_text(f'extern "C" __global__ void {source}() {{}}')
        assert nvrtc.cubin_file(path, "sm_80").is_relative_to(tmp_path / "home")
    assert len(caplog.records) == 1 and "file/cache cannot be written" in caplog.text
    caches.cache_folder.cache_clear()


def test_a_disk_that_is_full_gives_way_with_one_warning(tmp_path, monkeypatch, caplog):
    caches.say.cache_clear()
    monkeypatch.setenv("NANOCHAMELEON_CACHE", str(tmp_path / "no room"))
    monkeypatch.setattr(nvrtc.tempfile, "tempdir", str(tmp_path))
    write = Path.write_bytes

    def write_bytes(path, content):
        if "no room" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    (path := tmp_path / "k.cu").write_text('extern "C" __global__ void k() {}')
    for _ in range(2):
        assert nvrtc.cubin_file(path, "sm_80").read_bytes().startswith(b"\x7fELF")
    assert len(caplog.records) == 1 and "no room cannot be written (No space left on device)" in caplog.text


def test_a_changed_header_is_another_key(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAMELEON_CACHE", str(tmp_path))
    path = tmp_path / "k.cu"
    path.write_text('#include "extra.cuh"\nextern "C" __global__ void k() { extra(); }')
    monkeypatch.setattr(nvrtc, "headers", lambda: {"extra.cuh": "__device__ void extra() {}"})
    first = nvrtc.cubin_file(path, "sm_80")
    monkeypatch.setattr(nvrtc, "headers", lambda: {"extra.cuh": "__device__ void extra() { __syncthreads(); }"})
    assert nvrtc.cubin_file(path, "sm_80") != first


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """Two folders of packages, the second one's behind the first's: CUDA 12 and 13, then 13 again."""
    for name in ("first/nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "first/nvidia/cu13/lib/libnvrtc.so.13",
                 "second/nvidia/cu13/lib/libnvrtc.so.13"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
        path.with_name("libnvrtc-builtins.so." + path.suffix[1:] + ".0").touch()
        path.with_name("libnvrtc-builtins.alt.so." + path.suffix[1:] + ".0").touch()
    folders = [str(tmp_path / name / "nvidia") for name in ("first", "second")]
    spec = SimpleNamespace(submodule_search_locations=folders)
    monkeypatch.setattr(nvrtc, "find_spec", lambda name: spec)
    return tmp_path / "first" / "nvidia"


def test_the_compiler_is_that_of_torch_s_cuda_else_the_newest(compilers):
    twelve, thirteen = compilers / "cuda_nvrtc/lib/libnvrtc.so.12", compilers / "cu13/lib/libnvrtc.so.13"
    assert [nvrtc.library_file(cuda) for cuda in ("12.6", "13.0", None)] == [twelve, thirteen, thirteen]
    with pytest.raises(ModuleNotFoundError, match=r"for CUDA 11 is missing: pip install nvidia-cuda-nvrtc-cu11$"):
        nvrtc.library_file("11.8")


@pytest.mark.parametrize("folder", ["cuda_nvrtc/bin", "cu13/bin/x86_64"])
def test_the_compiler_is_found_on_windows(tmp_path, monkeypatch, folder):
    at = tmp_path / "nvidia" / folder
    at.mkdir(parents=True)
    for name in ("nvrtc64_130_0.dll", "nvrtc64_120_0.dll", "nvrtc64_130_0.alt.dll", "nvrtc-builtins64_130.dll"):
        (at / name).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(nvrtc, "find_spec", lambda name: spec)
    assert [nvrtc.library_file(cuda).name[:10] for cuda in ("12.6", "13.0", None)] == [
        "nvrtc64_12",
        *["nvrtc64_13"] * 2,
    ]
    loaded = []
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", loaded.append)
    monkeypatch.setattr(nvrtc.torch.version, "cuda", "13.0")
    nvrtc.library.__wrapped__()
    assert loaded == [str(at / name) for name in ("nvrtc-builtins64_130.dll", "nvrtc64_130_0.dll")]


def test_no_compiler_at_all_names_the_package(monkeypatch):
    monkeypatch.setattr(nvrtc, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install nvidia-cuda-nvrtc$"):
        nvrtc.library_file(None)


def test_what_the_compiler_needs_is_loaded_first(compilers, monkeypatch):
    loaded = []
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", loaded.append)
    monkeypatch.setattr(nvrtc.torch.version, "cuda", "12.6")
    nvrtc.library.__wrapped__()
    assert [Path(name).name for name in loaded] == ["libnvrtc-builtins.so.12.0", "libnvrtc.so.12"]
    assert {Path(name).parent for name in loaded} == {compilers / "cuda_nvrtc/lib"}


class OnSecondGPU(torch.Tensor):
    device = torch.device("cuda:1")


def test_a_launch_is_on_the_device_and_the_stream_of_its_tensors(monkeypatch):
    """Whichever device is current: CuPy refuses a stream of another one."""
    current, done = [0], []

    @contextmanager
    def device(number):
        current.append(number)
        yield
        current.pop()

    @contextmanager
    def stream(address, number):
        assert number == current[-1], "the stream is of a device that is not current"
        done.append((address, number))
        yield

    def launch(grid, block, values, shared_mem):
        done.append((grid, block, [int(x) for x in values[1:]], shared_mem, current[-1]))

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(ExternalStream=stream)))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda number: SimpleNamespace(cuda_stream=f"stream of {number}"))
    monkeypatch.setattr(gpu, "load_kernel", lambda file, name, number: kernel_on(current[-1], number))

    def kernel_on(now, number):
        assert now == number, "a kernel is loaded on the current device"
        return type("Kernel", (), {"__call__": staticmethod(launch)})()

    gpu.start("a file", "a kernel", (3,), 64, torch.zeros(2).as_subclass(OnSecondGPU), 5, None, shared=64 * 1024)
    assert done == [("stream of 1", 1), ((3,), (64,), [5, 0], 64 * 1024, 1)] and current == [0]


def test_all_inline_ptx_is_in_one_file():
    """The emulator replaces that file, so it leaves out nothing."""
    sources = {path.name: path.read_text() for path in [*FILES, *gpu.KERNELS.rglob("*.cuh")]}
    assert [name for name, text in sources.items() if "asm" in text] == ["ptx.cuh"]
