"""Watches every op: host syncs, tensors on the wrong device, dense masks, bytes moved and bytes kept for the gradient.

Tensors on cuda:0 are fake, and those of the host are real: what the host computes from them is right. What the host
reads from the GPU is 1 (a tensor: 0), and the recorder gets a line. So a step runs to its end, however many syncs it
has.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fake_cuda.device import scaled_dot_product_attention as sdpa

TESTS, ROOT = Path(__file__).parent, Path(__file__).parents[2]
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
COPIES = ("_to_copy", "copy_", "_pin_memory", "lift_fresh")
# They move no bytes.
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "device", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "view_as_complex", "view_as_real",
}  # fmt: skip


def op_name(func) -> str:
    return func._schema.name.split("::")[1]


def size(x: Tensor) -> int:
    """Bytes that a kernel reads of x: broadcast dimensions once."""
    n = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        n *= length if stride else 1
    return n


def place() -> str:
    """The innermost line of the package or of train.py that is running."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parent != TESTS and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "an unknown place"


class Recorder(TorchDispatchMode):
    """Use inside fake_tensors(). Its lists have one line for each op found, with the line of code that called it."""

    def __init__(self, seq_len: int = 0):
        super().__init__()
        self.seq_len = seq_len
        self.phase = ""
        self.syncs: list[str] = []  # "phase: op at file:line (function)"
        self.mixed: list[str] = []  # ops with a tensor of the host that is not a number, next to tensors of the GPU
        self.dense: list[str] = []  # ops that make a tensor with two dimensions of seq_len
        self.bytes: Counter[tuple[str, str]] = Counter()  # (phase, op) -> bytes read and written
        self.calls: Counter[tuple[str, str]] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile works under this mode, which then sees the ops of the compiled graphs."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if op_name(func) == "device":
            return func(*args, **kwargs)
        if on_host(inputs, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode nobody has taken it apart yet
                return (sdpa if op_name(func) == "scaled_dot_product_attention" else func.decompose)(*args, **kwargs)
        out = self.run(func, args, kwargs, inputs)
        self.note(func, args, kwargs, inputs, [x for x in tree_leaves(out) if isinstance(x, Tensor)])
        return out

    def run(self, func, args: tuple, kwargs: dict, inputs: list[Tensor]):
        name = op_name(func)
        if name == "_local_scalar_dense":
            self.syncs.append(self.line(name))
            return inputs[0].dtype == torch.bool or (1.0 if inputs[0].is_floating_point() else 1)
        if name == "nonzero":
            self.syncs.append(self.line(name))
            return inputs[0].new_zeros(inputs[0].numel(), inputs[0].ndim, dtype=torch.long)
        if name in COPIES and all(x.device.type != "cpu" for x in inputs[-1:]) and to_host(args, kwargs):
            self.syncs.append(self.line("copy to the host"))
            with unset_fake_temporarily():
                if name == "copy_":
                    return args[0]
                zero = torch.zeros((), dtype=kwargs.get("dtype") or inputs[-1].dtype)
                return zero.expand(inputs[-1].shape)  # in no memory
        if name in INDEXED and any(is_mask(x) for x in args[1]):
            self.syncs.append(self.line(f"{name} with a mask"))
            places = [place for x in args[1] for place in (all_true(x) if is_mask(x) else [x])]
            args = args[0], places, *args[2:]
        return func(*args, **kwargs)

    def note(self, func, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name, kinds = op_name(func), {x.device.type for x in (*inputs, *outputs)}
        if name in COPIES:
            if "cpu" in kinds and outputs[0].device.type != "cpu" and not non_blocking(func, args, kwargs):
                self.syncs.append(self.line("copy from the host"))
        elif len(kinds) > 1 and any(x.device.type == "cpu" and x.ndim for x in inputs):
            self.mixed.append(self.line(name))
        if self.seq_len and any(list(x.shape).count(self.seq_len) > 1 for x in outputs):
            self.dense.append(self.line(name))
        if name not in VIEWS:
            read = {id(x): size(x) for x in inputs}
            written = {id(x): size(x) for x in outputs}  # in place: the same tensor is read and written
            self.bytes[self.phase, name] += sum(read.values()) + sum(written.values())
            self.calls[self.phase, name] += 1

    def line(self, name: str) -> str:
        return f"{self.phase}: {name} at {place()}"


def to_host(args: tuple, kwargs: dict) -> bool:
    """Whether a copy from the GPU ends on the host."""
    device = args[0].device if len(args) > 1 and isinstance(args[1], Tensor) else kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def non_blocking(func, args: tuple, kwargs: dict) -> bool:
    return bool(kwargs.get("non_blocking") or (op_name(func) == "copy_" and len(args) > 2 and args[2]))


def is_mask(x: Tensor | None) -> bool:
    return x is not None and x.dtype in (torch.bool, torch.uint8)


def all_true(mask: Tensor) -> list[Tensor]:
    """Indices in place of a mask, whose shape does not depend on values: as many as if all of it were true."""
    return [mask.new_zeros(mask.numel(), dtype=torch.long) for _ in range(mask.ndim)]


def on_host(inputs: list[Tensor], kwargs: dict) -> bool:
    """Whether an op is the host's own: all of its tensors are real, or it makes one there."""
    device = kwargs.get("device")
    return all(not isinstance(x, FakeTensor) and x.device.type == "cpu" for x in inputs) and (
        device is None or torch.device(device).type == "cpu"
    )
