r"""Answers of word problems: every row of the golden tables, and what holds for any text."""

from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanochameleon.evaluate.text import answers

# ---------------------------------------------------------------------------------------------------------------------
# GSM8K

GSM8K = [  # text, the strict rule, the last number
    ("2+3=5\n#### 5", "5", "5"),
    ("#### 1,000", "1000", "1000"),
    ("#### $18", None, "18"),
    ("#### 18.", "18", "18"),
    ("#### 18.00", "18.00", "18.00"),
    ("The answer is 18.", None, "18"),
    ("The answer is 18", None, "18"),
    ("The answer is $18.", None, "18"),
    ("The answer is 12. Q: next 99", None, "99"),
]


@pytest.mark.parametrize("text, strict, flexible", GSM8K)
def test_published_readings_of_gsm8k(text, strict, flexible):
    assert (answers.strict(text), answers.last_number(text)) == (strict, flexible)


@pytest.mark.parametrize(
    "text, number",
    [
        *[(text, flexible if flexible != "99" else "12") for text, *_, flexible in GSM8K],
        ("#### 3\n\nQuestion: How many?\nAnswer: #### 4", "3"),
        ("so 4.\n#### 5 pens, and 6 are left", "5"),
        ("The answer is 7. No, the answer is 8, of 9.", "8"),
        ("THE ANSWER IS: 70%", "70"),
        ("#### none of these 12", "12"),  # the first number after the mark
        ("He has 4. The answer is four.", "4"),  # no number after the mark: the last one
        ("#### -$1,234.50.", "-1234.50"),
        ("That is $-3", "-3"),
        ("It is 10-3", "3"),  # a subtraction
        ("It is (10)-3", "3"),
        ("It is -.5", "-0.5"),
        ("1, 2", "2"),
        ("FAQ: 12", "12"),
        ("١٢", None),
        ("no number", None),
        ("", None),
    ],
)
def test_our_own_reading_of_gsm8k(text, number):
    assert answers.number(text) == (None if number is None else Decimal(number))


def test_numbers_are_equal_by_value_without_rounding():
    assert answers.number("#### 18.00") == answers.number("18") == answers.number("The answer is 018.")
    assert answers.number("1" * 50) != answers.number("1" * 49 + "2")


# ---------------------------------------------------------------------------------------------------------------------
# MATH


@pytest.mark.parametrize(
    "group",
    [
        [r"\frac12", r"\frac{1}{2}", "1/2", "0.5", ".5", r"\dfrac12", r"\tfrac{1}{2}"],
        [r"\dfrac{a}{b}", r"\tfrac{a}{b}", r"\frac{a}{b}"],
        [r"\frac1{72}", r"\frac{1}{72}", "1/72"],
        [r"\sqrt2", r"\sqrt{2}"],
        ["x=5", "5", "x = 5", "5 ", r"5\text{ cm}", r"\$5", "5\n"],
        [r"10\%", "10"],
        [r"90^\circ", "90", r"90^{\circ}"],
        [r"\left(1,2\right)", "(1, 2)"],
        [r"3\!\cdot\!4", r"3\cdot4"],
        ["{.3}", "{0.3}"],
        [r"{90^\circ}", "{90}"],
        [r"1\\2", r"1\2"],
    ],
)
def test_equal_spellings_of_math(group):
    assert all(answers.same_spelling(a, b) for a in group for b in group)


@pytest.mark.parametrize(
    "a, b",
    [
        ("0.50", "1/2"), ("xyz=5", "5"), (r"5\text{cm}", "5"), ("1,000", "1000"), (r"\frac{2}{4}", "1/2"), ("2", "2.0"),
        (r"\text{A}", "A"), ("-3/4", r"-\frac{3}{4}"), ("a/b", r"\frac{a}{b}"), (r"\frac{72}1", r"\frac{72}{1}"),
        ("10", "100"), ("x=y=5", "5"),
    ],
)  # fmt: skip
def test_unequal_spellings_of_math(a, b):
    assert not answers.same_spelling(a, b)


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"So \boxed{1}, no: \boxed{2}.", "2"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} and more {}", r"\{1, 2\}"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{}", ""),
        (r"\fbox{5}", None),
        (r"\boxed{5", None),
        (r"\boxed{1} \boxed{\frac{1}{2}", None),
        (r"\boxedeq{5}", None),
        (r"\boxed", None),
        ("5", None),
    ],
)
def test_the_last_box_is_the_answer(text, answer):
    assert answers.boxed(text) == answer


@pytest.mark.parametrize(
    "answer, spelling",
    [
        (r"$\frac12$", r"\frac{1}{2}"),
        ("5 cm", "5"),
        ("the answer is $x=3$", "3"),
        ("1,000", "1000"),
        ("0,1", "0,1"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\$3.50", "3.50"),
        (r"\boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("12 square feet", "12"),
        (r"7 \text{ hours}", "7"),
        ("m", "m"),  # a variable, no unit
        (r"\text{hours}", "hours"),  # no unit without a number
        ("5 meals", "5meals"),
    ],
)
def test_minervas_spelling(answer, spelling):
    assert answers.minerva_spelling(answer) == spelling


@pytest.mark.parametrize(
    "text, answer",
    [
        ("So 3.\nFinal Answer: The final answer is $3$. I hope it is correct.", "$3$"),
        ("Final Answer: The final answer is 3.5. I hope it is correct.\n\nProblem:", "3.5"),
        ("The final answer is $3$. I hope it is correct.", None),
        ("Final Answer: The final answer is $3$.", None),
        (r"\boxed{3}", None),
    ],
)
def test_minervas_answer_is_read_from_its_sentence_only(text, answer):
    assert answers.final_answer(text) == answer


# ---------------------------------------------------------------------------------------------------------------------
# Majority


@pytest.mark.parametrize(
    "votes, winner",
    [
        ([1, 2, 2], 2), ([2, 1], 2), ([1, 2, 2, 1], 1), ([None, None, None, 7], 7), ([None], None), ([], None),
        ([Decimal("2"), Decimal("3"), Decimal("3.00")], Decimal(3)),
    ],
)  # fmt: skip
def test_majority(votes, winner):
    """The most frequent one, the first seen of several; a sample without an answer does not vote."""
    assert answers.majority(votes) == winner


@given(st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=9))
def test_a_majority_has_the_most_votes(votes):
    winner, cast = answers.majority(votes), [vote for vote in votes if vote is not None]
    if cast:
        most = max(map(cast.count, cast))
        assert winner == next(vote for vote in cast if cast.count(vote) == most)
    else:
        assert winner is None


# ---------------------------------------------------------------------------------------------------------------------
# Any text

SENTENCE = "Final Answer: The final answer is ", ". I hope it is correct."
pieces = st.sampled_from(
    ["####", "#### ", "The answer is ", "-", "$", "1", "2,345", ".", ",", "%", r"\boxed", "{", "}", r"\frac",
     r"\sqrt", "=", "/", " ", "\n", r"\text{ ", r"\$", "x", "Q:", *SENTENCE]
)  # fmt: skip
texts = st.text() | st.lists(pieces | st.text(max_size=2), max_size=12).map("".join)
READINGS = [
    answers.strict, answers.last_number, answers.number, answers.boxed, answers.final_answer,
    answers.spelling, answers.minerva_spelling,
]  # fmt: skip


@given(texts)
@example("#### .")
@example("#### ,")
@example("\\frac")
@example("\\frac1")
@example("\\sqrt")
@example("$$")
def test_no_text_is_too_much_and_equality_is_reflexive_and_symmetric(text):
    for reading in READINGS:
        assert reading(text) == reading(text)
    other = text[::-1]
    assert answers.same_spelling(text, text)
    assert answers.same_spelling(text, other) == answers.same_spelling(other, text)


@given(texts)
def test_the_braces_of_a_box_balance(text):
    answer = answers.boxed(text)
    if answer is not None and "\\boxed{" in text and text.rindex("\\boxed{") == text.rindex("\\boxed"):
        depths = [answer[:i].count("{") - answer[:i].count("}") for i in range(len(answer) + 1)]
        assert min(depths) == 0 == depths[-1]
        assert f"\\boxed{{{answer}}}" in text


@given(
    st.from_regex(r"-?[1-9][0-9]{0,8}(\.[0-9]{1,3})?", fullmatch=True), st.sampled_from(["#### ", "The answer is $"])
)
def test_a_number_is_read_as_it_was_written(written, mark):
    grouped = f"{Decimal(written):,}"
    assert answers.number(f"There are 3.\n{mark}{grouped}.\n\nQuestion: 4") == Decimal(written)


def test_long_texts_take_no_long_time():
    for piece in ("$", "=", "1", " ", "1,", "-", "{", r"\boxed{", r"\text{", r"\frac", "answer is ", SENTENCE[0]):
        for reading in READINGS:
            reading(piece * 5_000)
