"""Memory that shows what a kernel does outside its tensors, and what it leaves unwritten.

Every tensor lies between two bands of known bytes. New ones start as NaN, so what is not written shows in the results.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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

    def new(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, what: str, byte: int) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        buffer = self.empty(size + 2 * BAND, dtype=torch.uint8, device=device).fill_(PATTERN)
        self.buffers.append((what, buffer))
        return buffer[BAND : BAND + size].fill_(byte).view(dtype).view(shape)

    def copy(self, x: Tensor, what: str) -> Tensor:
        """A contiguous copy of x."""
        return self.new(x.shape, x.dtype, x.device, what, POISON).copy_(x)

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside, new memory of Python code has bands, in every thread, since autograd has some of its own."""
        new, zero = partial(self._replacement, POISON), partial(self._replacement, 0)
        with (
            patch.object(torch, "empty", new(torch.empty)), patch.object(torch, "empty_like", new(torch.empty_like)),
            patch.object(Tensor, "new_empty", new(Tensor.new_empty)), patch.object(torch, "zeros", zero(torch.zeros)),
        ):  # fmt: skip
            yield

    def _replacement(self, byte: int, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def replacement(*args, **options):
            # the function itself knows best which shape, dtype and device its arguments mean
            like = function(*args, **options)
            if not like.is_contiguous() or like.layout != torch.strided or like.requires_grad:
                return like
            return self.new(like.shape, like.dtype, like.device, "new memory", byte)

        return replacement

    def broken(self) -> str | None:
        """What lies between bands that were written to, or None."""
        edges = ((what, torch.cat([buffer[:BAND], buffer[-BAND:]])) for what, buffer in self.buffers)
        return next((what for what, edge in edges if not (edge == PATTERN).all()), None)
