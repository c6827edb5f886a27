"""Where torch's flash attention for sequences of any lengths, `varlen_attn`, can run. Not here: what is run on it."""

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from nanochameleon.kernels.constant import assume_constant_result


@cache
def find_varlen_attn() -> Callable[..., Tensor] | None:
    """torch's varlen_attn if it takes shared key heads and the lengths of a cache, as since torch 2.12; else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # not at the top: it imports torch's compiler
    except ImportError:  # before torch 2.10
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"seqused_k", "enable_gqa"} <= known.keys() else None


@assume_constant_result
def flash_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether varlen_attn takes such queries and keys."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and find_varlen_attn() is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
