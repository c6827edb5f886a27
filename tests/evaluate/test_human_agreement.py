"""Alpha: published values, a hand calculation, what changes it and what must not. Win rates: the paper's counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.evaluate.agreement import (
    alpha_interval,
    krippendorff_alpha,
    majority,
    win_rate,
    win_rate_interval,
)


def table(*rows: str) -> list[list[int | None]]:
    return [[None if value == "." else int(value) for value in row.split()] for row in rows]


KRIPPENDORFF_2011 = table(
    "1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."
)
WIKIPEDIA = table(". . . . . 3 4 1 2 1 1 3 3 . 3", "1 . 2 1 3 3 4 3 . . . . . . .", ". . 2 1 3 4 4 . 2 1 1 3 3 . 4")
BY_HAND = list(zip(*[[0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 1, 2]], strict=True))  # units aaa, aba, bbb, abt


@pytest.mark.parametrize(
    ("ratings", "nominal", "ordinal", "interval"),
    [
        (KRIPPENDORFF_2011, 0.743421052631579, 0.8153875037548814, 0.8491071428571428),
        (WIKIPEDIA, 0.691358024691358, 0.8067214199413153, 0.8108448928121059),
        (BY_HAND, 1 - (5 / 12) * (132 / 82), 0.31746031746031744, 0.2542372881355932),
    ],
)
def test_alpha_of_published_tables(ratings, nominal, ordinal, interval):
    assert krippendorff_alpha(ratings) == pytest.approx(nominal, abs=1e-12)
    assert krippendorff_alpha(ratings, "ordinal") == pytest.approx(ordinal, abs=1e-12)
    assert krippendorff_alpha(ratings, "interval") == pytest.approx(interval, abs=1e-12)


votes = st.lists(st.lists(st.sampled_from([1, 2, 3, None]), min_size=3, max_size=3), min_size=3, max_size=12).map(
    lambda units: [[1, 1, 2], [2, 3, 2], *units]  # two units that make alpha defined
)
levels = st.sampled_from(["nominal", "ordinal", "interval"])


@given(votes, levels, st.randoms(use_true_random=False))
def test_the_order_of_people_and_units_does_not_matter(units, level, random):
    before = krippendorff_alpha(list(zip(*units, strict=True)), level)
    random.shuffle(units)
    people = list(zip(*units, strict=True))
    random.shuffle(people)
    assert krippendorff_alpha(people, level) == pytest.approx(before, abs=1e-12)


@given(votes, levels)
def test_a_unit_with_one_value_says_nothing(units, level):
    with_lone_values = [*units, [None, 2, None], [None, None, None]]
    alphas = [krippendorff_alpha(list(zip(*some, strict=True)), level) for some in (units, with_lone_values)]
    assert alphas[0] == pytest.approx(alphas[1], abs=1e-12)


@given(votes)
def test_names_of_nominal_values_do_not_matter(units):
    renamed = [[{1: "no", 2: "yes", 3: "a", None: None}[value] for value in unit] for unit in units]
    alphas = [krippendorff_alpha(list(zip(*some, strict=True))) for some in (units, renamed)]
    assert alphas[0] == pytest.approx(alphas[1], abs=1e-12)


def test_agreement_is_1_and_undefined_alphas_are_refused():
    assert krippendorff_alpha([[1, 2, 3], [1, 2, 3]], "interval") == 1
    with pytest.raises(ValueError, match="all values are the same"):
        krippendorff_alpha([[1, 1], [1, 1]])
    with pytest.raises(ValueError, match="no unit has two values"):
        krippendorff_alpha([[1, None], [None, 2]])
    with pytest.raises(ValueError, match="nominal, ordinal or interval"):
        krippendorff_alpha([[1, 2], [1, 1]], "ratio")


def test_the_interval_holds_alpha_and_counts_what_it_drew_again():
    low, high, redrawn = alpha_interval(KRIPPENDORFF_2011)
    assert low < krippendorff_alpha(KRIPPENDORFF_2011) < high <= 1
    assert redrawn == 0
    assert alpha_interval(KRIPPENDORFF_2011) == (low, high, redrawn)  # seeded
    few = [[1, 1, 2], [1, 1, 1]]  # a third of its three units in every resample decides
    assert alpha_interval(few, n_resamples=100)[2] > 10
    more = [row * 20 for row in KRIPPENDORFF_2011]
    assert alpha_interval(more)[1] - alpha_interval(more)[0] < (high - low) / 3


@pytest.mark.parametrize(
    ("cast", "result"),
    [("aab", "a"), ("aba", "a"), ("bbb", "b"), ("abt", "tie"), ("att", "t"), ("ab", "tie"), ("a", "a")],
)
def test_a_majority_is_more_than_half(cast, result):
    assert majority(cast) == result


def test_no_majority_may_be_its_own_answer():
    assert majority(["yes", "no", "partly"], otherwise="no majority") == "no majority"


@pytest.mark.parametrize(
    ("counts", "rate", "error", "low", "high"),
    [
        ((435, 362, 251), 58.779, 1.220, 56.58, 61.07),
        ((375, 331, 342), 51.574, 1.277, 49.28, 54.01),
        ((561, 327, 160), 69.132, 1.137, 66.89, 71.33),
        ((482, 329, 237), 61.689, 1.227, 59.54, 64.03),
    ],
)
def test_win_rates_of_the_paper(counts, rate, error, low, high):
    assert [100 * x for x in win_rate(*counts)] == pytest.approx([rate, error], abs=6e-4)
    assert [100 * x for x in win_rate_interval(*counts)] == pytest.approx([low, high], abs=6e-3)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 500))
def test_both_sides_of_a_comparison_add_up_to_1(wins, ties, losses):
    (ours, error), (theirs, same_error) = win_rate(wins, ties, losses), win_rate(losses, ties, wins)
    assert ours + theirs == pytest.approx(1) and error == pytest.approx(same_error, abs=1e-9)


@pytest.mark.parametrize(
    ("measure", "arguments"),
    [
        (majority, ([],)), (win_rate, (0, 0, 0)), (win_rate, (3, -1, 2)), (win_rate_interval, (0, 0, 0)),
        (krippendorff_alpha, ([],)), (krippendorff_alpha, ([[], []],)), (krippendorff_alpha, ([[None], [None]],)),
    ],
)  # fmt: skip
def test_no_votes_are_an_error_in_words(measure, arguments):
    with pytest.raises(ValueError, match=r"nobody has voted|have no win rate|alpha is undefined"):
        measure(*arguments)
