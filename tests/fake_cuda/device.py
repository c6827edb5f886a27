"""What a process needs besides the guard to take `cuda:0` for a device: answers to what is asked of a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch._subclasses.fake_impls as fake_impls
import torch._subclasses.fake_tensor as fake_tensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.device("cuda:0")
ATEN = torch.library.Library("aten", "IMPL")  # its entries live as long as it
# What an H100 says of itself.
ANSWERS = {
    "get_device_capability": (9, 0),
    "get_device_name": "NVIDIA H100 80GB HBM3",
    "get_device_properties": SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", gcnArchName="", major=9, minor=0,
        multi_processor_count=132, total_memory=80 * 2**30,
        warp_size=32, shared_memory_per_block_optin=227 * 1024, max_threads_per_multi_processor=2_048,
        regs_per_multiprocessor=65_536,
    ),
    "current_device": 0,
    "device_count": 1,
    "is_bf16_supported": True,
    "max_memory_allocated": 0,
    "set_device": None,
    "synchronize": None,
}  # fmt: skip


def answer_for_a_gpu() -> None:
    """For the whole process, and for good, once the guard is loaded. Real tensors on cuda:0 are refused."""
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    # torch warns that there is no GPU and turns autocast off
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # torch begins with a real tensor on the GPU, so that there is a context
    fake_tensor.init_gpu_context = lambda device: None
    # torch's short cuts for +, -, *, / ask C++ for a device; without them these ops take the usual way
    fake_impls.get_fast_op_impls()
    fake_impls.FAST_OP_IMPLEMENTATIONS.clear()
    fake_tensor.get_fast_op_impls = dict
    for key in ("CUDA", "AutogradCUDA"):
        ATEN.impl("scaled_dot_product_attention", scaled_dot_product_attention, key)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What a GPU runs, where a CPU's torch would not: flash, or the memory-efficient kernel for a mask or fp32."""
    b, h, t, s = *q.shape[:3], k.shape[2]
    if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        k, v = (x.repeat_interleave(h // k.shape[1], 1) for x in (k, v))
    bias = None
    if attn_mask is not None:
        zero, never = (torch.full((), x, dtype=q.dtype, device=q.device) for x in (0.0, -torch.inf))
        bias = torch.where(attn_mask, zero, never) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias.expand(b, h, t, s)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """All tensors made inside are fake: on any device, in no memory. Real ones made outside become fake when used."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode
