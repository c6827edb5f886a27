"""The fused output layer on a GPU: the sum of the weight's gradient over chunks of rows stays fp32."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fake_cuda.harness import run_on_fake_cuda
from nanochameleon.kernels import linear_zloss_cross_entropy

N, D, V = 4_096, 8, 24


class Matmuls(TorchDispatchMode):
    """Collects name, shape and dtype of each matmul's result."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, list[int], str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "mm" in func.name():
            self.found.append((func.name(), list(result.shape), str(result.dtype)))
        return result


def matmuls(narrow_weight: bool) -> list:
    """Those of the op and, after them, the dtype of the weight's gradient."""
    from fake_cuda.device import CUDA, fake_tensors

    with fake_tensors(), Matmuls() as mode:
        hidden = torch.zeros(N, D, device=CUDA, dtype=torch.bfloat16)
        weight = torch.zeros(V, D, device=CUDA, dtype=torch.bfloat16 if narrow_weight else torch.float32)
        targets = torch.zeros(N, dtype=torch.int64, device=CUDA)
        d_weight = linear_zloss_cross_entropy(hidden, weight, targets, 1e-5, 1.0)[3]
    return [*mode.found, str(d_weight.dtype)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # FSDP gathers weights in bfloat16
def test_the_gradient_of_the_weight_is_summed_in_fp32(dtype):
    *found, d_weight = run_on_fake_cuda(matmuls, narrow_weight=dtype == "bfloat16")
    of_weight = [(name, kind) for name, shape, kind in found if shape == [V, D]]
    assert of_weight == [("aten::addmm.dtype_out", "torch.float32")] * 2 and d_weight == f"torch.{dtype}"
