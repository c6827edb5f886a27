"""Tensors of which every rank holds a part (DTensor), beside plain ones: each function here takes both.

Which rank holds what is decided in distributed.py.
"""

from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Without importing torch.distributed, which takes half a second."""
    return hasattr(x, "full_tensor")


def local(x: Tensor) -> Tensor:
    """What this rank holds, as a plain tensor."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Tensor) -> Tensor:
    """All of it, on every rank of its mesh."""
    return x.full_tensor() if is_sharded(x) else x


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor -> in parts as `like` is, of its type and device; every rank has the whole, so nothing is sent."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(like.device, like.dtype)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
