"""VQA accuracy: what the official evaluation says of 37 cases, each with its ten references."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.evaluate.vqa import CONTRACTIONS, accuracy

CASES = [  # references with how many people gave them, answer, accuracy in percent
    ({"red": 3, "blue": 7}, "red", 90),
    ({"red": 1, "blue": 9}, "red", 30),
    ({"red": 2, "blue": 8}, "red", 60),
    ({"red": 4, "blue": 6}, "red", 100),
    ({"red": 4, "blue": 6}, "green", 0),
    ({"yes": 10}, "yes", 100),
    ({"yes": 10}, "Yes", 0),
    ({"yes": 10}, "yes.", 0),
    ({"yes": 9, "no": 1}, "Yes.", 100),
    ({"2": 5, "3": 5}, "two", 100),
    ({"two": 5, "2": 5}, "2", 100),
    ({"0": 6, "1": 4}, "none", 100),
    ({"a dog": 4, "cat": 6}, "the dog", 100),
    ({"don't": 4, "no": 6}, "dont", 100),
    ({"men's": 4, "women": 6}, "mens", 0),
    ({"t-shirt": 4, "shirt": 6}, "t shirt", 100),
    ({"t-shirt": 4, "shirt": 6}, "tshirt", 0),
    ({"1,000": 4, "many": 6}, "1000", 100),
    ({"2.5": 4, "3": 6}, "2.5", 100),
    ({".5": 4, "3": 6}, "0.5", 0),
    ({"st. louis": 4, "chicago": 6}, "st louis", 100),
    ({"black/white": 4, "black": 6}, "black white", 100),
    ({"black / white": 4, "black": 6}, "black white", 100),
    ({"red, white": 4, "red": 6}, "red white", 100),
    ({"red,white": 4, "red": 6}, "red white", 100),
    ({"10:30": 4, "noon": 6}, "10:30", 100),
    ({"10:30": 4, "noon": 6}, "1030", 0),
    ({"red ball": 4, "blue": 6}, "red\tball\n", 100),
    ({"red  ball": 4, "blue": 6}, "red ball", 100),
    ({"what?": 4, "blue": 6}, "what", 100),
    ({"50%": 4, "half": 6}, "50 %", 0),
    ({"11": 4, "12": 6}, "eleven", 0),
    ({"1,000 t-shirts": 4, "many": 6}, "1000 tshirts", 100),
    ({"a": 4, "b": 6}, "the", 100),  # both are empty without their articles
    ({"yes": 4, "no": 6}, "", 0),
    ({"u.s.": 4, "uk": 6}, "us", 100),
    ({"salt & pepper": 4, "salt": 6}, "salt and pepper", 0),
]


def people(counts: dict[str, int]) -> list[str]:
    return [answer for answer, n in counts.items() for _ in range(n)]


@pytest.mark.parametrize(("counts", "answer", "percent"), CASES)
def test_the_official_cases(counts, answer, percent):
    assert accuracy(answer, people(counts)) == pytest.approx(percent / 100, abs=1e-12)


def test_the_mean_of_the_official_cases():
    mean = sum(accuracy(answer, people(counts)) for counts, answer, _ in CASES) / len(CASES)
    assert len(CASES) == 37 and 100 * mean == pytest.approx(67.02702702702703, abs=1e-9)


@given(st.integers(0, 10))
def test_each_of_three_agreeing_people_sees_two_others(n):
    left_out = [min(1, (n - 1) / 3) if i < n else min(1, n / 3) for i in range(10)]
    assert accuracy("red", ["red"] * n + [f"blue{i}" for i in range(10 - n)]) == pytest.approx(sum(left_out) / 10)


answers = st.lists(st.sampled_from(["yes", "no", "Yes.", "a dog", "dogs", "2", "two"]), min_size=10, max_size=10)


@given(answers, st.text(), st.randoms(use_true_random=False))
def test_an_accuracy_is_a_share_and_the_order_of_people_does_not_matter(references, answer, random):
    before = accuracy(answer, references)
    random.shuffle(references)
    assert 0 <= before <= 1 and accuracy(answer, references) == pytest.approx(before)


def test_a_question_without_references_is_refused():
    with pytest.raises(ValueError, match="no references"):
        accuracy("red", [])


def test_a_contraction_lacks_one_apostrophe():
    assert CONTRACTIONS["dont"] == "don't" and CONTRACTIONS["couldn'tve"] == CONTRACTIONS["couldnt've"]
    assert "couldntve" not in CONTRACTIONS and CONTRACTIONS["ow's'at"] == "'ow's'at"
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
