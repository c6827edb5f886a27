"""Helpers for tensors that may be sharded over ranks (torch's DTensor). Each takes plain tensors, too."""

from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor, without importing torch.distributed, which takes half a second."""
    return hasattr(x, "full_tensor")


def full_tensor(x: Tensor) -> Tensor:
    """Gather all of x on every rank of its mesh."""
    return x.full_tensor() if is_sharded(x) else x


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor as `like` is, with its type and device. Every rank has the full one, so nothing is sent."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(like.device, like.dtype)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
