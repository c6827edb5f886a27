"""Every lesson runs from top to bottom, untouched."""

import build
import pytest
from lessons import SOURCES, TUTORIALS, read_source, wrong_figures, wrong_outputs, wrong_verdicts


def files() -> set:
    return {path for path in TUTORIALS.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_lesson_runs_as_it_is_and_leaves_nothing(path):
    before, notebook = files(), read_source(path)
    build.execute(notebook)  # raises where a cell does, so every assertion of the lesson holds
    assert wrong_outputs(notebook) + wrong_figures(notebook) + wrong_verdicts(notebook) == []
    assert files() == before
