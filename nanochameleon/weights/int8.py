"""int8 weights in files of our own layout: a quarter of float32's size, and the numbers of generation/quantize.py.

    NAME.weight  int8 (N, ...)      NAME.scale  float32 (N,)      the weight is NAME.weight * NAME.scale, row by row

Matrices and convolutions are stored so; embeddings, the codebook, norms and biases are bfloat16. A model from such
files opens in float32, where quantizing it again gives the same integers.
"""

from functools import lru_cache

import torch
from torch import Tensor

from nanochameleon.errors import UserError, shown
from nanochameleon.generation.quantize import quantize
from nanochameleon.weights.tensor_files import LazyTensors


def scale_of(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


def is_stored_in_int8(name: str, x: Tensor) -> bool:
    return x.ndim > 1 and name.endswith(".weight") and "embedding" not in name and "norm" not in name


def quantized(tensors: LazyTensors) -> LazyTensors:
    """The same tensors as they are written: each quantized weight is followed by its scales."""
    meta = {}
    for name, x in tensors.meta.items():
        if is_stored_in_int8(name, x):
            meta |= {name: x.to(torch.int8), scale_of(name): torch.empty(len(x), device="meta")}
        else:
            meta[name] = x.to(torch.bfloat16)
    weights = {scale_of(name): name for name in tensors.meta if scale_of(name) in meta}

    @lru_cache(maxsize=1)  # a weight is read once for itself and its scales
    def pair(name: str) -> tuple[Tensor, Tensor]:
        q, scale = quantize(tensors.get(name).flatten(1))
        return q.view(meta[name].shape), scale

    def get(name: str) -> Tensor:
        if name in weights:
            return pair(weights[name])[1]
        return pair(name)[0] if meta[name].dtype == torch.int8 else tensors.get(name).to(torch.bfloat16)

    return LazyTensors(meta, get)


def dequantized(tensors: LazyTensors, where: object) -> LazyTensors:
    """The tensors of files that may hold int8: then all in float32, else as they are.

    Raises UserError for scales that are missing, of another dtype, or not one for each row.
    """
    int8 = {name for name, x in tensors.meta.items() if x.dtype == torch.int8}
    if not int8:
        return tensors
    for name in sorted(int8, reverse=True):  # a weight before its scales, which may be damaged too
        check_scale(name, tensors.meta[name], tensors.meta.get(scale_of(name)), where)
    scales = {scale_of(name) for name in int8}
    meta = {name: x.to(torch.float32) for name, x in tensors.meta.items() if name not in scales}

    def get(name: str) -> Tensor:
        x = tensors.get(name).float()
        return x * tensors.get(scale_of(name)).view(-1, *[1] * (x.ndim - 1)) if name in int8 else x

    return LazyTensors(meta, get)


def check_scale(name: str, weight: Tensor, scale: Tensor | None, where: object) -> None:
    if scale is None:
        raise UserError(f"{where}: {shown(name)} is int8 and lacks its scales, {shown(scale_of(name))}")
    if scale.dtype != torch.float32 or scale.shape != weight.shape[:1] or weight.ndim == 0:
        found = f"{str(scale.dtype).removeprefix('torch.')} {tuple(scale.shape)}"
        raise UserError(f"{where}: {shown(scale_of(name))} is {found}, not float32 {tuple(weight.shape[:1])}")
