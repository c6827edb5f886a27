"""What a process needs besides the guard to take `cuda:0` for a device: answers to what is asked of a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch._subclasses.fake_impls as fake_impls
import torch._subclasses.fake_tensor as fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.device("cuda:0")
# What an H100 says of itself.
ANSWERS = {
    "get_device_capability": (9, 0),
    "get_device_name": "NVIDIA H100 80GB HBM3",
    "get_device_properties": SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
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


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """All tensors made inside are fake: on any device, in no memory. Real ones made outside are refused."""
    with FakeTensorMode() as mode:
        yield mode
