"""What kernels/README.md shows runs as it is written: its Python, in the emulator, and the commands of the ladders."""

import re
from pathlib import Path

import pytest

from nanochameleon import kernels

FOLDER = Path(kernels.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.usefixtures("emulated_gpu")
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    exec(SNIPPETS[number], names := {})
    assert names["loss"].shape == (3,) and names["loss"][2] == 0 and names["loss"][:2].min() > 0


def test_every_file_of_the_reading_order_exists_in_this_folder():
    order = README.partition("## Read it in this order")[2].partition("##")[0]
    named = re.findall(r"`([\w/]+\.(?:py|cu|cuh))`", order)
    assert len(named) > 15 and all((FOLDER / name).exists() for name in named)
