"""How sure a figure is, and whether two runs differ.

    values of items -> mean_figure -> a Figure with its interval
    lines of a task -> default_figures -> the mean of each metric, and by group
    two runs over the same items -> mcnemar, paired_interval

A share (every value is 0 or 1) takes Wilson's interval. With fewer than 10 events on either side it takes
Clopper-Pearson's. All other means take the percentile bootstrap (Efron 1979): units are drawn again with replacement.

Two runs over the same items are compared item by item, since both find the same items hard: intervals of two separate
means overstate the noise. McNemar's exact test (Psychometrika 1947) looks at the b + c items that only one run got
right. If neither run were better, each of them would fall to either side like a coin.
"""

from collections.abc import Callable, Sequence
from math import fsum

import numpy as np

from nanochameleon.evaluate.intervals import at_least, clopper_pearson, wilson
from nanochameleon.evaluate.task import Figure, Line

RARE = 10  # events on either side, below which a share takes the exact interval
RESAMPLES = 1_000
MAX_GROUPS = 60  # MMLU has 57 subjects


def mean_figure(name: str, values: Sequence[float], unit: str = "items", seed: int = 0, **rest) -> Figure:
    """Return the mean of one value per unit, with its 95% interval. `rest` holds other fields of Figure.

    A single value that is no share has no interval. Raises ValueError for no value, or one that is not finite.
    """
    numbers = [float(value) for value in values]
    if not numbers or not np.isfinite(numbers).all():
        raise ValueError(f"{name} has {len(numbers)} values: give at least one, all finite")
    n = len(numbers)
    if set(numbers) <= {0.0, 1.0}:
        low, high, how = share_interval(round(fsum(numbers)), n)
    elif n > 1:
        low, high, how = *mean_interval(numbers, seed), f"bootstrap over {unit}"
    else:
        low, high, how = None, None, ""
    return Figure(name, fsum(numbers) / n, n, unit, low, high, how, **rest)


def share_interval(k: int, n: int) -> tuple[float, float, str]:
    """Return the 95% interval of k events in n trials, and its name."""
    if min(k, n - k) < RARE:
        return *clopper_pearson(k, n), "Clopper-Pearson"
    return *wilson(k, n), "Wilson"


def bootstrap(n: int, statistic: Callable[[np.ndarray], float], seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of a statistic of n units: statistic(indices) gets n of them, some twice, some never."""
    draws = np.random.default_rng(seed)
    low, high = np.percentile([statistic(draws.integers(n, size=n)) for _ in range(RESAMPLES)], [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap interval of a mean of one value per unit."""
    numbers = np.asarray(values, dtype=float)
    return bootstrap(len(numbers), lambda indices: float(numbers[indices].mean()), seed)


# ---------------------------------------------------------------------------------------------------------------------
# The figures of a task that has none of its own


def default_figures(lines: Sequence[Line], chance: Callable[[Line], float] | None = None) -> list[Figure]:
    """Return the mean of each metric, and of each by group where there are 2 to 60 groups.

    A line counts for the metrics that it has. chance: what guessing gets for a line, such as 1 / its choices.
    """
    groups = sorted({line.group for line in lines if line.group})
    parts = [(", " + group, [line for line in lines if line.group == group]) for group in groups]
    if not 2 <= len(groups) <= MAX_GROUPS:
        parts = []
    metrics = sorted({metric for line in lines for metric in line.metrics})
    return [
        metric_figure(metric, ending, having, chance)
        for metric in metrics
        for ending, part in [("", lines), *parts]
        if (having := [line for line in part if metric in line.metrics])
    ]


def metric_figure(metric: str, ending: str, lines: Sequence[Line], chance: Callable | None) -> Figure:
    guessed = None if chance is None else fsum(map(chance, lines)) / len(lines)
    return mean_figure(metric + ending, [line.metrics[metric] for line in lines], chance=guessed)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs over the same items


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p of McNemar's exact test. only_a: how many items a got right and b got wrong."""
    if min(only_a, only_b) < 0:
        raise ValueError(f"{only_a} and {only_b} items: give counts")
    n, most = only_a + only_b, max(only_a, only_b)
    return min(1.0, 2 * at_least(most, n, 0.5)) if n else 1.0


def paired_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95% bootstrap interval of mean(b) - mean(a), drawing items with both of their values."""
    return mean_interval([second - first for first, second in zip(a, b, strict=True)], seed)
