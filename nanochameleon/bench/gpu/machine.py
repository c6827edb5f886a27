"""Part `machine`: versions, the speed of memory and of matmuls, and whether every kernel compiles.

python -m nanochameleon.bench.gpu.machine     prints the extra to install for the GPU at hand, cuda or cuda12
"""

import platform
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

import torch

from nanochameleon.bench.gpu.context import Context
from nanochameleon.bench.limits import matmul_flops
from nanochameleon.bench.measure import median_seconds
from nanochameleon.bench.rows import Row
from nanochameleon.errors import UserError, exit_on_user_error, say
from nanochameleon.files import commit
from nanochameleon.kernels.gpu import nvrtc
from nanochameleon.kernels.gpu.launch import KERNELS
from nanochameleon.kernels.gpu.packages import ARCHITECTURES, cuda_extra

PACKAGES = ("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12",
            "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "numpy", "numba")  # fmt: skip
DRY_HINT = "make gpu ARGS=--dry runs everything tiny on the CPU"


def driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def check_gpu() -> None:
    """Raise UserError unless torch can use an NVIDIA GPU here."""
    if torch.cuda.is_available() and torch.version.cuda:  # ROCm calls its devices cuda, too
        return
    version, cuda = driver(), torch.version.cuda
    if version is None:
        raise UserError(f"there is no NVIDIA GPU here, or no driver for it (nvidia-smi does not run): {DRY_HINT}")
    if cuda is None:
        raise UserError("this torch is built for CPUs alone: unset PIP_EXTRA_INDEX_URL, then make clean and make gpu")
    if cuda_extra() == "cuda" and int(version.partition(".")[0]) < 580:
        index = "export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu126"
        why = f"the driver {version} is too old for this torch, which is built for CUDA {cuda}"
        raise UserError(f"{why}: update it to 580 or newer, or {index}, then make clean and make gpu")
    raise UserError(f"torch finds no GPU, although the driver {version} is there: nvidia-smi shows its state")


def versions(device: torch.device) -> None:
    say(f"{platform.platform()}, python {platform.python_version()}, commit {commit()}")
    found = {name: next((each.version for each in metadata.distributions(name=name)), None) for name in PACKAGES}
    say(", ".join(f"{name} {version}" for name, version in found.items() if version))
    say(f"torch's CUDA {torch.version.cuda}, driver {driver()}, cuDNN {torch.backends.cudnn.version()}")
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        say(f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, "
            f"{gpu.multi_processor_count} multiprocessors")  # fmt: skip


def speeds(context: Context) -> Iterator[Row]:
    plan, device = context.plan, context.device
    source = torch.ones(plan.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds({"": lambda: target.copy_(source)}, 10, device)[""]
    yield context.row("copy", "torch", 2 * plan.copy_bytes / seconds / 1e12, "TB/s")
    n = plan.matmul_dim
    yield context.row(f"matmul {n}", "torch", matmul_flops(n, torch.bfloat16, device) / 1e12, "TFLOP/s")


def compile_kernels(context: Context) -> None:
    """Compile every .cu file for this GPU, in a dry run for an A100, and import CuPy."""
    capability = (8, 0) if context.plan.dry else torch.cuda.get_device_capability(context.device)
    target = ARCHITECTURES.get(capability[0])
    if target is None:
        return say(f"the kernels are not written for compute capability {capability}")
    for path in sorted(KERNELS.rglob("*.cu")):
        start = time.perf_counter()
        cubin = nvrtc.cubin_file(path, target)
        say(f"{path.name} for {target}: {cubin.stat().st_size:,} bytes in {time.perf_counter() - start:.1f} s")
    if not context.plan.dry:
        import cupy

        say(f"cupy {cupy.__version__}, CUDA runtime {cupy.cuda.runtime.runtimeGetVersion()}")


def run(context: Context) -> Iterator[Row]:
    versions(context.device)
    with context.guard("speeds"):
        yield from speeds(context)
    if context.plan.dry and not find_spec("nvidia"):
        return say("nvidia-cuda-nvrtc is not installed: nothing is compiled for a GPU")
    with context.guard("compiling the kernels"):
        compile_kernels(context)


def print_extra() -> None:
    check_gpu()
    say(cuda_extra())


if __name__ == "__main__":
    exit_on_user_error(print_extra)
