"""The planted bugs can be planted: each text stands in its file, once. That they are found is `make mutants`."""

from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_a_planted_bug_has_its_place(mutant):
    path = next(p for p in (ROOT / "nanochameleon" / mutant.file, ROOT / mutant.file) if p.is_file())
    assert path.read_text().count(mutant.old) == 1 and mutant.old != mutant.new
