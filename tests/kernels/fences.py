"""Tensors that end at a closed page: a read past the end kills the process."""

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


def fenced(x: Tensor) -> Tensor:
    """A copy of x with its strides and its bits (negative, conjugate), whose last number is the last of its page."""
    if x.is_neg() or x.is_conj():
        flip = torch._neg_view if x.is_neg() else torch.conj
        return flip(fenced(flip(x)))
    if not x.numel():
        return x.clone()
    count = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    inside = -(-count * x.element_size() // PAGE) * PAGE
    memory = mmap.mmap(-1, inside + PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + inside), PAGE, 0):
        raise OSError("mprotect")
    flat = torch.frombuffer(memory, dtype=x.dtype, count=count, offset=inside - count * x.element_size())
    flat.copy_(x.as_strided((count,), (1,)))
    return flat.as_strided(x.shape, x.stride())
