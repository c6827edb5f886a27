"""Intervals for a share: what k events in n trials say about their true rate p.

Clopper-Pearson (Biometrika 1934) asks the binomial distribution itself. The interval holds every p for which neither
"k or more" nor "k or fewer" is rarer than (1 - level) / 2:

    low:  P(X >= k; n, p) = (1 - level) / 2        0 for k = 0
    high: P(X <= k; n, p) = (1 - level) / 2        1 for k = n

It never covers less than it promises, so rare events take it. Wilson's score interval (JASA 1927) is narrower and right
on average, so ordinary shares take it:

    (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)        p = k / n, z = 1.96 for 95%
"""

import math
from collections.abc import Callable, Iterable
from statistics import NormalDist

HALVINGS = 60  # of [0, 1]: more than a float's 53 bits


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of k events in n trials."""
    check_counts(k, n)
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else bisect(lambda p: at_least(k, n, p) > tail)
    high = 1.0 if k == n else bisect(lambda p: at_least(k + 1, n, p) > 1 - tail)
    return low, high


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of k events in n trials."""
    check_counts(k, n)
    z, p = NormalDist().inv_cdf((1 + level) / 2), k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # the bounds at 0 and 1 are exact: rounding must not lift them
    low = 0.0 if k == 0 else (centre - half) / (1 + z * z / n)
    high = 1.0 if k == n else (centre + half) / (1 + z * z / n)
    return low, high


def at_least(k: int, n: int, p: float) -> float:
    """P(X >= k) for n trials of probability 0 < p < 1. Sums the shorter tail, so small results keep their digits."""
    return binomial(range(k, n + 1), n, p) if k > n * p else 1 - binomial(range(k), n, p)


def binomial(counts: Iterable[int], n: int, p: float) -> float:
    """P(X in counts). Each term is a logarithm first: 20,000 choose 78 is larger than any float."""
    log_p, log_q, log_n = math.log(p), math.log1p(-p), math.lgamma(n + 1)
    logs = (log_n - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q for i in counts)
    return math.fsum(map(math.exp, logs))


def bisect(is_above: Callable[[float], bool]) -> float:
    """The p in [0, 1] from which on is_above(p) is true."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return (low + high) / 2


def check_counts(k: int, n: int) -> None:
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"{k} events in {n} trials: give 0 <= k <= n and at least one trial")
