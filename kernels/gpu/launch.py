"""Calls the CUDA kernels of the .cu files with torch's tensors, on torch's current stream, through CuPy.

Here stand the grids, the block sizes and the order of arguments; what the kernels do stands in their files. CuPy is
imported at the first launch, and nvrtc.py compiles: both come with the extra `cuda` or `cuda12`.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochameleon.kernels.dispatch import architecture
from nanochameleon.kernels.gpu.nvrtc import cubin_file

KERNELS = Path(__file__).parents[1]
BACKWARD = "attention/attention_backward"
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
        module = cupy.RawModule(path=str(cubin_file(KERNELS / f"{file}.cu", made_for)))
        return module.get_function(name)


def start(file: str, name: str, grid: tuple, block: int, *arguments: Tensor | int | float | None, shared: int = 0):
    """Launches one kernel. Tensors become addresses, ints 32 bits (int64 where they are given as such), floats 32."""
    import cupy
    import numpy as np

    device = next(x.device.index for x in arguments if isinstance(x, Tensor))
    kernel = function(file, name, device)
    if shared > 40 * 1024:  # of the 48 KB that need no asking the kernel's own arrays take some
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
    loss, log_z = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    if n:
        start("zloss/zloss", f"forward_{NAMES[logits.dtype]}", (n,), threads(v), logits, targets, loss, log_z, v)
    return loss, log_z


def zloss_backward_(g: Tensor, h: Tensor, logits: Tensor, targets: Tensor, log_z: Tensor) -> None:
    """The gradient takes the logits' place: a thread reads what it overwrites."""
    n, v = logits.shape
    if n:
        arguments = logits, targets, log_z, g, h, logits, v
        start("zloss/zloss", f"backward_{NAMES[logits.dtype]}", (n,), threads(v), *arguments)


def fits_one_pass(logits: Tensor, kilobytes: int) -> bool:
    """Can a row be staged in shared memory, 16 bytes at a time?"""
    size = logits.shape[1] * logits.element_size()
    return size % 16 == 0 and logits.data_ptr() % 16 == 0 and size <= (kilobytes - 2) * 1024


def zloss_overwrite(logits: Tensor, targets: Tensor, z_loss: float, scale: float, kilobytes: int):
    """(loss, log Z), the gradient of scale * (loss + z_loss log Z^2) written over the logits."""
    (n, v), name = logits.shape, NAMES[logits.dtype]
    if not fits_one_pass(logits, kilobytes):
        loss, log_z = zloss_forward(logits, targets)
        zloss_backward_(torch.full_like(loss, scale), 2 * scale * z_loss * log_z, logits, targets, log_z)
        return loss, log_z
    loss, log_z = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    if n:
        arguments = logits, targets, loss, log_z, v, float(z_loss), float(scale)
        start("zloss/zloss", f"overwrite_{name}", (n,), threads(v), *arguments, shared=v * logits.element_size())
    return loss, log_z


# ---------------------------------------------------------------------------------------------------------------------
# norm_rotary.cu


def norm_rotary(x: Tensor, turns: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (B, T, H, E) bfloat16, turns (B, T, E) float32, weight and bias (H, E) float32 -> like x."""
    out, (b, t, heads, e) = torch.empty_like(x), x.shape
    if x.numel():
        grid = (-(-b * t * heads // 8),)
        arguments = x, weight, bias, turns, out, Long(b * t), heads, e // 2, float(eps)
        start("attention/qknorm_rope", "norm_rotary", grid, 256, *arguments)
    return out


def norm_rotary_backward(
    d_out: Tensor, x: Tensor, turns: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of x, weight and bias; the last two are zeros without a norm."""
    d_x, (b, t, heads, e) = torch.empty_like(x), x.shape
    shares = max(1, min(b * t, 2_048 // heads))
    d_weight, d_bias = (torch.zeros(shares, heads, e, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        arguments = d_out, x, weight, turns, d_x, d_weight, d_bias, Long(b * t), heads, e // 2, float(eps)
        start("attention/qknorm_rope", "norm_rotary_backward", (shares, heads), 32, *arguments)
    return d_x, d_weight.sum(0), d_bias.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# attention.cu, attention_backward.cu

TILE = 64  # positions of a block's own
HEAD_DIMS = (64, 128)  # that attention and decode are compiled for


def tile_bytes(rows: int, e: int) -> int:
    """Of shared memory: 16 bytes more than the numbers need in each row."""
    return rows * (2 * e + 16)


def document_bounds(docs: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) ids -> (B, T) int32 each: the first and the last position of each one's document. Never waits."""
    t = docs.shape[1]
    ids, order = docs.sort(dim=1, stable=True)  # a document's positions in a row, ascending
    places = torch.arange(t, device=docs.device).expand_as(docs)
    other = ids[:, 1:] != ids[:, :-1]
    begins, ends = F.pad(other, (1, 0), value=True), F.pad(other, (0, 1), value=True)
    first = places.masked_fill(~begins, 0).cummax(1).values
    last = places.masked_fill(~ends, t - 1).flip(1).cummin(1).values.flip(1)
    back = order.argsort(dim=1)
    return tuple(order.gather(1, x).gather(1, back).int() for x in (first, last))


def attention_sm90(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention`, by Hopper's own instructions: for the bench, until it was measured to be the faster one."""
    b, t, heads, e = q.shape
    out, lse = torch.empty_like(q), torch.empty(b, heads, t, dtype=torch.float32, device=q.device)
    if q.numel():
        shared = 2 * e * 6 * TILE + 2 * 4 * TILE  # tiles without room between rows, and documents of two tiles of keys
        arguments = q, k, v, first, out, lse, t, heads, k.shape[2]
        start(
            "attention/attention_sm90", f"attention_sm90_{e}", (-(-t // 128), heads, b), 256, *arguments, shared=shared
        )
    return out, lse


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, simple: bool = False) -> tuple[Tensor, Tensor]:
    """Of prepared q, k and v, bfloat16, E of HEAD_DIMS -> out like q, and lse (B, H, T) float32 for the gradient."""
    b, t, heads, e = q.shape
    out, lse = torch.empty_like(q), torch.empty(b, heads, t, dtype=torch.float32, device=q.device)
    if q.numel():
        name, block, shared = ("attention_simple", TILE, 0) if simple else ("attention", 128, tile_bytes(5 * TILE, e))
        arguments = q, k, v, first, out, lse, t, heads, k.shape[2]
        start("attention/attention", f"{name}_{e}", (-(-t // TILE), heads, b), block, *arguments, shared=shared)
    return out, lse


def attention_backward(
    d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor,
    simple: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the gradients of q, k and v."""
    (b, t, heads, e), groups = q.shape, k.shape[2]
    d_q, d_k, d_v, delta = *(torch.empty_like(x) for x in (q, k, v)), torch.empty_like(lse)
    if not q.numel():
        return d_q, d_k, d_v
    start(
        BACKWARD,
        "attention_delta",
        (-(-b * t * heads // 8),),
        256,
        d_out,
        out,
        delta,
        b,
        t,
        heads,
        e // 2,
    )
    inputs, sizes = (d_out, q, k, v, lse, delta, first), (t, heads, groups)
    if simple:
        name = f"attention_backward_simple_{e}"
        start(BACKWARD, name, (t, groups, b), 32, *inputs, last, d_q, d_k, d_v, *sizes)
        return d_q, d_k, d_v
    tiles, shared = -(-t // TILE), tile_bytes(2 * TILE + 4 * (4_096 // e), e)
    of_q, of_kv = (f"attention_backward_{side}_{e}" for side in ("q", "kv"))
    start(BACKWARD, of_q, (tiles, heads, b), 128, *inputs, d_q, *sizes, shared=shared)
    start(BACKWARD, of_kv, (tiles, groups, b), 128, *inputs, last, d_k, d_v, *sizes, shared=shared)
    return d_q, d_k, d_v


# ---------------------------------------------------------------------------------------------------------------------
# decode.cu

PIECE = 256  # places of the cache that a block reads
QUERIES = 4  # of one key head that share a block


def decode_append(
    heads: Tensor, turns: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float, keys: Tensor, values: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """heads (N, T, H + 2 G, E) bfloat16 -> queries (N, T, H, E); keys and values go into the cache (N, G, S, E)."""
    (n, t, every, e), (groups, places) = heads.shape, keys.shape[1:3]
    queries = heads.new_empty(n, t, every - 2 * groups, e)
    if heads.numel():
        sizes = Long(n * t), t, every - 2 * groups, groups, e // 2, places, float(eps)
        where = *(norm or (None, None)), turns, positions, queries, keys, values
        start("attention/decode", "decode_append", (-(-n * t * every // 8),), 256, heads, *where, *sizes)
    return queries


def decode_attention(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, span: int) -> Tensor:
    """Queries (N, T, H, E), E of HEAD_DIMS, on the first `span` places -> like them."""
    (n, t, heads, e), (groups, places) = queries.shape, keys.shape[1:3]
    out, pieces = torch.empty_like(queries), -(-span // PIECE)
    if queries.numel():
        parts = torch.empty(pieces, *queries.shape, dtype=torch.float32, device=queries.device)
        scales = torch.empty(pieces, n, t, heads, 2, dtype=torch.float32, device=queries.device)
        grid = pieces, groups * -(-heads // groups * t // QUERIES), n
        arguments = queries, keys, values, positions, parts, scales, t, heads, groups, places
        start("attention/decode", f"decode_split_{e}", grid, 128, *arguments)
        rows = n * t * heads
        start("attention/decode", "decode_join", (-(-rows // 8),), 256, parts, scales, out, Long(rows), pieces, e // 2)
    return out
