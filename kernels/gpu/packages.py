"""What CUDA kernels need to run here: packages for torch's CUDA, and a GPU that they are compiled for."""

import sys
from functools import cache
from importlib import metadata
from importlib.util import find_spec

import torch

from nanochameleon.kernels.constant import assume_constant_result

# By the major number of the compute capability: A100 (8.0) to RTX 40 (8.9), H100, B200 and B300, RTX 50. Code for X.0
# runs on all of X.
ARCHITECTURES = {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_120"}


def installed(package: str) -> bool:
    """Whether a package can be imported. A search takes as long as a small kernel, so look at what is loaded first."""
    return package in sys.modules or find_spec(package) is not None


@cache
def distribution(name: str) -> bool:
    """Is a package of this name installed?"""
    return any(metadata.distributions(name=name))


def cuda_extra() -> str:
    """The extra of pyproject.toml with the packages for torch's own CUDA."""
    return "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda"


@assume_constant_result
def missing_cuda_package() -> str | None:
    """The package of cuda_extra() that is missing, or None. CuPy for another CUDA would fail at its first launch."""
    right, other = ("cupy-cuda12x", "cupy-cuda13x")[:: 1 if cuda_extra() == "cuda12" else -1]
    if not installed("cupy") or (distribution(other) and not distribution(right)):
        return right
    return None if installed("nvidia") else "nvidia-cuda-nvrtc"


def why_unavailable(device: torch.device) -> str | None:
    """The reason why no CUDA kernel can run on this GPU, or None."""
    if missing := missing_cuda_package():
        return f"{missing} is not installed: pip install -e '.[{cuda_extra()}]'"
    major, minor = torch.cuda.get_device_capability(device)
    unknown = f"they are not written for a GPU of compute capability {major}.{minor}"
    return None if major in ARCHITECTURES else unknown
