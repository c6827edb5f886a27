"""A tensor's copy that a kernel works on, with closed memory around it: touching that ends the launch."""

import ctypes
import mmap

import torch

from nanochameleon.kernels.gpu.emulator.source import EmulatorError

PAGE = mmap.PAGESIZE
CLOSED = 16 << 20  # bytes before and after: an index that is off by less is caught


class Range(ctypes.Structure):
    """As in shadow.h: the tensor's memory, and with the closed memory around it."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in ["begin", "end", "zone_begin", "zone_end", "element", "argument", "cells"]
    ]


def contents(x: torch.Tensor) -> bytes:
    return x.detach().view(-1).view(torch.uint8).numpy().tobytes()


class Fence:
    """A copy of a tensor, argument number k, between closed memory."""

    def __init__(self, x: torch.Tensor, k: int):
        self.x, self.k, self.size = x, k, x.numel() * x.element_size()
        inside = -(-(self.size + 15) // PAGE) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self.memory = mmap.mmap(-1, inside + 2 * CLOSED, flags=flags)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for closed in (first, first + CLOSED + inside):
            if ctypes.CDLL(None).mprotect(ctypes.c_void_p(closed), CLOSED, 0):
                raise OSError("mprotect")
        slack = -(self.size + x.data_ptr()) % 16  # after the end, for the tensor's own alignment
        self.at, self.end = CLOSED + inside - self.size - slack, CLOSED + inside
        self.address = first + self.at
        end = first + self.end + CLOSED
        self.range = Range(self.address, self.address + self.size, first, end, x.element_size(), k)

    def fill(self) -> None:
        self.memory[CLOSED : self.end] = b"\xff" * (self.end - CLOSED)
        self.memory[self.at : self.at + self.size] = contents(self.x)

    def contents(self) -> bytes:
        around = self.memory[CLOSED : self.at] + self.memory[self.at + self.size : self.end]
        if around.strip(b"\xff"):
            raise EmulatorError(f"the kernel writes outside argument {self.k}")
        return self.memory[self.at : self.at + self.size]

    def first_difference(self, one: bytes, other: bytes) -> str:
        """The first element that two outcomes differ in, with both values."""
        ours, theirs = (torch.frombuffer(bytearray(x), dtype=self.x.dtype) for x in (one, other))
        bits = torch.frombuffer(bytearray(a ^ b for a, b in zip(one, other, strict=True)), dtype=torch.uint8)
        n = bits.view(-1, self.x.element_size()).any(1).nonzero()[0].item()
        return f"argument {self.k}, element {n} is {ours[n].item():g} in one order, {theirs[n].item():g} in the other"

    def keep(self, content: bytes) -> None:
        """Give the tensor this content. A tensor that is only read is not touched, for autograd."""
        if content != contents(self.x):
            self.x.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
