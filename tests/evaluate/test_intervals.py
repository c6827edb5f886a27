"""Intervals: the published values, what defines them, and how often they cover the truth."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.evaluate.intervals import at_least, clopper_pearson, wilson

COUNTS = st.integers(1, 3_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (78, 20_000, 0.3083972, 0.4865021),
        (19, 20_000, 0.0572056, 0.1483147),
        (7, 445, 0.6347196, 3.2140732),
        (20, 445, 2.7665697, 6.8560752),
        (418, 445, 91.29473, 95.96383),
        (0, 445, 0, 0.8255353),
        (0, 300, 0, 1.2220975),
        (0, 100, 0, 3.6216693),
        (1, 100, 0.0253146, 5.4459385),
        (5, 5, 47.817625, 100),
    ],
)
def test_clopper_pearson_in_percent(k, n, low, high):
    assert clopper_pearson(k, n) == pytest.approx((low / 100, high / 100), abs=6e-8)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(78, 20_000, 0.31263, 0.48642), (19, 20_000, 0.06083, 0.14834), (7, 445, 0.76402, 3.21098)],
)
def test_wilson_in_percent(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low / 100, high / 100), abs=6e-8)


def test_nothing_in_n_trials_is_the_rule_of_three():
    one_sided = clopper_pearson(0, 445, level=0.90)[1]
    assert one_sided == pytest.approx(1 - 0.05 ** (1 / 445), abs=1e-12)  # nothing seen is then as rare as 5%
    assert one_sided == pytest.approx(3 / 445, rel=0.01)


@given(COUNTS)
def test_an_interval_holds_its_share_and_mirrors(counts):
    k, n = counts
    for interval in (clopper_pearson, wilson):
        low, high = interval(k, n)
        assert 0 <= low <= k / n <= high <= 1
        assert interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(COUNTS)
def test_each_bound_leaves_a_tail_of_a_fortieth(counts):
    k, n = counts
    low, high = clopper_pearson(k, n)
    if k > 0:
        assert at_least(k, n, low) == pytest.approx(0.025, rel=1e-9)
    if k < n:
        assert 1 - at_least(k + 1, n, high) == pytest.approx(0.025, rel=1e-9)


@given(st.floats(0.001, 0.999))
def test_clopper_pearson_covers_the_truth_as_often_as_it_says(p):
    n = 40
    chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    covered = sum(c for k, c in enumerate(chance) if clopper_pearson(k, n)[0] <= p <= clopper_pearson(k, n)[1])
    assert covered >= 0.95 - 1e-9


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(k, n):
    for interval in (clopper_pearson, wilson):
        with pytest.raises(ValueError, match="give 0 <= k <= n"):
            interval(k, n)
