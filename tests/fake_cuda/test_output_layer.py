"""The fused output layer on a GPU: the sum of the weight's gradient over chunks of rows stays fp32."""

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


def matmuls() -> list:
    from fake_cuda.device import CUDA, fake_tensors

    with fake_tensors(), Matmuls() as mode:
        hidden, weight = torch.zeros(N, D, device=CUDA, dtype=torch.bfloat16), torch.zeros(V, D, device=CUDA)
        linear_zloss_cross_entropy(hidden, weight, torch.zeros(N, dtype=torch.int64, device=CUDA), 1e-5, 1.0)
    return mode.found


def test_the_gradient_of_the_weight_is_summed_in_fp32():
    of_weight = [(name, dtype) for name, shape, dtype in run_on_fake_cuda(matmuls) if shape == [V, D]]
    assert of_weight == [("aten::addmm.dtype_out", "torch.float32")] * 2
