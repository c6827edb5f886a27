"""Arguments of a kernel as words of a command line: `float32:4x100:random`, `int:100`, `float:1e-5`, `null`."""

import numpy as np
import torch

DTYPES = {
    name: getattr(torch, name)
    for name in ["float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "uint8", "bool"]
}
NUMBERS = {"int": np.int32, "long": np.int64, "float": np.float32}
EXAMPLE = "float32:4x100:random, int64:4:range, int:100, long:5, float:1e-5 or null"


class WrongWord(ValueError):
    """A word that is no argument; the message is a sentence."""


def random(shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    """Normally distributed; whole numbers are from 0 to 9. The same ones in every run."""
    numbers = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=numbers).to(dtype)
    return torch.randint(10, shape, generator=numbers).to(dtype)


FILLS = {
    "zeros": lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    "ones": lambda shape, dtype: torch.ones(shape, dtype=dtype),
    "range": lambda shape, dtype: torch.arange(shape.numel()).view(shape).to(dtype),
    "random": random,
}


def argument(word: str):
    """The argument that a word describes, as kernel.py takes it. Raises WrongWord."""
    kind, *rest = word.split(":")
    try:
        if kind == "null" and not rest:
            return None
        if kind in NUMBERS and len(rest) == 1:
            return NUMBERS[kind](int(rest[0], 0) if kind != "float" else rest[0])
        if kind in DTYPES and len(rest) == 2:
            shape = torch.Size(int(n) for n in rest[0].split("x"))
            if min(shape) > 0 and shape.numel() <= 2**28:
                return FILLS[rest[1]](shape, DTYPES[kind])
    except (ValueError, KeyError, OverflowError):
        pass
    raise WrongWord(f"{word!r} is not an argument: write such as {EXAMPLE}; a tensor is {', '.join(FILLS)}")
