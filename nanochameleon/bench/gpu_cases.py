"""The GPU's cases of the kernel bench, and the checks that come before any timing there.

No machine without a GPU can run this file's kernels, so the checks stand here, beside the clock: every CUDA kernel
against float64, odd sizes included, by the rule of the tests: at most twice the error of torch's own bfloat16.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochameleon.bench.kernels import Z_LOSS, Case, attention_case, check, zloss_case
from nanochameleon.kernels import gpu
from nanochameleon.kernels.attention import attention_reference, visible
from nanochameleon.kernels.zloss import zloss_cross_entropy_, zloss_cross_entropy_reference

NARROW = torch.bfloat16


def cases(device: torch.device, quick: bool, op: str) -> Iterator[Case]:
    """The rows of docs/results.md; each kernel is checked at small sizes first."""
    sizes = [(2, 300, 4, 64), (1, 200, 2, 128), (2, 70, 3, 48)]
    if op in ("all", "attention"):
        for b, t, h, e in sizes:
            check(attention_case(b, t, h, e, NARROW, True, device))
        check_own_attention(device)
        for b, t, h, e in [(16, 1_024, 16, 64)] if quick else [(16, 1_024, 16, 64), (4, 4_096, 32, 128)]:
            yield with_own_kernels(attention_case(b, t, h, e, NARROW, False, device))
    if op in ("all", "zloss"):
        for v in (33, 940, 4_096, 65_536):
            for dtype in (NARROW, torch.float32):
                check(zloss_case(40, v, dtype, device))
                check_in_place(40, v, dtype, device)
        for n, v in [(8_192, 4_096)] if quick else [(65_536, 4_096), (32_768, 65_536)]:
            yield zloss_case(n, v, NARROW, device)


def random_heads(b: int, t: int, heads: int, e: int, device: torch.device) -> Tensor:
    return torch.randn(b, t, heads, e, device=device, dtype=NARROW)


def with_own_kernels(case: Case) -> Case:
    """Times this project's own attention on tensor cores too, on its prepared inputs: without norm and turn."""
    q, k, v = (x.detach() for x in case.inputs[:3])
    docs = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    case.extra_forward["own kernel"] = lambda: gpu.attention(q, k, v, docs)
    return case


def compare(name: str, result: Tensor, plain: Tensor, truth: Tensor) -> None:
    error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (result, plain))
    if not error <= 2 * allowed + 1e-5:
        raise AssertionError(f"{name} is off by {error:.2g}, torch's own by {allowed:.2g}")


def check_own_attention(device: torch.device) -> None:
    """Both kernels, grouped keys and documents of any order."""
    for t, heads, key_heads, e in ((1, 2, 2, 64), (130, 4, 2, 64), (200, 4, 1, 128)):
        q, k, v = (random_heads(2, t, h, e, device) for h in (heads, key_heads, key_heads))
        docs = torch.randint(0, 3, (2, t), device=device)
        mask = visible(docs, docs)
        truth, plain = (
            attention_reference(*(x.to(kind).transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)
            for kind in (torch.float64, NARROW)
        )
        for simple in (False, True):
            out = gpu.attention(q, k, v, docs, simple)
            compare(f"attention{'_simple' if simple else ''}_{e} at T {t}", out, plain, truth)


def check_in_place(n: int, v: int, dtype: torch.dtype, device: torch.device) -> None:
    """The one-pass kernel, ignored rows included."""
    logits = torch.randn(n, v, device=device).to(dtype)
    targets = torch.randint(v, (n,), device=device)
    targets[::5] = -100

    def gradient(kind: torch.dtype) -> Tensor:
        x = logits.to(kind).requires_grad_()
        loss, log_z = zloss_cross_entropy_reference(x, targets)
        return torch.autograd.grad((loss + Z_LOSS * log_z.square()).sum() / n, x)[0]

    truth, plain = gradient(torch.float64), gradient(dtype)
    result = logits.clone()
    zloss_cross_entropy_(result, targets, Z_LOSS, 1 / n)
    compare(f"overwrite {n} x {v} {dtype}", result, plain, truth)
