"""Lesson 8's exercises, solved: the online softmax, its merge, the bytes that move, and a row that overflows."""

import math
from collections.abc import Iterable

Part = tuple[float, float]  # the largest logit of some, and the sum of exp(logit - largest)


def log_sum_exp(logits: Iterable[float]) -> float:
    """The log of the sum of exp(x) in one pass."""
    largest, total = -math.inf, 0.0
    for x in logits:
        if x > largest:
            total *= math.exp(largest - x)  # the sum so far, less the new largest; exp(-infinity) is 0
            largest = x
        if largest > -math.inf:  # -infinity less -infinity would be NaN
            total += math.exp(x - largest)
    return largest + math.log(total) if total else -math.inf


def merge(a: Part, b: Part) -> Part:
    """Two parts of a row become one."""
    m = max(a[0], b[0])
    if m == -math.inf:  # both are empty
        return m, 0.0
    return m, sum(s * math.exp(largest - m) for largest, s in (a, b))


LOGITS = 4_096 * 65_536 * 2  # bytes
bytes_moved = 3 * LOGITS, 2 * LOGITS  # read, read and write; read and write

# exp(x - first) overflows float32 where x exceeds the first logit by 89. The library starts near the largest of the
# first register, and repeats a block whose largest is more than 20 above the shift.
bad_row = [0.0, 100.0]
