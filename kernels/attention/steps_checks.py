"""What the rungs of attention are checked and timed with: references, inputs, and the time that no rung can beat.

Inputs of a forward pass are (q, k, v, docs), those of a gradient (q, k, v, docs, d_out) or, on a GPU,
(q, k, v, docs, d_out, doc_end). On a CPU, docs holds ids of documents, and key heads are as many as query heads. On a
GPU, docs and doc_end hold the first and last position of each document, numbers are bfloat16, and query heads share key
heads. Not here: the rungs (steps.py, steps.cu).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from numba import njit
from torch import Tensor

from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import attention_reference, visible
from nanochameleon.kernels.cpu.matmul import matmul_add
from nanochameleon.kernels.gpu.launch import HEAD_DIMS
from nanochameleon.kernels.ladder import Ladder, Limit, Rung

Results = tuple[Tensor, ...]
TILE = 64  # of the matmuls that give a CPU's limit: their three tiles stay in the L1 and L2 caches

# ---------------------------------------------------------------------------------------------------------------------
# References


def formula(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> Results:
    """Return (out,)."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return (attention_reference(*heads, visible(docs, docs)).transpose(1, 2),)


def formula_with_sums(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> Results:
    """Return (out, lse2), as the kernels of steps.cu do; lse2 (B, H, T): log2 of the sums of 2^(score log2 e)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys = (x.transpose(1, 2).to(wide) for x in (q, k))
    scores = queries @ keys.repeat_interleave(q.shape[2] // k.shape[2], 1).mT / q.shape[3] ** 0.5
    sums = scores.masked_fill(~visible(docs, docs)[:, None], -torch.inf).logsumexp(-1) / math.log(2)
    return *formula(q, k, v, docs), sums


def gradient_of(function: Callable, q: Tensor, k: Tensor, v: Tensor, docs: Tensor, d_out: Tensor, *_) -> Results:
    """The gradients of q, k and v by autograd."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(function(*leaves, docs)[0], leaves, d_out)


def lengths(*tensors: Tensor) -> list[float]:
    """The longest row of each."""
    return [x.float().norm(dim=-1).max().item() if x.numel() else 0.0 for x in tensors]


def score_scale(q: Tensor, k: Tensor) -> float:
    """How many times as large as a rounding error of a score a weight's may be. bfloat16 is widened to float32 first,
    so that there the scores add nothing."""
    longest_q, longest_k = lengths(q, k)
    return 1 + longest_q * longest_k / q.shape[3] ** 0.5 if q.dtype == torch.float32 else 1.0


def forward_scales(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> list[float]:
    scales = [score_scale(q, k) * v.abs().max().item(), score_scale(q.float(), k)]
    return scales if q.dtype == torch.bfloat16 else scales[:1]


def gradient_scales(q: Tensor, k: Tensor, v: Tensor, docs: Tensor, d_out: Tensor, *_) -> list[float]:
    (longest_v, longest_d), largest_q, largest_k = lengths(v, d_out), q.abs().max().item(), k.abs().max().item()
    d_score = longest_v * longest_d / q.shape[3]  # a typical dP / sqrt(E)
    return [score_scale(q, k) * x for x in (d_score * largest_k, d_score * largest_q, longest_d)]


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def inputs(b: int, t: int, heads: int, key_heads: int, e: int, length: int, size: float = 1.0, back: bool = False):
    """(q, k, v, docs, d_out) in float32, the same in every run. Documents have `length` tokens.

    back: every other document has the same id, so that a query also sees keys before the last document.
    """
    generator = torch.Generator().manual_seed(t + e)
    q, k, v, d_out = (torch.randn(b, t, n, e, generator=generator) for n in (heads, key_heads, key_heads, heads))
    docs = (torch.arange(t).expand(b, t) + torch.arange(b)[:, None]) // length  # each sequence begins a token later
    docs = docs % 2 if back else docs
    return size * q, size * k, v, docs.contiguous(), d_out


def for_gpu(device: torch.device, q: Tensor, k: Tensor, v: Tensor, docs: Tensor, d_out: Tensor) -> Results:
    """(q, k, v, docs, d_out, doc_end), as the kernels of steps.cu take them."""
    (doc_start, doc_end), narrow = Documents.of(docs).bounds(), [x.bfloat16() for x in (q, k, v, d_out)]
    return tuple(x.to(device) for x in (*narrow[:3], doc_start, narrow[3], doc_end))


def cpu_problems() -> Iterator[Results]:
    """Small, each of another kind."""
    yield inputs(1, 1, 1, 1, 2, length=1)
    yield inputs(2, 9, 2, 2, 6, length=1)  # documents of one token: each sees itself alone
    yield inputs(2, 70, 1, 1, 16, length=70)  # not a multiple of a tile
    yield inputs(1, 128, 2, 2, 48, length=50)
    yield inputs(2, 200, 1, 1, 6, length=30, back=True)
    yield inputs(1, 130, 1, 1, 8, length=100, size=30.0)  # scores of thousands


def gpu_problems(device: torch.device) -> Iterator[Results]:
    for e in HEAD_DIMS:
        yield for_gpu(device, *inputs(1, 70, 2, 2, e, length=33))
        yield for_gpu(device, *inputs(1, 1, 1, 1, e, length=1))
        yield for_gpu(device, *inputs(2, 9, 2, 1, e, length=1))
        yield for_gpu(device, *inputs(1, 65, 2, 1, e, length=65, size=6.0))
        yield for_gpu(device, *inputs(1, 130, 1, 1, e, length=50))


def gpu_timed(device: torch.device) -> Results:
    return for_gpu(device, *inputs(4, 4_096, 16, 16, 64, length=1_500))


# ---------------------------------------------------------------------------------------------------------------------
# The time that no rung can beat: that of the matmuls over what is seen, at the full rate of the machine


def flops(docs: Tensor, heads: int, e: int, matmuls: int) -> int:
    return 2 * matmuls * heads * e * int(visible(docs, docs).sum())


@njit
def tile_matmuls(times, a, b, c):
    """c += a b with tiles that stay in cache and sums that stay in registers, again and again."""
    for _ in range(times):
        matmul_add(TILE, TILE, a.ctypes.data, TILE, 1, b.ctypes.data, TILE, c.ctypes.data, TILE, TILE)


def matmul_job(matmuls: int, q: Tensor, k: Tensor, v: Tensor, docs: Tensor, *_) -> Callable[[], object]:
    """A job of as many multiplications and additions as this number of matmuls over what is seen."""
    count = flops(docs, *q.shape[2:], matmuls)
    if q.device.type == "cpu":
        return partial(tile_matmuls, round(count / (2 * TILE**3)), *torch.zeros(3, TILE, TILE).numpy())
    weight = torch.zeros(4_096, 4_096, dtype=q.dtype, device=q.device)
    return partial(torch.mm, weight.new_zeros(round(count / (2 * 4_096**2)), 4_096), weight)


# ---------------------------------------------------------------------------------------------------------------------
# The ladders


def ladders(forward: Sequence[Rung], gradient: Sequence[Rung], device: torch.device | None) -> list[Ladder]:
    """The ladder of forward passes and that of gradients, on a CPU (None) or with the kernels of steps.cu on a device.

    What is timed: 2 sequences of 512 tokens, 4 heads of 64, documents of 200 tokens; on a GPU 4 of 4,096, 16 heads.
    """
    on_cpu = device is None
    problems = cpu_problems if on_cpu else partial(gpu_problems, device)
    timed = partial(inputs, 2, 512, 4, 4, 64, length=200) if on_cpu else partial(gpu_timed, device)
    two, five = (Limit(f"{n} matmuls over what is seen", partial(matmul_job, k)) for n, k in (("two", 2), ("five", 5)))
    return [
        Ladder(
            "Attention, forward",
            forward,
            reference=formula if on_cpu else formula_with_sums,
            results=("out",) if on_cpu else ("out", "lse2"),
            scales=forward_scales,
            problems=lambda: (x[:4] for x in problems()),
            timed=lambda: timed()[:4],
            limit=two,
        ),
        Ladder(
            "Attention, gradients",
            gradient,
            reference=partial(gradient_of, formula),
            results=("dq", "dk", "dv"),
            scales=gradient_scales,
            problems=problems,
            timed=timed,
            limit=five,
        ),
    ]
