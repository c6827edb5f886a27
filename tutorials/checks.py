"""Check the exercises: `check("words.replace_pair", answer)` prints right, "not done yet", or where it is wrong.

Each lesson's checks are in specs/, one function an exercise; a worked answer to each is in solutions/. A check prints
and never raises, so an untouched lesson runs from top to bottom.
"""

import copy
import functools
import importlib
import inspect
import numbers
import traceback
from collections.abc import Callable, Iterable

import numpy as np
import torch

RIGHT, NOT_DONE = "right", "not done yet"
LONGEST = 200  # characters of a value that a message shows


class Wrong(Exception):
    """An answer is wrong; the message is a sentence that says where."""


class NotDone(Exception):
    """The answer, or something that it returned, is still `...`."""


def check(name: str, answer) -> None:
    """Print what `verdict` says of the answer to the exercise "lesson.exercise"."""
    print(f"{name}: {verdict(name, answer)}")


def verdict(name: str, answer) -> str:
    """Return RIGHT, NOT_DONE, or a sentence that says what is wrong with the answer."""
    lesson, exercise = name.split(".")
    spec = getattr(importlib.import_module(f"specs.{lesson}"), exercise)
    try:
        spec(watched(done(answer)))
    except NotDone:
        return NOT_DONE
    except Wrong as error:
        return str(error)
    except Exception as error:  # an answer may fail in any way
        return f"your answer raised {type(error).__name__}{line_of(error, answer)}: {error}"
    return RIGHT


def line_of(error: Exception, answer) -> str:
    """Return the line of the answer that raised, such as ' at `return 1 / x`', or nothing if no line is known."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [each.line for each in traceback.extract_tb(error.__traceback__) if each.line and each.filename == file]
    return f" at `{lines[-1]}`" if lines else ""


def done(value):
    """Return the value; raise NotDone where it is `...`, or a tuple or list that holds one."""
    if value is ... or (isinstance(value, (tuple, list)) and any(part is ... for part in value)):
        raise NotDone
    return value


def watched(answer):
    """Return a function that raises NotDone where the answer, itself a function, returns `...`."""
    if not inspect.isroutine(answer):
        return answer
    return functools.wraps(answer)(lambda *args, **options: done(answer(*args, **options)))


def compare(answer: Callable, spec: Callable, inputs: Iterable[tuple], tolerance: float = 1e-5) -> None:
    """Raise Wrong at the first of the inputs, tuples of arguments, for which the answer differs from the spec."""
    for args in inputs:
        expected = spec(*copy.deepcopy(args))
        given = answer(*copy.deepcopy(args))
        if not same(expected, given, tolerance):
            what = ", ".join(map(shown, args))
            raise Wrong(f"for {what} {difference(expected, given, tolerance)}")


def close(answer, value: float, tolerance: float) -> None:
    """Raise Wrong unless the answer is a number within `tolerance` of the value. It does not say the value."""
    if isinstance(answer, bool) or not same(0.0, answer, float("inf")):
        raise Wrong(f"the answer is a number, not {shown(answer)}")
    if not abs(float(answer) - value) <= tolerance:
        raise Wrong(f"{shown(answer)} is too {'large' if answer > value else 'small'}")


def same(a, b, tolerance: float) -> bool:
    """Are they equal? Numbers, arrays and tensors up to the tolerance, relative or absolute; lists part by part."""
    if isinstance(a, (list, tuple)):
        b = list(b) if isinstance(b, (np.ndarray, torch.Tensor)) and b.ndim else b
        alike = isinstance(b, (list, tuple)) and len(a) == len(b)
        return alike and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, (numbers.Number, np.ndarray, torch.Tensor)):
        try:
            x, y = (as_tensor(value).detach().double() for value in (a, b))
        except (TypeError, ValueError, RuntimeError):
            return False
        return x.shape == y.shape and torch.allclose(x, y, tolerance, tolerance, equal_nan=True)
    return bool(a == b)


def difference(expected, given, tolerance: float) -> str:
    """Say how two results differ: both if they are short, or the shapes, or the first place that differs."""
    whole = f"the result is {shown(expected)}, and your answer gives {shown(given)}"
    if not isinstance(expected, (np.ndarray, torch.Tensor)) or len(repr(expected)) <= LONGEST:
        return whole
    try:
        a, b = (as_tensor(value).detach() for value in (expected, given))
    except (TypeError, ValueError, RuntimeError):
        return whole
    if a.shape != b.shape:
        return f"the result has the shape {tuple(a.shape)}, and your answer's is {tuple(b.shape)}"
    far = ~torch.isclose(a.double(), b.double(), tolerance, tolerance, equal_nan=True)
    place = tuple(far.nonzero()[0].tolist())
    return f"the result at {list(place)} is {a[place].item():.5g}, and your answer gives {b[place].item():.5g}"


def as_tensor(value) -> torch.Tensor:
    """Convert a number, an array, a tensor or a list of them. Raises as torch does for anything else."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, torch.Tensor) for part in value):
        return torch.stack(list(value))
    if isinstance(value, float):  # torch would round it to float32
        return torch.tensor(value, dtype=torch.float64)
    return torch.as_tensor(value)


def shown(value) -> str:
    text = repr(value)
    if len(text) > LONGEST and isinstance(value, (np.ndarray, torch.Tensor)):
        kind = f"{value.dtype} array" if isinstance(value, np.ndarray) else f"{value.dtype} tensor"
        size = f"{kind.removeprefix('torch.')} of shape {tuple(value.shape)}"
        if not isinstance(value, torch.Tensor) or value.is_complex():
            return size
        return f"{size} from {value.min().item():.5g} to {value.max().item():.5g}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
