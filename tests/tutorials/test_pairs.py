"""Every lesson keeps the rules, and the notebook next to it was built from it."""

import pytest
from lessons import BUILT_RULES, SOURCE_RULES, SOURCES, TUTORIALS, differs, headings, read_built, read_source


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


def test_the_readme_lists_every_lesson_with_its_question():
    readme = (TUTORIALS / "README.md").read_text(encoding="utf-8")
    rows = {path: f"]({path.stem}.ipynb) | {headings(read_source(path))[0][1]} |" for path in SOURCES}
    assert [path.stem for path, row in rows.items() if row not in readme] == []
