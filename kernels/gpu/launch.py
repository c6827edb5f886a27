"""Launches the CUDA kernels of the .cu files on torch's tensors, on torch's current stream, through CuPy.

Grids, block sizes and the order of arguments are here; the kernels explain themselves in their files. CuPy is imported
at the first launch, and nvrtc.py compiles: both come with the extra `cuda` or `cuda12`.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.kernels.gpu.nvrtc import cubin_file
from nanochameleon.kernels.gpu.packages import ARCHITECTURES

KERNELS = Path(__file__).parents[1]
BACKWARD = "attention/attention_backward"
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@cache
def shared_kilobytes(device: int) -> int:
    """Shared memory of one block, at most: 163 on an A100, 227 on an H100 or B200, 99 on most others."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


@cache
def load_kernel(file: str, name: str, device: int):
    """Compile the file if needed and load one of its kernels on the device, which is the current one."""
    import cupy

    major, _ = torch.cuda.get_device_capability(device)
    return cupy.RawModule(path=str(cubin_file(KERNELS / f"{file}.cu", ARCHITECTURES[major]))).get_function(name)


def start(file: str, name: str, grid: tuple, block: int, *arguments: Tensor | int | float | None, shared: int = 0):
    """Launch one kernel. Tensors become addresses, ints and floats 32 bits, a Long 64 bits, None a null pointer."""
    import cupy
    import numpy as np

    device = next(x.device.index for x in arguments if isinstance(x, Tensor))
    kinds = {int: np.int32, float: np.float32, Long: np.int64}
    values = [
        np.uint64(0 if x is None else x.data_ptr()) if x is None or isinstance(x, Tensor) else kinds[type(x)](x)
        for x in arguments
    ]
    with torch.cuda.device(device):  # CuPy takes a stream of the current device only
        kernel = load_kernel(file, name, device)
        if shared > 40 * 1024:  # 48 KB need no permission, minus the kernel's own arrays
            kernel.max_dynamic_shared_size_bytes = shared
        with cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device):
            kernel(grid, (block,), tuple(values), shared_mem=shared)


class Long(int):
    """An argument of 64 bits."""


# ---------------------------------------------------------------------------------------------------------------------
# zloss.cu


def block_size(v: int) -> int:
    """Threads for a row of v logits: several numbers for each, and a wide row keeps a whole processor busy."""
    return 1024 if v >= 16_384 else 256


def zloss_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    n, v = logits.shape
    loss, log_z = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    if n:
        start("zloss/zloss", f"forward_{NAMES[logits.dtype]}", (n,), block_size(v), logits, targets, loss, log_z, v)
    return loss, log_z


def zloss_backward_(g: Tensor, h: Tensor, logits: Tensor, targets: Tensor, log_z: Tensor) -> None:
    """Overwrite the logits with their gradient: each thread reads what it overwrites."""
    n, v = logits.shape
    if n:
        arguments = logits, targets, log_z, g, h, v
        start("zloss/zloss", f"backward_{NAMES[logits.dtype]}", (n,), block_size(v), *arguments)


def fits_one_pass(logits: Tensor, kilobytes: int) -> bool:
    """Whether a row fits into shared memory and can be copied 16 bytes at a time."""
    size = logits.shape[1] * logits.element_size()
    return size % 16 == 0 and logits.data_ptr() % 16 == 0 and size <= (kilobytes - 2) * 1024


def zloss_overwrite(logits: Tensor, targets: Tensor, z_loss: float, scale: float, kilobytes: int):
    """Return (loss, log Z) and overwrite the logits with the gradient of scale * (loss + z_loss * log Z^2)."""
    (n, v), name = logits.shape, NAMES[logits.dtype]
    if not fits_one_pass(logits, kilobytes):
        loss, log_z = zloss_forward(logits, targets)
        g = torch.where(loss.isnan(), loss, scale)  # a target out of range has no gradient either
        zloss_backward_(g, 2 * scale * z_loss * log_z, logits, targets, log_z)
        return loss, log_z
    loss, log_z = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    if n:
        arguments = logits, targets, loss, log_z, v, float(z_loss), float(scale)
        start("zloss/zloss", f"overwrite_{name}", (n,), block_size(v), *arguments, shared=v * logits.element_size())
    return loss, log_z


# ---------------------------------------------------------------------------------------------------------------------
# qknorm_rope.cu

NORM_WARPS = 4_096  # of a gradient, which each add up the weights' gradients of their rows


def qknorm_rope(x: Tensor, cos_sin: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (B, T, H, E) bfloat16, cos_sin (B, T, E) float32, weight and bias (H, E) float32 -> like x."""
    out, (b, t, heads, e) = torch.empty_like(x), x.shape
    if x.numel():
        grid = (-(-b * t * heads // 8),)
        arguments = x, weight, bias, cos_sin, out, Long(b * t), heads, e // 2, float(eps)
        start("attention/qknorm_rope", "qknorm_rope", grid, 256, *arguments)
    return out


def qknorm_rope_backward(
    d_out: Tensor, x: Tensor, cos_sin: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; the last two are zeros without a norm."""
    d_x, (b, t, heads, e) = torch.empty_like(x), x.shape
    parts = max(1, min(b * t, NORM_WARPS // heads))
    d_weight, d_bias = (torch.zeros(parts, heads, e, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        arguments = d_out, x, weight, cos_sin, d_x, d_weight, d_bias, Long(b * t), heads, e // 2, float(eps)
        start("attention/qknorm_rope", "qknorm_rope_backward", (parts, heads), 32, *arguments)
    return d_x, d_weight.sum(0), d_bias.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# attention.cu, attention_backward.cu

TILE = 64  # queries, or keys, of a block
HEAD_DIMS = (64, 128)  # E for which attention and decode are compiled


def tile_bytes(rows: int, e: int) -> int:
    """Shared memory of a tile: each row has 16 bytes more than its numbers need (TileRow of tiles.cuh)."""
    return rows * (2 * e + 16)


def attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v after norm and rotation, bfloat16, E in HEAD_DIMS -> out like q, and lse2 (B, H, T) for the gradient."""
    b, t, heads, e = q.shape
    out, lse2 = torch.empty_like(q), torch.empty(b, heads, t, dtype=torch.float32, device=q.device)
    if q.numel():
        grid, shared = (-(-t // TILE), heads, b), tile_bytes(5 * TILE, e)
        arguments = q, k, v, doc_start, out, lse2, t, heads, k.shape[2]
        start("attention/attention", f"attention_{e}", grid, 128, *arguments, shared=shared)
    return out, lse2


def attention_backward(
    d_out: Tensor, out: Tensor, lse2: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, doc_end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v."""
    (b, t, heads, e), kv_heads = q.shape, k.shape[2]
    d_q, d_k, d_v, delta = *(torch.empty_like(x) for x in (q, k, v)), torch.empty_like(lse2)
    if not q.numel():
        return d_q, d_k, d_v
    sizes = b, t, heads, e // 2
    start(BACKWARD, "attention_delta", (-(-b * t * heads // 8),), 256, d_out, out, delta, *sizes)
    inputs, sizes = (d_out, q, k, v, lse2, delta, doc_start), (t, heads, kv_heads)
    tiles, shared = -(-t // TILE), tile_bytes(2 * TILE + 4 * (4_096 // e), e)
    for_q, for_kv = (f"attention_backward_{side}_{e}" for side in ("q", "kv"))
    start(BACKWARD, for_q, (tiles, heads, b), 128, *inputs, d_q, *sizes, shared=shared)
    start(BACKWARD, for_kv, (tiles, kv_heads, b), 128, *inputs, doc_end, d_k, d_v, *sizes, shared=shared)
    return d_q, d_k, d_v


# ---------------------------------------------------------------------------------------------------------------------
# decode.cu

SPLIT = 256  # positions of the cache that one block reads
QUERIES = 4  # queries of one KV head that share a block, where there are several


def decode_append(
    heads: Tensor, cos_sin: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float, keys: Tensor, values: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """heads (N, T, H + 2 G, E) bfloat16 -> queries (N, T, H, E); keys and values go into the cache (N, G, S, E)."""
    (n, t, all_heads, e), (kv_heads, cache_len) = heads.shape, keys.shape[1:3]
    queries = heads.new_empty(n, t, all_heads - 2 * kv_heads, e)
    if heads.numel():
        sizes = Long(n * t), t, all_heads - 2 * kv_heads, kv_heads, e // 2, cache_len, float(eps)
        arguments = heads, *(norm or (None, None)), cos_sin, positions, queries, keys, values, *sizes
        start("attention/decode", "decode_append", (-(-n * t * all_heads // 8),), 256, *arguments)
    return queries


def decode_attention(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, kv_len: int) -> Tensor:
    """Let queries (N, T, H, E), E in HEAD_DIMS, attend to the first `kv_len` positions of the cache.."""
    (n, t, heads, e), (kv_heads, cache_len) = queries.shape, keys.shape[1:3]
    out, splits = torch.empty_like(queries), -(-kv_len // SPLIT)
    if queries.numel():
        partial_out = torch.empty(splits, *queries.shape, dtype=torch.float32, device=queries.device)
        stats = torch.empty(splits, n, t, heads, 2, dtype=torch.float32, device=queries.device)
        of_head = heads // kv_heads * t  # queries of a KV head
        block_queries = 1 if of_head == 1 else QUERIES
        grid = splits, kv_heads * -(-of_head // block_queries), n
        arguments = queries, keys, values, positions, partial_out, stats, t, heads, kv_heads, cache_len
        start("attention/decode", f"decode_split_{e}_{block_queries}", grid, 128, *arguments)
        rows = n * t * heads
        arguments = partial_out, stats, out, Long(rows), splits, e // 2
        start("attention/decode", "decode_combine", (-(-rows // 8),), 256, *arguments)
    return out
