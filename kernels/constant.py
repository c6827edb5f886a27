"""Marks functions whose results torch.compile may take as constants."""

from collections.abc import Callable


def assume_constant_result(function: Callable) -> Callable:
    """Do the same as torch.compiler.assume_constant_result.

    That one imports torch's compiler, which takes longer than drawing an image with the toy.
    """
    function._dynamo_marked_constant = True
    return function
