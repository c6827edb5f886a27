"""Which implementation of an op runs, and why: a value that a caller can set, never a constant of the import.

    with use_kernels("reference"): ...          for a block of code, in this thread
    NANOCHAMELEON_KERNELS=reference python ...  for a process
    otherwise "auto"                            the fastest one: on a CPU by AUTO, on a GPU by its proof (gpu/proof.py)

A request that cannot be met raises ValueError with the reason. Inputs that only PyTorch's rules combine (broadcast
shapes, mixed dtypes, empty tensors) run on the reference, whatever was requested. Not here: the implementations.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from nanochameleon.kernels.constant import assume_constant_result
from nanochameleon.kernels.gpu import packages, proof
from nanochameleon.kernels.gpu.packages import installed

NAMES = ("auto", "reference", "numba", "bf16", "cuda", "vendor")
VARIABLE = "NANOCHAMELEON_KERNELS"
MAIN_PID = os.getpid()  # the process that owns torch's OpenMP threads; launch.py may be imported only after a fork

ENGINE = "on a CPU the engine compiles whole decode steps (generation/cpu/)"

# op -> what runs on a CPU in float32 and bfloat16, and what `python -m nanochameleon.bench kernels` measured. Other
# dtypes fall back to PyTorch, and so do GPUs until `python -m nanochameleon.bench prove` has run there.
AUTO: dict[str, tuple[str, str]] = {
    "qknorm_rope_attention": ("numba", "2 to 3 times torch's norm, rotation and fused attention"),
    "zloss_cross_entropy": ("numba", "1.3 to 2 times torch.compile, 3 to 5 times torch"),
    "rms_norm": ("numba", "one pass instead of six"),
    "linear": ("joined", "layers that read one input as one matmul, gradients without sums, weights cast in one pass"),
    "swiglu": ("numba", "one pass instead of two, and instead of three in the gradient"),
    "decode_attention": ("reference", ENGINE),
}
# "cuda" is our attention for head sizes 64 and 128, and torch's for others. "vendor" is torch's attention (cuDNN's
# where torch prefers that) after our QK-norm and RoPE. The loss then runs "cuda", decoding the reference.
CUDA_DTYPES = {
    "qknorm_rope_attention": (torch.bfloat16,),
    "decode_attention": (torch.bfloat16,),
    "zloss_cross_entropy": (torch.bfloat16, torch.float32),
}
# Kernels for processors that multiply pairs of bfloat16 (cpu/bf16/), on AMX tiles or in vector registers.
BF16_OPS = {
    "qknorm_rope_attention": "matmuls of bfloat16 pairs, norms a row in each lane: up to 2.7 times float32 vectors",
    "linear": "layers that read one input as one matmul, weight gradients on AMX tiles: 1.2 to 1.8 times oneDNN's",
}
OPS = tuple(AUTO)
# The ops of a training step: decoding is not training.
TRAINING_OPS = tuple(op for op in OPS if op != "decode_attention")


class _Override(threading.local):
    """What this thread is to run. torch.compile sees a change of the name, but not of a ContextVar."""

    def __init__(self):
        self.name: str | None = None  # of use_kernels
        self.proofs: proof.Proofs | None = None  # of use_proofs


_override = _Override()


@contextmanager
def use_kernels(name: str | None) -> Iterator[None]:
    """Run every op that this thread calls inside on this implementation, one of NAMES.

    None leaves the choice to the environment. Raises ValueError for another name.
    """
    if name is not None:
        _check(name)
    before, _override.name = _override.name, name
    try:
        yield
    finally:
        _override.name = before


@contextmanager
def use_proofs(proofs: proof.Proofs | None) -> Iterator[None]:
    """Take these proofs, in this thread, in place of those of its GPU: ranks that train together agree on some."""
    before, _override.proofs = _override.proofs, proofs
    try:
        yield
    finally:
        _override.proofs = before


def same_kernels() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For torch.utils.checkpoint's `context_fn`: recomputation runs the kernels of the forward pass, in any thread."""
    name, proofs = _override.name, _override.proofs

    @contextmanager
    def again() -> Iterator[None]:
        with use_kernels(name), use_proofs(proofs):
            yield

    return nullcontext(), again()


def _check(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"there are no kernels called {name!r}: choose one of {', '.join(NAMES)}")


def requested() -> str:
    """The name requested by use_kernels, else by the environment, else "auto". An empty variable counts as unset."""
    name = _override.name or os.environ.get(VARIABLE) or "auto"
    _check(name)
    return name


def why_numba_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why Numba kernels cannot run on such tensors, or None."""
    if device.type != "cpu":
        return f"they are for the CPU, and the tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    return None if installed("numba") else "numba is not installed"


@assume_constant_result
def why_bf16_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why kernels on pairs of bfloat16 cannot run on such tensors, or None."""
    if reason := why_numba_unavailable(device, dtype):
        return reason
    if dtype != torch.bfloat16:
        return f"they take bfloat16, not {str(dtype).removeprefix('torch.')}"
    from nanochameleon.kernels.cpu.bf16 import matmul

    return matmul.why_unavailable()


@assume_constant_result
def bf16_pays(op: str) -> bool:
    """Whether they are the fastest where they run: without a matrix unit oneDNN's weight gradients are as fast."""
    from nanochameleon.kernels.cpu.bf16 import matmul

    return op in BF16_OPS and (op != "linear" or matmul.ON_TILES)


def why_cuda_unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the CUDA kernels cannot run on such tensors, or None."""
    if device.type != "cuda":
        return f"they are for NVIDIA GPUs, and the tensors are on {device.type}"
    if dtype not in CUDA_DTYPES[op]:
        return f"they do not take {str(dtype).removeprefix('torch.')}"
    return packages.why_unavailable(device)


def unsupported(name: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why this implementation cannot run, or None."""
    if name == "numba":
        return why_numba_unavailable(device, dtype)
    if name == "bf16":
        return why_bf16_unavailable(device, dtype)
    return why_cuda_unavailable(op, device, dtype) if name in ("cuda", "vendor") else None


@assume_constant_result
def proven(op: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> tuple[str, str]:
    """(implementation, reason) on a GPU where nothing is requested."""
    if op not in CUDA_DTYPES:
        return "reference", "it has no CUDA kernel"
    if dtype not in CUDA_DTYPES[op]:
        return "reference", f"the CUDA kernels do not take {str(dtype).removeprefix('torch.')}"
    return (_override.proofs or proof.load(device)).choose(op, dtype, head_dim)


def decide(op: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> tuple[str, str]:
    """(implementation, reason). Raises ValueError for a request that cannot be met.

    head_dim: of attention, for which kernels are proven one by one.
    """
    name, reason = requested(), why_numba_unavailable(device, dtype)
    if name in ("cuda", "vendor") and op not in CUDA_DTYPES:
        return "reference", "it has no CUDA kernel"
    if name in ("numba", "bf16") and op == "decode_attention" and device.type == "cpu":
        return "reference", ENGINE
    if name == "bf16" and op not in BF16_OPS:
        name = "numba"
    samples = op == "decode_attention" and device.type == "cuda"  # tokens are sampled in the dtype of the weights
    if name in ("cuda", "vendor") and samples and dtype not in CUDA_DTYPES[op]:
        return "reference", why_cuda_unavailable(op, device, dtype)
    if problem := unsupported(name, op, device, dtype):
        raise ValueError(f"the {name} kernels were requested for {op}, but {problem}")
    if name != "auto":
        return ("cuda" if name == "vendor" and op == "zloss_cross_entropy" else name), "requested"
    if reason:
        if device.type == "cuda":
            return proven(op, device, dtype, head_dim)
        return "reference", f"numba kernels cannot run: {reason}"
    if why_bf16_unavailable(device, dtype) is None and bf16_pays(op):
        return "bf16", BF16_OPS[op]
    return AUTO[op]


def choose(op: str, x: Tensor) -> str:
    """The implementation of `op` for tensors like x, (..., head_dim) for attention."""
    return decide(op, x.device, x.dtype, proven_head_dim(x) if x.is_cuda else None)[0]


def proven_head_dim(x: Tensor) -> int | None:
    """The last size of x if proofs exist for it. The comparison makes a symbolic size a constant."""
    return next((size for size in proof.HEAD_DIMS if x.shape[-1] == size), None)


def explain(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """One line for each op of a training step: what would run here, and why."""
    decided = ((op, decide(op, device, dtype, head_dim)) for op in TRAINING_OPS)
    return "\n".join(f"{op:27} {name:10} {why}" for op, (name, why) in decided)
