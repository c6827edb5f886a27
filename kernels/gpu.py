"""Calls the CUDA kernels of the .cu files with torch's tensors, on torch's current stream, through CuPy.

Here stand the grids, the block sizes and the order of arguments; what the kernels do stands in their files. CuPy is
imported at the first launch, and nvrtc.py compiles: both come with the extra `cuda`.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.kernels.dispatch import architecture
from nanochameleon.kernels.nvrtc import cubin_file

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@cache
def shared_kilobytes(device: int) -> int:
    """Shared memory that one block may have: 163 on an A100, 99 on other GPUs of capability 8.x, 227 on an H100."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


@cache
def function(file: str, name: str, device: int):
    """The kernel, loaded."""
    import cupy

    with cupy.cuda.Device(device):
        made_for = architecture(*torch.cuda.get_device_capability(device))
        module = cupy.RawModule(path=str(cubin_file(Path(__file__).with_name(f"{file}.cu"), made_for)))
        return module.get_function(name)


def start(file: str, name: str, grid: tuple, block: int, *arguments: Tensor | int | float | None, shared: int = 0):
    """Launches one kernel. Tensors become addresses, ints 32 bits (int64 where they are given as such), floats 32."""
    import cupy
    import numpy as np

    device = next(x.device.index for x in arguments if isinstance(x, Tensor))
    kernel = function(file, name, device)
    if shared > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = shared
    kinds = {int: np.int32, float: np.float32, Long: np.int64}
    values = [
        np.uint64(0 if x is None else x.data_ptr()) if x is None or isinstance(x, Tensor) else kinds[type(x)](x)
        for x in arguments
    ]
    with cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device):
        kernel(grid, (block,), tuple(values), shared_mem=shared)


class Long(int):
    """An argument of 64 bits."""


# ---------------------------------------------------------------------------------------------------------------------
# zloss.cu


def threads(v: int) -> int:
    """For a row of v logits: each has several numbers to do, and a wide row keeps a whole processor busy."""
    return 1024 if v >= 16_384 else 256


def zloss_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    n, v = logits.shape
    loss, log_z = (torch.empty(n, device=logits.device) for _ in range(2))
    if n:
        start("zloss", f"forward_{NAMES[logits.dtype]}", (n,), threads(v), logits, targets, loss, log_z, v)
    return loss, log_z


def zloss_backward(g: Tensor, h: Tensor, logits: Tensor, targets: Tensor, log_z: Tensor) -> Tensor:
    gradient, v = torch.empty_like(logits), logits.shape[1]
    name = f"backward_{NAMES[logits.dtype]}"
    if len(logits):
        start("zloss", name, (len(logits),), threads(v), logits, targets, log_z, g, h, gradient, v)
    return gradient


def fits_one_pass(logits: Tensor, kilobytes: int) -> bool:
    """Can a row be staged in shared memory, 16 bytes at a time?"""
    size = logits.shape[1] * logits.element_size()
    return size % 16 == 0 and logits.data_ptr() % 16 == 0 and size <= (kilobytes - 2) * 1024


def zloss_overwrite(logits: Tensor, targets: Tensor, z_loss: float, share: float, kilobytes: int):
    """(loss, log Z), the gradient of share * (loss + z_loss log Z^2) written over the logits."""
    (n, v), name = logits.shape, NAMES[logits.dtype]
    if not fits_one_pass(logits, kilobytes):
        loss, log_z = zloss_forward(logits, targets)
        g = torch.full_like(loss, share)
        arguments = logits, targets, log_z, g, 2 * share * z_loss * log_z, logits, v
        if n:
            start("zloss", f"backward_{name}", (n,), threads(v), *arguments)  # a thread reads what it overwrites
        return loss, log_z
    loss, log_z = (torch.empty(n, device=logits.device) for _ in range(2))
    if n:
        arguments = logits, targets, loss, log_z, v, float(z_loss), float(share)
        start("zloss", f"overwrite_{name}", (n,), threads(v), *arguments, shared=v * logits.element_size())
    return loss, log_z


# ---------------------------------------------------------------------------------------------------------------------
# attention.cu


def norm_rotary(x: Tensor, turns: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (B, T, H, E) bfloat16, turns (B, T, E) float32, weight and bias (H, E) float32 -> like x."""
    out, (b, t, heads, e) = torch.empty_like(x), x.shape
    if x.numel():
        grid = (-(-b * t * heads // 8),)
        arguments = x, weight, bias, turns, out, Long(b * t), heads, e // 2, float(eps)
        start("attention", "norm_rotary", grid, 256, *arguments)
    return out


def norm_rotary_backward(
    d_out: Tensor, x: Tensor, turns: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of x, weight and bias; the last two are zeros without a norm."""
    d_x, (b, t, heads, e) = torch.empty_like(x), x.shape
    shares = max(1, min(b * t, 2_048 // heads))
    d_weight, d_bias = (torch.zeros(shares, heads, e, device=x.device) for _ in range(2))
    if x.numel():
        arguments = d_out, x, weight, turns, d_x, d_weight, d_bias, Long(b * t), heads, e // 2, float(eps)
        start("attention", "norm_rotary_backward", (shares, heads), 32, *arguments)
    return d_x, d_weight.sum(0), d_bias.sum(0)


def first_of_document(docs: Tensor) -> Tensor:
    """(B, T) ids -> (B, T) int32: the first position of each one's document."""
    b, t = docs.shape
    rows = torch.arange(b, device=docs.device)[:, None].expand(b, t)
    _, group = torch.unique(torch.stack([rows, docs], -1).flatten(0, 1), dim=0, return_inverse=True)
    places = torch.arange(t, device=docs.device).repeat(b)
    least = torch.full((int(group.max()) + 1,), t, device=docs.device).scatter_reduce(0, group, places, "amin")
    return least[group].view(b, t).int()


def attention(q: Tensor, k: Tensor, v: Tensor, docs: Tensor, simple: bool = False) -> Tensor:
    """Of prepared q, k and v, bfloat16, E 64 or 128 -> out like q. Without a backward pass: for the bench."""
    b, t, heads, e = q.shape
    out = torch.empty_like(q)
    if q.numel():
        name, block = ("attention_simple", 64) if simple else ("attention", 128)
        arguments = q, k, v, docs, first_of_document(docs), out, t, heads, k.shape[2]
        start("attention", f"{name}_{e}", (-(-t // 64), heads, b), block, *arguments)
    return out
