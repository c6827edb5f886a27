"""How a kernel becomes a torch op with a gradient: torch.compile sees a registered op, eager mode calls it directly.

A call through torch.library costs 60 us forward and 100 us with the gradient, about as long as a small model's norm
takes. So in eager mode the same functions run as a torch.autograd.Function. Not here: the kernels, and which one runs.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

FLOAT_DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
KERNEL_DTYPES = torch.float32, torch.bfloat16  # what compiled kernels read
INDEX_DTYPES = torch.int64, torch.int32


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matmul that reads x: autocast's where it casts x, else that of x."""
    kind = x.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype in FLOAT_DTYPES[:3]  # never float64
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def expect(op: str, like: Tensor, shape: Sequence[int], types: Sequence[torch.dtype], **tensors: Tensor | None) -> None:
    """Raise ValueError unless each tensor has this shape, one of these types and the device of `like`; None passes.

    A kernel takes the sizes of one tensor for those of all, so check before you take an address.
    """
    for name, x in tensors.items():
        if x is not None and (x.shape != shape or x.dtype not in types or x.device != like.device):
            wanted = " or ".join(str(kind).removeprefix("torch.") for kind in types)
            given = f"{tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}, on {x.device}"
            raise ValueError(f"{op}: {name} must be {tuple(shape)}, {wanted}, on {like.device}; it is {given}")


def is_plain_tensor(x: object) -> bool:
    """Whether x is no tensor, or one whose memory holds its values.

    False for tensors of tracing, for subclasses, and for lazily negated views (the imaginary part of a conjugate).
    """
    return not isinstance(x, Tensor) or (type(x) in (Tensor, torch.nn.Parameter) and not x.is_neg())


def register_op(name: str, forward: Callable, backward: Callable, save: Callable, gradients: Callable) -> Callable:
    """Register nanochameleon::name and ::name_backward for the CPU; returns the function that callers use.

    forward, backward: pure functions of annotated tensors and numbers.
    save(ctx, inputs, output): keep what the gradient needs.
    gradients(backward, ctx, *g): one gradient for each input, made by calling `backward`.
    Callers add the shapes for tracing (`torch.library.register_fake`) and other devices (`register_kernel`) by name.
    """
    define = partial(torch.library.custom_op, mutates_args=(), device_types="cpu")
    define(f"nanochameleon::{name}_backward", backward)
    op, op_backward = define(f"nanochameleon::{name}", forward), getattr(torch.ops.nanochameleon, f"{name}_backward")
    op.register_autograd(partial(gradients, op_backward), setup_context=save)
    op = getattr(torch.ops.nanochameleon, name)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # with setup_context torch would inspect the signature in each call
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *g):
            return gradients(backward if all(map(is_plain_tensor, g)) else op_backward, ctx, *g)

    def call(*args):
        if torch.compiler.is_compiling() or not all(map(is_plain_tensor, args)):  # the registered op handles those
            return op(*args)
        return Direct.apply(*args)

    return call
