"""The definition of rotary embedding, in complex numbers."""

import torch
from torch import Tensor


def rotated_pairs(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """x (..., E), freqs_cis (..., E/2, 2) -> complex (..., E/2): each pair of neighbours times cos + i sin."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.view_as_complex(freqs_cis)


def rotated(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """The same as real numbers, like x."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.view_as_real(rotated_pairs(wide, freqs_cis)).flatten(-2).type_as(x)
