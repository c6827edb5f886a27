"""Part `attention`: what documents cost. Sequences of four documents each, forward alone and with the backward pass."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanochameleon.bench.gpu.context import Context
from nanochameleon.bench.measure import Job, median_seconds
from nanochameleon.bench.rows import Row
from nanochameleon.errors import say
from nanochameleon.kernels.attention.by_documents import attention_by_documents, kernel_for
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import attention, attention_within_documents, visible
from nanochameleon.kernels.gpu import launch as gpu

N_DOCUMENTS = 4  # per sequence
Way = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]  # q, k, v (B, T, H, E)


def dense_mask(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    mask = visible(documents.ids, documents.ids)
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)


WAYS: dict[str, Way] = {
    "one document a sequence": lambda q, k, v, documents: attention_within_documents(q, k, v, None),
    "as the model runs it": attention_within_documents,
    "flash by documents": lambda *inputs: attention_by_documents(*inputs, "flash"),
    "memory-efficient by documents": lambda *inputs: attention_by_documents(*inputs, "efficient"),
    "dense mask": dense_mask,
}


def jobs(way: Way, inputs: tuple[Tensor, ...], documents: Documents) -> dict[str, Job]:
    upstream = torch.ones_like(inputs[0])
    return {
        "f": lambda: way(*inputs, documents),
        "f+b": lambda: torch.autograd.grad(way(*inputs, documents), inputs, upstream),
    }


def own_jobs(inputs: tuple[Tensor, ...], documents: Documents) -> dict[str, Job]:
    """Our CUDA kernels alone."""
    bounds, (q, k, v) = documents.bounds(), (x.detach() for x in inputs)

    def both() -> tuple[Tensor, ...]:
        out, lse2 = gpu.attention(q, k, v, bounds[0])
        return gpu.attention_backward(out, out, lse2, q, k, v, *bounds)

    return {"f": lambda: gpu.attention(q, k, v, bounds[0]), "f+b": both}


def run(context: Context) -> Iterator[Row]:
    b, h, t, e = context.plan.attention
    device, dtype = context.device, torch.bfloat16
    inputs = tuple(torch.randn(b, t, h, e, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    documents = Documents.of((torch.arange(t) // (t // N_DOCUMENTS)).repeat(b, 1)).to(device)
    say(f"the model runs documents by the kernel: {kernel_for(device, dtype, e) or 'a mask'}")
    for name in (*WAYS, "own CUDA kernels"):
        if "by documents" in name and context.plan.dry:
            say(f"{name}: torch has this kernel for GPUs alone")
            continue
        with context.guard(f"attention, {name}"):
            found = jobs(WAYS[name], inputs, documents) if name in WAYS else own_jobs(inputs, documents)
            for which, job in found.items():
                seconds = median_seconds({"": job}, 10, device, launches=False)[""]
                yield context.row(f"attention with documents {which}", name, 1e3 * seconds, "ms")
