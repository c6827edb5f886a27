"""Each rule of lessons.py accepts a lesson that keeps it and names what breaks it. So does the builder for cells."""

import base64
import subprocess
import sys
from pathlib import Path

import build
import jupytext
import lessons
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nanochameleon.errors import UserError

OPENING = "# How long is a sentence?\nTen minutes.\n\n- Words\n- Exercises\n"
EXERCISES = """
check("trial.one", ...)
check("trial.two", ...)
check("trial.three", ...)
assert 1 < 2
assert 2 < 3
assert 3 < 4
"""
SAID = "".join(f"trial.{name}: not done yet\n" for name in ("one", "two", "three"))


def good(**changes) -> nbformat.NotebookNode:
    """A lesson that keeps every rule. `changes`: number of a cell, as c1, c2, ... -> another source."""
    prose = [new_markdown_cell("word " * 75) for _ in range(12)]
    code = [new_code_cell(f"x = {i}", execution_count=i + 1) for i in range(11)]
    figure = new_output("display_data", {"image/png": base64.b64encode(b"x" * 50_000).decode()})
    figure.metadata = {"image/png": {"alt": "a line"}}
    code[0].outputs = [figure, new_output("stream", name="stdout", text="1\n")]
    last = new_code_cell(EXERCISES, execution_count=12, outputs=[new_output("stream", name="stdout", text=SAID)])
    titles = [
        new_markdown_cell("## Words"),
        new_markdown_cell("## Exercises\n### Write: x\n### Predict: y\n### Break: z"),
    ]
    notebook = new_notebook(cells=[new_markdown_cell(OPENING), titles[0], *prose, *code, titles[1], last])
    for name, source in changes.items():
        notebook.cells[int(name[1:]) - 1].source = source
    return notebook


@pytest.mark.parametrize("rule", lessons.SOURCE_RULES + lessons.BUILT_RULES, ids=lambda rule: rule.__name__)
def test_a_good_lesson_breaks_no_rule(rule):
    assert rule(good()) == []


@pytest.mark.parametrize(
    ("rule", "said", "changes"),
    [
        (lessons.wrong_size, "cell 15 has 21 lines", {"c15": "x = 1\n" * 21}),
        (lessons.wrong_size, "cell 3 has 81 words", {"c3": "word " * 81}),
        (lessons.wrong_size, "words, not 800", {f"c{i}": "word" for i in range(3, 10)}),
        (lessons.wrong_headings, "2 titles", {"c3": "# Another"}),
        (lessons.wrong_headings, "'Deep' skips", {"c3": "#### Deep"}),
        (lessons.wrong_opening, "section 'Pairs' is not listed", {"c2": "## Pairs"}),
        (lessons.wrong_opening, "no title", {"c1": OPENING.replace("# ", "## ")}),
        (lessons.wrong_opening, "how many minutes", {"c1": OPENING.replace("minutes", "words")}),
        (lessons.wrong_exercises, "no heading says Predict", {"c26": "## Exercises\n### Write: x\n### Break: z"}),
        (lessons.wrong_exercises, "2 exercises", {"c27": EXERCISES.replace('check("trial.two", ...)', "")}),
        (lessons.wrong_statements, "2 assertions", {"c27": EXERCISES.replace("assert 2 < 3", "")}),
        (lessons.wrong_verdicts, "trial.four is not said", {"c27": EXERCISES.replace("three", "four")}),
    ],
)
def test_a_source_that_breaks_a_rule_is_named(rule, said, changes):
    assert any(said in each for each in rule(good(**changes)))


def test_too_few_and_too_many_cells_are_named():
    notebook = good()
    notebook.cells += [new_code_cell("x = 1")] * 14
    assert "41 cells, not 25 to 40" in lessons.wrong_size(notebook)
    notebook.cells = notebook.cells[:24]
    assert "24 cells, not 25 to 40" in lessons.wrong_size(notebook)


@pytest.mark.parametrize(
    ("rule", "said", "output"),
    [
        (lessons.wrong_outputs, "cell 16 raised ValueError", new_output("error", ename="ValueError", evalue="")),
        (lessons.wrong_outputs, "warning or a progress bar", new_output("stream", name="stderr", text=" 10%|#")),
        (lessons.wrong_outputs, "20 lines", new_output("stream", name="stdout", text="x\n" * 20)),
        (lessons.wrong_outputs, "path of the machine", new_output("stream", name="stdout", text="see /home/me/x")),
        (lessons.wrong_figures, "no alt text", new_output("display_data", {"image/png": "eHg="})),
        (lessons.wrong_figures, "more than 60,000", new_output(
            "display_data", {"image/png": base64.b64encode(b"x" * 60_001).decode()})),
    ],
)  # fmt: skip
def test_an_output_that_breaks_a_rule_is_named(rule, said, output):
    notebook = good()
    notebook.cells[15].outputs = [output]
    assert any(said in each for each in rule(notebook))


def test_source_that_the_library_has_no_more_is_named():
    notebook, shown = good(), "[nanochameleon/vocab.py](../nanochameleon/vocab.py)\n```python\n{}\n```"
    method = "@property\ndef n_text(self) -> int:\n    return self.size - self.{}"  # dedented, as show_source does
    for name, stale in (("first_text", False), ("first_code", True)):
        data = {"text/markdown": shown.format(method.format(name)), "text/plain": "<Markdown>"}
        notebook.cells[15].outputs = [new_output("display_data", data)]
        assert bool(lessons.stale_sources(notebook)) is stale


def test_cells_that_ran_in_another_order_are_named():
    notebook = good()
    notebook.cells[15].execution_count = 7
    assert lessons.wrong_order(notebook)


def test_a_word_of_prose_makes_a_pair_differ():
    assert lessons.differs(good(), good()) == []
    assert lessons.differs(good(), good(c4="another word")) == ["cell 4 differs"]
    shorter = good()
    shorter.cells.pop()
    assert lessons.differs(shorter, good()) == ["26 cells are built, 27 are in the source"]


# ---------------------------------------------------------------------------------------------------------------------
# The builder

CELLS = "# %% [markdown]\n# # Title\n\n# %%\nprint({})\n"


def test_a_rebuild_gives_the_same_bytes(tmp_path, capsys):
    source, saved = tmp_path / "01_trial.py", []
    for _ in range(2):
        source.write_text(CELLS.format("6 * 7"))
        build.build(source)
        saved.append(source.with_suffix(".ipynb").read_bytes())
    assert saved[0] == saved[1] and b'"42\\n"' in saved[0]
    assert capsys.readouterr().out.startswith("01_trial ... ")


def test_a_cell_that_raises_is_named_and_nothing_is_written(tmp_path):
    source = tmp_path / "01_trial.py"
    source.write_text(CELLS.format("1 / 0"))
    with pytest.raises(UserError, match=r"cell 2 of 01_trial.py raises ZeroDivisionError: division by zero"):
        build.build(source)
    assert list(tmp_path.iterdir()) == [source]


def test_ctrl_c_stops_a_build_in_one_word_and_writes_nothing(tmp_path):
    """The cell itself presses it, for the process that builds."""
    source = tmp_path / "01_trial.py"
    source.write_text("# %%\nimport os, signal\nos.kill(os.getppid(), signal.SIGINT)\nsignal.pause()\n")
    code = (
        "import build, errors, pathlib, sys; errors.exit_on_user_error(lambda: build.build(pathlib.Path(sys.argv[1])))"
    )
    code = code.replace("errors", "nanochameleon.errors")
    folder = Path(build.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, source], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.strip().endswith("stopped") and "nbclient" not in done.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_a_lesson_that_is_not_there_is_a_sentence():
    done = subprocess.run([sys.executable, build.__file__, "99_none"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no lesson '99_none': there are")


def test_magics_do_not_hinder_the_rules():
    notebook = jupytext.reads("# %%\n# %matplotlib inline\nassert 1\n", "py:percent")
    assert lessons.wrong_statements(notebook) == ["1 assertions, fewer than 3"]
