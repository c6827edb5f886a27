"""checks.py says right, not done yet, or the first input that differs; it never raises."""

import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checks
from checks import NOT_DONE, RIGHT, Wrong, check, close, compare, difference, same, verdict


@pytest.fixture(autouse=True)
def lesson(monkeypatch):
    """A lesson of three exercises."""
    specs = types.ModuleType("specs.trial")
    specs.double = lambda answer: compare(answer, lambda x: 2 * x, [(0,), (2,), (5,), (7,)])
    specs.number = lambda answer: close(answer, 6.0, 0.5)
    specs.total = lambda answer: compare(answer, sum, [([1, 2],)])
    monkeypatch.setitem(sys.modules, "specs.trial", specs)


def test_the_first_input_that_differs_is_said_with_both_results():
    assert verdict("trial.double", lambda x: 2 * x) == RIGHT
    said = verdict("trial.double", lambda x: x + 2)  # right for 2 alone
    assert said == "for 0 the result is 0, and your answer gives 2"
    assert "for 5 the result is 10, and your answer gives 11" in verdict("trial.double", lambda x: 2 * x + (x == 5))


@pytest.mark.parametrize("answer", [..., (1, ...), [...], lambda x: ..., lambda x: (x, ...)])
def test_an_ellipsis_anywhere_is_a_blank(answer):
    assert verdict("trial.double", answer) == NOT_DONE


def test_numbers_say_the_side_but_not_the_value():
    assert verdict("trial.number", 6.4) == RIGHT and verdict("trial.number", torch.tensor(5.6)) == RIGHT
    assert verdict("trial.number", 7) == "7 is too large" and verdict("trial.number", -6) == "-6 is too small"
    for answer in ("6", None, True, float("nan"), [6]):
        assert verdict("trial.number", answer) not in (RIGHT, NOT_DONE)


def test_a_check_prints_and_never_raises(capsys):
    check("trial.double", lambda: 1)
    check("trial.double", "text")
    check("trial.double", lambda x: {}["key"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("trial.double: your answer raised") for line in lines)


def test_the_line_that_raised_is_said():
    def broken(x):
        y = x + 1
        return y / 0

    assert verdict("trial.double", broken) == "your answer raised ZeroDivisionError at `return y / 0`: division by zero"
    assert verdict("trial.double", 7) == "your answer raised TypeError: 'int' object is not callable"


def test_an_answer_cannot_change_the_input_that_the_spec_reads():
    def spoil(values: list) -> int:
        total = sum(values)
        values.clear()
        return total

    assert verdict("trial.total", spoil) == RIGHT
    with pytest.raises(Wrong, match=r"for \[1, 2\]"):
        compare(lambda x: x.clear(), sum, [([1, 2],)])


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (1.0, 1.0 + 1e-7, True), (1.0, 1.001, False), (1, True, True), (b"a", b"a", True), (b"a", "a", False),
        ([1, 2], (1, 2), True), ([1, 2], [1, 2, 3], False),
        ([1, 2], np.array([1, 2]), True), ([1, 2], torch.tensor([1, 3]), False),
        ([[1], [2]], np.array([[1], [2]]), True), ([1], np.array(1), False), ([2.3], [np.float64(2.3)], True),
        (torch.ones(3), np.ones(3), True), (torch.ones(3), torch.ones(3, 1), False), (torch.ones(2), None, False),
        (torch.eye(2), list(torch.eye(2)), True), (torch.eye(2), [torch.ones(2), None], False),
        (torch.eye(2), [], False), (torch.ones(2), [torch.ones(2), torch.ones(3)], False),
        (float("nan"), float("nan"), True), (float("inf"), float("-inf"), False), (None, None, True),
        (torch.tensor([True]), torch.tensor([1.0]), True), (np.array([2]), torch.tensor([3]), False),
    ],
)  # fmt: skip
def test_what_counts_as_the_same(a, b, equal):
    assert same(a, b, 1e-5) is equal


@given(st.lists(st.floats(-1e3, 1e3)), st.integers(0, 9), st.sampled_from([0.1, -3.0]))
def test_one_changed_number_is_seen(values, place, change):
    changed = [value + change * (i == place) for i, value in enumerate(values)]
    assert same(values, values, 1e-5) and same(values, changed, 1e-5) is (place >= len(values))


def test_of_long_arrays_the_first_place_that_differs_is_said():
    expected = torch.arange(60.0).view(3, 20)
    given = expected.clone()
    given[1, 4:] = 7
    assert difference(expected, given, 1e-5) == "the result at [1, 4] is 24, and your answer gives 7"
    assert difference(expected, given.tolist(), 1e-5) == difference(expected, given.numpy(), 1e-5)
    assert difference(expected, given.T, 1e-5) == "the result has the shape (3, 20), and your answer's is (20, 3)"
    said = "the result is float32 tensor of shape (3, 20) from 0 to 59, and your answer gives"
    assert difference(expected, None, 1e-5) == f"{said} None" and difference(expected, "a", 1e-5) == f"{said} 'a'"
    assert difference(torch.ones(2), torch.ones(2, 1), 1e-5).startswith("the result is tensor([1., 1.]), and")
    assert difference(torch.eye(20).bool(), torch.zeros(20, 20).bool(), 0).startswith("the result at [0, 0] is 1, and")
    assert difference(torch.full((60,), float("nan")), torch.zeros(60), 0).startswith("the result at [0] is nan, and")


def test_long_values_are_cut():
    assert checks.shown(np.zeros((32, 32, 3), np.uint8)) == "uint8 array of shape (32, 32, 3)"
    assert len(checks.shown(torch.zeros(10, 100, 100))) < 300 and len(checks.shown("x" * 1_000)) < 300
