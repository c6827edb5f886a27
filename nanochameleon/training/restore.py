"""Restore a model and its optimizer from a checkpoint; each of the two may be sharded or not.

The optimizer's state is kept as tensors by the names of the parameters, since torch numbers the parameters instead.
"""

import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from nanochameleon.errors import UserError
from nanochameleon.training.checkpoint import read_state, readable, shapes_in, tensor_files


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: {"layer.weight.exp_avg": ..., "layer.weight.step": ...}; not copied."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of optimizer_tensors; groups, learning rate and decay stay as they are.

    Raises UserError if names or shapes are not those of this model.
    """
    named = dict(model.named_parameters())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {id(parameter): i for i, parameter in enumerate(parameters)}  # torch's state_dict names them by number
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition(".")
        if name not in named or id(named[name]) not in index:
            raise UserError(f"the checkpoint's optimizer has {name!r}, which this model lacks; was the model changed?")
        if tensor.ndim and tensor.shape != named[name].shape:
            raise UserError(f"{key} has shape {tuple(tensor.shape)}, this model needs {tuple(named[name].shape)}")
        state.setdefault(index[id(named[name])], {})[field] = tensor.clone()
    groups = optimizer.state_dict()["param_groups"]
    for group in groups:  # parameters of a group have the same fields, unless they were never updated
        if len({frozenset(state[i]) for i in group["params"] if i in state}) > 1:
            raise UserError("the checkpoint's optimizer lacks a part of its state; was it changed?")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Read a whole checkpoint into the parameters and the optimizer; each rank reads the part it holds.

    Returns the state. Raises UserError if tensors are missing, superfluous or of another shape.
    """
    weights, named = model.state_dict(), dict(model.named_parameters())
    shapes = stored_shapes(path)
    optim = {}
    for key, shape in shapes.items():
        name, _, _ = key.rpartition(".")
        if key not in weights and name in named:
            optim[key] = torch.zeros_like(named[name]) if shape else torch.zeros(())
    wanted = weights | optim
    for key in shapes.keys() ^ wanted.keys():
        raise UserError(f"{path} is not of this model: {key} is in only one of the two")
    for name in {name for name, p in named.items() if p.requires_grad} - {key.rpartition(".")[0] for key in optim}:
        raise UserError(f"{path} has no state of the optimizer for {name}: it was saved by another stage or version")
    for key, shape in shapes.items():
        if tuple(wanted[key].shape) != shape:
            raise UserError(f"{path}: {key} is {shape}, this model needs {tuple(wanted[key].shape)}")
    with readable(path):
        _read_tensors(path, wanted)
        load_optimizer(optimizer, model, optim)
        return read_state(path)


def _read_tensors(path: Path, wanted: dict[str, Tensor]) -> None:
    """Read a checkpoint's tensors in place, of sharded ones the part that this rank holds. No pickle is opened."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    reader, files = HuggingFaceStorageReader(str(path)), [str(file) for file in tensor_files(path)]
    reader.fs.ls = lambda folder: files  # by itself it reads every .safetensors in the folder
    with warnings.catch_warnings():  # it warns that it does not use the process group, as no_dist asks
        warnings.simplefilter("ignore", UserWarning)
        try:
            load(wanted, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # a BaseException
            raise RuntimeError(f"torch cannot read {path}") from error


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> full shape of every tensor in a checkpoint, put together from shards if it is sharded.

    Raises UserError if a part of a tensor is missing or there twice.
    """
    shapes, sizes = shapes_in(tensor_files(path))
    for name, shape in shapes.items():
        if sizes[name] != math.prod(shape):
            raise UserError(f"{path} has {sizes[name]} of the {math.prod(shape)} elements of {name}: delete {path}")
    return shapes
