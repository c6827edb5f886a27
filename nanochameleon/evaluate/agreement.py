"""What votes of several people say: how far they agree (Krippendorff's alpha), who wins, and how sure that is.

alpha = 1 - (observed disagreement) / (disagreement expected by chance). Let o(c, k) count the ordered pairs of values
c, k that two people gave to the same unit, a unit of m values adding 1 / (m - 1) for each of its pairs. With
n(c) = sum_k o(c, k) and n = sum_c n(c):

    alpha = 1 - (n - 1) sum_ck o(c, k) d(c, k) / sum_ck n(c) n(k) d(c, k)

    nominal   d(c, k) = 1 where c differs from k
    ordinal   d(c, k) = (sum of n(g) for g from c to k, minus (n(c) + n(k)) / 2)^2       values in sorted order
    interval  d(c, k) = (c - k)^2

1 is perfect agreement and 0 is what guessing gives. Units with fewer than two values say nothing.
Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability".

The win rate of a model is (wins + ties / 2) / n, as in Chameleon's section 4.2 (arXiv 2405.09818).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

Level = Literal["nominal", "ordinal", "interval"]
Distance = Callable[[np.ndarray], np.ndarray]  # n(c), how often each value is paired -> d(c, k)
TIE = "tie"


def krippendorff_alpha(ratings: Sequence[Sequence[Any]], level: Level = "nominal") -> float:
    """Return alpha of ratings[person][unit], where None is a missing value.

    Raises ValueError where alpha is undefined: if no unit has two values, or if all values are the same.
    """
    values, counts = count_values(ratings)
    return alpha_of_counts(counts, distances(values, level))


def alpha_interval(
    ratings: Sequence[Sequence[Any]], level: Level = "nominal", n_resamples: int = 1_000, seed: int = 0
) -> tuple[float, float, int]:
    """Return the 95% interval of alpha, and how many resamples were drawn again because alpha was undefined.

    Units are resampled, not single votes: people who vote on the same unit are not independent.
    """
    values, counts = count_values(ratings)
    alpha_of_counts(counts, distances(values, level))  # raises where no resample could be defined
    draws, alphas, redrawn = np.random.default_rng(seed), [], 0
    while len(alphas) < n_resamples:
        resample = counts[draws.integers(len(counts), size=len(counts))]
        try:
            alphas.append(alpha_of_counts(resample, distances(values, level)))
        except ValueError:
            redrawn += 1
    low, high = np.percentile(alphas, [2.5, 97.5])
    return float(low), float(high), redrawn


def count_values(ratings: Sequence[Sequence[Any]]) -> tuple[list[Any], np.ndarray]:
    """Return the values in order, and how often each unit has each of them (units, values)."""
    units = [[value for value in unit if value is not None] for unit in zip(*ratings, strict=True)]
    values = sorted({value for unit in units for value in unit})
    counts = [[unit.count(value) for value in values] for unit in units]
    return values, np.array(counts, dtype=float).reshape(len(units), len(values))


def distances(values: list[Any], level: Level) -> Distance:
    """Return the d(c, k) of a level. The ordinal one depends on n(c)."""
    place = np.arange(len(values))
    if level == "nominal":
        return lambda n: (place[:, None] != place).astype(float)
    if level == "ordinal":
        # with S(c) the sum of n up to c, less half of n(c): the sum from c to k less both halves is |S(c) - S(k)|
        return lambda n: np.subtract.outer(np.cumsum(n) - n / 2, np.cumsum(n) - n / 2) ** 2
    if level == "interval":
        return lambda n: np.subtract.outer(np.array(values, dtype=float), np.array(values, dtype=float)) ** 2
    raise ValueError(f"the level is {level!r}: give nominal, ordinal or interval")


def alpha_of_counts(counts: np.ndarray, distance: Distance) -> float:
    """counts (units, values) -> alpha."""
    sizes = counts.sum(1)
    counts, sizes = counts[sizes >= 2], sizes[sizes >= 2]
    if len(counts) == 0:
        raise ValueError("alpha is undefined: no unit has two values")
    weighted = counts / (sizes - 1)[:, None]
    pairs = weighted.T @ counts - np.diag(weighted.sum(0))  # o(c, k): a value does not pair with itself
    n = pairs.sum(0)
    d = distance(n)
    expected = float((np.outer(n, n) * d).sum())
    if expected == 0:
        raise ValueError("alpha is undefined: all values are the same")
    return 1 - (n.sum() - 1) * float((pairs * d).sum()) / expected


# ---------------------------------------------------------------------------------------------------------------------
# Votes and win rates


def majority(votes: Sequence[Any], otherwise: Any = TIE) -> Any:
    """Return what more than half of the votes say. Without such an agreement, return `otherwise`: in pairs, a tie.

    Raises ValueError where nobody has voted.
    """
    if not len(votes):
        raise ValueError("nobody has voted: a majority needs a vote")
    answer, count = Counter(votes).most_common(1)[0]
    return answer if 2 * count > len(votes) else otherwise


def count_votes(wins: int, ties: int, losses: int) -> int:
    if min(wins, ties, losses) < 0 or not wins + ties + losses:
        raise ValueError(f"{wins} wins, {ties} ties and {losses} losses have no win rate: count at least one vote")
    return wins + ties + losses


def win_rate(wins: int, ties: int, losses: int) -> tuple[float, float]:
    """Return the win rate and its standard error. A tie is half a win. Raises ValueError without any vote."""
    n = count_votes(wins, ties, losses)
    rate = (wins + ties / 2) / n
    return rate, math.sqrt(((wins + ties / 4) / n - rate**2) / n)


def win_rate_interval(
    wins: int, ties: int, losses: int, n_resamples: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95% interval of the win rate by resampling prompts, each of which is a win, a tie or a loss."""
    n = count_votes(wins, ties, losses)
    resamples = np.random.default_rng(seed).multinomial(n, np.array([wins, ties, losses]) / n, size=n_resamples)
    low, high = np.percentile(resamples @ [1, 0.5, 0] / n, [2.5, 97.5])
    return float(low), float(high)
