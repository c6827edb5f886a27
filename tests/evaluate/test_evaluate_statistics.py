"""Intervals of means, default figures, and comparisons of two runs over the same items."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nanochameleon.evaluate.intervals import clopper_pearson, wilson
from nanochameleon.evaluate.statistics import bootstrap, default_figures, mcnemar, mean_figure, paired_interval
from nanochameleon.evaluate.task import Line

finite = st.floats(-1e6, 1e6)


def line(name: int | str, group: str = "", **metrics: float) -> Line:
    return Line(str(name), group, {}, {}, None, metrics)


# ---------------------------------------------------------------------------------------------------------------------
# One figure


def test_shares_take_wilson_and_rare_events_the_exact_interval():
    common, rare, most = (mean_figure("acc", [1] * k + [0] * (40 - k)) for k in (20, 9, 31))
    assert (common.value, common.n, common.unit, common.how) == (0.5, 40, "items", "Wilson")
    assert (common.low, common.high) == wilson(20, 40)
    assert (rare.low, rare.high) == clopper_pearson(9, 40) and rare.how == "Clopper-Pearson"
    assert (most.low, most.high) == clopper_pearson(31, 40)
    assert mean_figure("acc", [True, False]).value == 0.5


def test_other_means_take_a_bootstrap_that_names_its_unit():
    values = np.random.default_rng(3).normal(5, 2, 400).tolist()
    figure = mean_figure("CIDEr-D", values, "images", scale=1.0, note="5 captions an image")
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert figure.how == "bootstrap over images" and (figure.scale, figure.note) == (1.0, "5 captions an image")
    assert figure.low == pytest.approx(figure.value - half, abs=half / 5)
    assert figure.high == pytest.approx(figure.value + half, abs=half / 5)
    assert figure == mean_figure("CIDEr-D", values, "images", scale=1.0, note="5 captions an image")
    assert mean_figure("CIDEr-D", values, "images", seed=1).low != figure.low


@given(st.lists(finite, min_size=1, max_size=30))
def test_a_figure_is_the_mean_and_is_inside_its_interval_of_possible_values(values):
    figure = mean_figure("x", values)
    assert figure.n == len(values) and figure.value == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    if figure.low is not None:
        low, high = (0.0, 1.0) if set(values) <= {0.0, 1.0} else (min(values), max(values))
        slack = 1e-9 * max(map(abs, (low, high)))
        assert low - slack <= figure.low <= figure.high <= high + slack


def test_one_value_that_is_no_share_has_no_interval():
    figure = mean_figure("x", [0.3])
    assert (figure.low, figure.high, figure.how) == (None, None, "")


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_a_mean_of_nothing_or_of_nan_is_refused(values):
    with pytest.raises(ValueError, match="at least one, all finite"):
        mean_figure("x", values)


def test_the_bootstrap_takes_any_statistic_of_units():
    """Units come whole: two values of one unit are never apart."""
    values = np.arange(50.0)
    low, high = bootstrap(50, lambda indices: float(np.median(values[indices])))
    assert 10 < low < 24.5 < high < 40
    assert bootstrap(50, lambda indices: float(len(indices))) == (50, 50)


# ---------------------------------------------------------------------------------------------------------------------
# The figures of a task


def test_default_figures_are_the_mean_of_each_metric_in_all_and_by_group():
    lines = [line(0, "art", acc=1, f1=0.5), line(1, "law", acc=0, f1=0.7), line(2, "art", acc=1), line(3, "law", acc=1)]
    figures = {figure.name: (figure.value, figure.n) for figure in default_figures(lines)}
    assert figures == {
        "acc": (0.75, 4), "acc, art": (1, 2), "acc, law": (0.5, 2),
        "f1": (pytest.approx(0.6), 2), "f1, art": (0.5, 1), "f1, law": (0.7, 1),
    }  # fmt: skip


@pytest.mark.parametrize(("n_groups", "n_figures"), [(0, 1), (1, 1), (2, 3), (60, 61), (61, 1)])
def test_groups_are_shown_where_there_are_2_to_60(n_groups, n_figures):
    lines = [line(i, f"group {i % n_groups}" if n_groups else "", acc=1) for i in range(61)]
    assert len(default_figures(lines)) == n_figures


def test_no_lines_have_no_figures():
    assert default_figures([]) == [] and default_figures([line(0)]) == []


def test_chance_is_the_mean_over_the_lines_of_each_figure():
    lines = [
        Line(str(i), group, {"choices": list(range(n))}, {}, 0, {"acc": 1.0})
        for i, (group, n) in enumerate([("two", 2), ("two", 2), ("four", 4), ("five", 5)])
    ]
    figures = default_figures(lines, chance=lambda line: 1 / len(line.content["choices"]))
    chances = {figure.name: figure.chance for figure in figures}
    assert chances["acc, two"] == 0.5 and chances["acc, five"] == 0.2
    assert chances["acc"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.2) / 4)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_a_binomial_test_of_the_items_that_one_run_alone_got_right(b, c):
    peer = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(peer, rel=1e-9)


def test_mcnemar_of_known_counts():
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(3, 3) == 1
    with pytest.raises(ValueError, match="give counts"):
        mcnemar(-1, 2)


def test_a_paired_interval_is_narrower_than_what_hard_items_alone_would_give():
    draws = np.random.default_rng(0)
    hardness = draws.normal(0, 1, 300)
    a = hardness + draws.normal(0, 0.1, 300)
    b = hardness + 0.05 + draws.normal(0, 0.1, 300)
    low, high = paired_interval(a.tolist(), b.tolist())
    assert 0.02 < low < 0.05 < high < 0.08
    with pytest.raises(ValueError, match="argument 2"):
        paired_interval([1, 2], [1])
