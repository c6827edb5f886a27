"""An op as torch sees it: registered, so that torch.compile keeps it whole, and called without that registration.

torch.library's Python side costs 60 us a call in the forward pass and 100 us with the gradient, about as long as a
small model's norm takes. So in eager mode the same functions run as a torch.autograd.Function.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def product_type(x: Tensor) -> torch.dtype:
    """The type of the matrix products that read x: autocast's, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def differentiable(name: str, forward: Callable, backward: Callable, save: Callable, gradients: Callable) -> Callable:
    """Registers nanochameleon::name and ::name_backward for the CPU, and returns the function that callers use.

    forward, backward: pure functions of annotated tensors and numbers. save(ctx, inputs, output): what the gradient
    needs. gradients(backward, ctx, *g): one gradient for each input, through `backward`. What tracing sees of both
    (`torch.library.register_fake`) and other devices (`register_kernel`) are added under these names.
    """
    define = partial(torch.library.custom_op, mutates_args=(), device_types="cpu")
    define(f"nanochameleon::{name}_backward", backward)
    op, op_backward = define(f"nanochameleon::{name}", forward), getattr(torch.ops.nanochameleon, f"{name}_backward")
    op.register_autograd(partial(gradients, op_backward), setup_context=save)
    op = getattr(torch.ops.nanochameleon, name)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # torch's `setup_context` would look at the signature anew in every call
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *g):
            return gradients(backward, ctx, *g)

    def call(*args):
        if torch.compiler.is_compiling() or type(args[0]) is not Tensor:  # tensors without memory, of other libraries
            return op(*args)
        return Direct.apply(*args)

    return call
