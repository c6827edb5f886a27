"""Every lesson keeps the rules, and the notebook next to it was built from it."""

import pytest
from lessons import BUILT_RULES, SOURCE_RULES, SOURCES, TUTORIALS, differs, read_built, read_source


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", SOURCE_RULES, ids=lambda rule: rule.__name__)
def test_a_lesson_keeps_the_rule(path, rule):
    assert rule(read_source(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", BUILT_RULES, ids=lambda rule: rule.__name__)
def test_a_notebook_keeps_the_rule(path, rule):
    assert rule(read_built(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_what_its_source_says(path):
    """If it is not: make notebooks."""
    assert differs(read_built(path), read_source(path)) == []


def test_every_notebook_has_a_source():
    assert {path.stem for path in TUTORIALS.glob("*.ipynb")} == {path.stem for path in SOURCES}
