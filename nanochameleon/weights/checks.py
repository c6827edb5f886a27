"""Check a model's files against its configuration: every tensor is there, and none has a wrong shape, dtype or value.

Nothing is built before the files are known to hold as many tensors, so a huge number in a configuration costs nothing.
"""

from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.config import ModelConfig, VQGANConfig
from nanochameleon.errors import UserError, shown
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.weights.layouts import DECODER, weight_shapes
from nanochameleon.weights.ranges import out_of_range
from nanochameleon.weights.tensor_files import LazyTensors, Meta, check_dtype

WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel"}


def check_tensors(expected: Meta, found: Meta, where: str) -> None:
    """Raise UserError naming a tensor that is missing, left over, of another shape or of a dtype that is not read."""
    for names, what in (
        (expected.keys() - found.keys(), "lacks"),
        (found.keys() - expected.keys(), "has an unexpected tensor,"),
    ):
        if names:
            for prefix, wrapper in WRAPPERS.items():
                if any(f".{prefix}" in f".{name}" for name in found):
                    what = f"of {wrapper}: save the module inside of it"
                    raise UserError(f"{where} has {prefix!r} in its tensors' names, which are those {what}")
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where} {what} {shown(min(names))}{more}")
    for name, x in expected.items():
        check_dtype(name, found[name].dtype, where)
        if x.shape != found[name].shape:
            raise UserError(f"{where}: {name} is {tuple(found[name].shape)}, {tuple(x.shape)} by the configuration")


def expected_weights(cfg: ModelConfig, found: Meta) -> Meta:
    """Return the transformer's tensors by name. Raises ValueError where the files hold too few for its layers."""
    if 9 * cfg.n_layers > len(found):  # each layer has nine tensors or more
        raise ValueError(f"n_layers is {shown(cfg.n_layers)}, and its files hold {len(found)} tensors in all")
    return weight_shapes(cfg)


def check_image_tokenizer(cfg: VQGANConfig, found: Meta, where: str) -> None:
    """Do the same as check_tensors for an image tokenizer, which may lack its decoder.

    Raises ValueError for sizes that no image tokenizer has.
    """
    if wrong := out_of_range(vqgan=cfg):
        raise ValueError(wrong)
    if 8 * cfg.n_res_blocks * len(cfg.ch_mult) > len(found):  # each residual block has eight tensors or more
        n = shown(cfg.n_res_blocks)
        raise ValueError(f"vqgan.n_res_blocks is {n}, and its image tokenizer holds {len(found)} tensors in all")
    with torch.device("meta"):
        expected = VQGAN(cfg).state_dict()
    if not any(name.startswith(DECODER) for name in found):
        expected = {name: x for name, x in expected.items() if not name.startswith(DECODER)}
    check_tensors(expected, found, where)


def check_finite(tensors: LazyTensors, path: Path) -> LazyTensors:
    """Return the same tensors; reading one with NaN or infinity raises a UserError that names it."""

    def get(name: str) -> Tensor:
        x = tensors.get(name)
        if not x.sum().isfinite():  # one pass without a copy; a sum of finite values may overflow, so count them
            n = sum(int((~part.isfinite()).sum()) for part in x.flatten().split(2**20))
            if n:
                raise UserError(f"the weights of {path} are not finite: {n:,} of {x.numel():,} values of {name}")
        return x

    return LazyTensors(tensors.meta, get)
