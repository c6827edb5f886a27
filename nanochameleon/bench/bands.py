"""Memory that shows what a kernel does outside its tensors, and what it leaves unwritten.

Every tensor lies between two bands of known bytes. New ones start as NaN, so what is not written shows in the results.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

BAND, PATTERN = 4_096, 0xA5  # bytes on each side, a multiple of what torch aligns memory to; and their value
POISON = 0xFF  # in every byte: NaN in each float type


class Bands:
    """Makes tensors with bands, and remembers them."""

    def __init__(self):
        self.buffers: list[tuple[str, Tensor]] = []  # (what it holds, bytes)
        self.empty = torch.empty  # the real one

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str, fill: int) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        buffer = self.empty(size + 2 * BAND, dtype=torch.uint8, device=device).fill_(PATTERN)
        self.buffers.append((what, buffer))
        return buffer[BAND : BAND + size].fill_(fill).view(dtype).view(shape)

    def copy(self, x: Tensor, what: str) -> Tensor:
        """A contiguous copy of x."""
        return self.new(x.shape, x.dtype, x.device, what, POISON).copy_(x)

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside, new memory of Python code has bands, in every thread, since autograd has some of its own."""

        def empty(*shape, dtype=None, device=None, fill=POISON):
            shape = shape[0] if shape and not isinstance(shape[0], int) else shape
            dtype, device = dtype or torch.get_default_dtype(), torch.device(device or torch.get_default_device())
            return self.new(tuple(shape), dtype, device, "new memory", fill)

        def like(x, dtype=None, device=None, memory_format=None):
            return empty(x.shape, dtype=dtype or x.dtype, device=device or x.device)

        def new_empty(x, *shape, dtype=None, device=None):
            return empty(*shape, dtype=dtype or x.dtype, device=device or x.device)

        def zeros(*shape, **options):
            return empty(*shape, **options, fill=0)

        with (
            patch.object(torch, "empty", empty), patch.object(torch, "empty_like", like),
            patch.object(torch, "zeros", zeros), patch.object(Tensor, "new_empty", new_empty),
        ):  # fmt: skip
            yield

    def broken(self) -> str | None:
        """What lies between bands that were written to, or None."""
        edges = ((what, torch.cat([buffer[:BAND], buffer[-BAND:]])) for what, buffer in self.buffers)
        return next((what for what, edge in edges if not (edge == PATTERN).all()), None)
