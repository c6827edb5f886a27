"""The checks accept the solutions, know a blank, and reject what a learner may well write."""

import importlib
import inspect

import numpy as np
import pytest
import torch
from lessons import SOURCES, checked, read_source, stem

import checks

EXERCISES = [name for path in SOURCES for name in checked(read_source(path))]


def public_functions(module) -> set[str]:
    own = inspect.getmembers(module, lambda each: inspect.getmodule(each) is module)
    return {name for name, each in own if inspect.isfunction(each) and not name.startswith("_")}


def solution(name: str):
    lesson, exercise = name.split(".")
    return getattr(importlib.import_module(f"solutions.{lesson}"), exercise)


def wrong_answers(name: str) -> list:
    lesson, exercise = name.split(".")
    return importlib.import_module(f"wrong.{lesson}").WRONG[exercise]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes(name):
    assert checks.verdict(name, solution(name)) == checks.RIGHT


def with_result(name: str, convert):
    return lambda *args: convert(solution(name)(*args))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("staying_stable.not_undone", torch.tensor(1e-3)),
        ("kernels_on_a_cpu.log_sum_exp", with_result("kernels_on_a_cpu.log_sum_exp", np.float32)),
        ("kernels_on_a_cpu.merge", with_result("kernels_on_a_cpu.merge", torch.tensor)),
        ("kernels_on_a_cpu.bytes_moved", np.array(solution("kernels_on_a_cpu.bytes_moved"))),
        ("kernels_on_a_gpu.largest", solution("kernels_on_a_gpu.largest")()),  # the text itself
        ("kernels_on_a_gpu.lost_numbers", 48.0),
        ("beyond_one_machine.reduce_scatter", with_result("beyond_one_machine.reduce_scatter", np.array)),
        ("beyond_one_machine.agreement_without_alpha", torch.eye(3, 20)),
    ],
)
def test_a_right_answer_may_have_another_type(name, answer):
    assert checks.verdict(name, answer) == checks.RIGHT


@pytest.mark.parametrize("name", EXERCISES)
def test_a_blank_is_not_done_yet(name):
    assert checks.verdict(name, ...) == checks.NOT_DONE
    if inspect.isroutine(solution(name)):
        assert checks.verdict(name, lambda *args, **options: ...) == checks.NOT_DONE


@pytest.mark.parametrize("name", EXERCISES)
def test_wrong_answers_are_rejected_with_a_sentence(name):
    assert len(wrong_answers(name)) >= 2
    for answer in wrong_answers(name):
        said = checks.verdict(name, answer)
        assert said not in (checks.RIGHT, checks.NOT_DONE), f"{answer} passes"
        assert "your answer raised" not in said, said  # a plausible answer runs, and its result is wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_check_belongs_to_an_exercise_and_says_what_it_checks(path):
    module = importlib.import_module(f"specs.{stem(path)}")
    names = {name.partition(".")[2] for name in checked(read_source(path))}
    assert public_functions(module) == names
    assert all(getattr(module, name).__doc__ for name in names)
