"""What lesson 8's answers must do: checked against sums in float64 and against the library's kernel."""

import math
import random
from collections.abc import Iterator

import torch

from checks import Wrong, close, compare
from nanochameleon.kernels.zloss.steps import shipped


class _Once(list):
    """A list whose numbers can be read once, from first to last."""

    def __iter__(self):
        if getattr(self, "read", False):
            raise Wrong("the logits were read a second time: one pass is allowed")
        self.read = True
        return super().__iter__()

    def __getitem__(self, index):
        raise Wrong("the logits come one by one, without an index: use a for loop")


def _log_sum_exp(values: list[float]) -> float:
    largest = max(values)
    if largest == -math.inf:
        return -math.inf
    return largest + math.log(math.fsum(math.exp(x - largest) for x in values))


def _rows() -> Iterator[list[float]]:
    """Rising and falling rows first, then far from zero, then with -infinity."""
    rng = random.Random(0)
    yield from ([0.0], [1.0, 2.0], [3.0, 1.0], [1e4, -1e4], [-1e4, 1e4], [-1e4, -1e4 + 1])
    yield from ([-math.inf, 1.0], [2.0, -math.inf, 3.0], [-math.inf], [-math.inf, -math.inf])
    for size in (1, 30):
        yield from ([rng.gauss(0, size) for _ in range(rng.randint(2, 9))] for _ in range(5))


def log_sum_exp(answer):
    """One pass over the logits gives the log of the sum of their exponentials."""
    for row in _rows():
        compare(lambda values: answer(_Once(values)), _log_sum_exp, [(row,)])  # float32 is exact enough


def merge(answer):
    """The merged part has the largest logit of both, and the sum of both less that one."""

    def part(values: list[float]) -> tuple[float, float]:
        m = max(values, default=-math.inf)
        return m, math.fsum(math.exp(x - m) for x in values) if m > -math.inf else 0.0

    rng = random.Random(0)
    pairs = [([1.0, 2.0], [0.0]), ([0.0], [5.0, 6.0]), ([1e4], [-1e4, 0.0]), ([], [1.0, 1.0]), ([3.0], []), ([], [])]
    pairs += [([rng.gauss(0, 5) for _ in range(4)], [rng.gauss(0, 5) for _ in range(3)]) for _ in range(9)]
    for a, b in pairs:
        compare(answer, lambda *_, whole=a + b: part(whole), [(part(a), part(b))])


def bytes_moved(answer):
    """Three times the bytes of the logits in two functions, twice in one."""
    if not hasattr(answer, "__len__") or len(answer) != 2:
        raise Wrong("the answer is two numbers: the bytes of the two functions, and those of overwrite")
    logits = 4_096 * 65_536 * 2
    for name, given, factor in zip(("the two functions", "overwrite"), answer, (3, 2), strict=True):
        try:
            close(given, factor * logits, tolerance=0)
        except Wrong as error:
            raise Wrong(f"{name}: {error}") from None


def bad_row(answer):
    """The first logit as a shift is wrong on this row, and the library is right."""
    x = torch.as_tensor(answer, dtype=torch.float32)
    if x.dim() != 1 or not 1 <= len(x) <= 100 or not x.isfinite().all():
        raise Wrong("the row must be a list of 1 to 100 finite numbers")
    truth = x.double().logsumexp(0).item()
    by_first = (x[0] + (x - x[0]).exp().sum().log()).item()
    _, by_library, _ = shipped(x[None].clone(), torch.tensor([0]), 0.0, 1.0)
    tolerance = 1e-4 * max(1.0, abs(truth))
    if abs(by_library.item() - truth) > tolerance:
        raise Wrong(f"the library's kernel gives {by_library.item()}, not {truth}: please report this row")
    if abs(by_first - truth) <= tolerance:
        raise Wrong(f"the first logit as a shift gives {by_first:.6g} for this row, which is right")
