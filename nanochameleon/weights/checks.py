"""Do the tensors of a model's files fit its configuration: all there, none too many, of the shape, type and values that
a model has. Nothing is built before the files are known to hold as many tensors."""

from pathlib import Path

import torch
from torch import Tensor

from nanochameleon.config import ModelConfig, VQGANConfig
from nanochameleon.errors import UserError, shown
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.weights.layouts import DECODER, skeleton
from nanochameleon.weights.ranges import out_of_range
from nanochameleon.weights.tensor_files import Meta, Tensors, check_type

WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel"}


def match(expected: Meta, found: Meta, where: str) -> None:
    """Raises UserError naming a tensor that is missing, too many, of another shape or of a type that is not read."""
    for names, what in ((expected.keys() - found.keys(), "misses"), (found.keys() - expected.keys(), "has left over")):
        if names:
            for prefix, wrapper in WRAPPERS.items():
                if any(f".{prefix}" in f".{name}" for name in found):
                    what = f"of {wrapper}: save the module inside of it"
                    raise UserError(f"{where} has {prefix!r} in its tensors' names, which are those {what}")
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where} {what} {shown(min(names))}{more}")
    for name, x in expected.items():
        check_type(name, found[name].dtype, where)
        if x.shape != found[name].shape:
            raise UserError(f"{where}: {name} is {tuple(found[name].shape)}, {tuple(x.shape)} by the configuration")


def expected_weights(cfg: ModelConfig, found: Meta) -> Meta:
    """The skeleton, once the files are known to hold as many tensors: each layer has nine or more."""
    if 9 * cfg.n_layers > len(found):
        raise ValueError(f"n_layers is {shown(cfg.n_layers)}, and its files hold {len(found)} tensors in all")
    return skeleton(cfg)


def match_images(cfg: VQGANConfig, found: Meta, where: str) -> None:
    """As match, for an image tokenizer, which may lack its decoder. Raises ValueError for sizes that none has."""
    if wrong := out_of_range(vqgan=cfg):
        raise ValueError(wrong)
    if 8 * cfg.n_res_blocks * len(cfg.ch_mult) > len(found):  # as in expected_weights: a residual block has eight
        n = shown(cfg.n_res_blocks)
        raise ValueError(f"vqgan.n_res_blocks is {n}, and its image tokenizer holds {len(found)} tensors in all")
    with torch.device("meta"):
        expected = VQGAN(cfg).state_dict()
    if not any(name.startswith(DECODER) for name in found):
        expected = {name: x for name, x in expected.items() if not name.startswith(DECODER)}
    match(expected, found, where)


def finite(tensors: Tensors, path: Path) -> Tensors:
    """The same tensors; whoever reads one that is not finite gets a UserError that names it."""

    def get(name: str) -> Tensor:
        x = tensors.get(name)
        if not x.sum().isfinite():  # one pass and no copy; finite numbers may overflow in it, so they are counted
            n = sum(int((~part.isfinite()).sum()) for part in x.flatten().split(2**20))
            if n:
                raise UserError(f"the weights of {path} are not finite: {n:,} of {x.numel():,} values of {name}")
        return x

    return Tensors(tensors.meta, get)
