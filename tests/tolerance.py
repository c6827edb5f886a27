"""The one rule for rounding errors: no worse than plain torch in the same type, with a floor that is derived.

    error(result) <= 2 error(naive) + eps(type) * scale,   errors as largest distance to the truth in float64

Twice the naive error alone fails correct code whenever the naive one happens to be lucky; `scale` is the size of the
numbers that the computation handles, so the floor is a few units in the last place of those.
"""

import torch
from torch import Tensor


def assert_as_good_as(result: Tensor, naive: Tensor, truth: Tensor, scale: float) -> None:
    """All of one shape; naive has the type of result, truth is float64. Finite first: NaN passes no comparison."""
    assert truth.dtype == torch.float64 and result.dtype == naive.dtype and result.shape == naive.shape == truth.shape
    assert result.isfinite().all()
    if result.numel():
        error, allowed = ((x.double() - truth).abs().max().item() for x in (result, naive))
        floor = torch.finfo(result.dtype).eps * scale
        assert error <= 2 * allowed + floor, f"error {error:.3g}, naive {allowed:.3g}, floor {floor:.3g}"
