"""The command line of the evaluation: what it says, what it refuses, and what it passes on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_tasks import sums
from tiny import tiny_run

from nanochameleon.errors import UserError
from nanochameleon.evaluate import __main__ as command
from nanochameleon.evaluate import tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def known(monkeypatch):
    """The command line knows these tasks."""

    def know(*names):
        monkeypatch.setattr(tasks, "TASKS", tuple(sums(8, name=name) for name in names))

    return know


def test_the_command_line_runs_tasks_into_the_models_folder(model, known, capsys):
    known("sums", "more", "other")
    command.start([str(model), "--tasks", "sums, more", "--limit", "3", "--device", "cpu"])
    out = model / "evaluation"
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"sums", "more"}
    command.start([str(model), "--rescore"])
    command.start(["--rescore", "--out", str(out), "--tasks", "sums"])
    assert json.loads((out / "results.json").read_text())["tasks"].keys() == {"sums", "more"}


def test_the_list_says_what_each_task_wants(known, capsys, monkeypatch):
    wants = sums(name="arc_easy", files="ARC-Easy-Test.jsonl", source="allenai.org/data/arc")
    monkeypatch.setattr(tasks, "TASKS", (sums(), wants))
    for arguments in (["--tasks", "list"], ["models/toy", "--tasks", "list"]):
        command.start(arguments)
        said = capsys.readouterr().out
        assert all(
            each in said for each in ("sums ", "Sums of two numbers", "ARC-Easy-Test.jsonl", "allenai.org/data/arc")
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compar"], "there is no model and no command 'compar': commands are draw, human, safety, compare, "),
        (["."], "--tasks is missing: give names, such as --tasks arc_easy,boolq, or see --tasks list"),
        (["--tasks", "sums"], "the model is missing: give a folder, such as models/toy"),
        (["--rescore"], "the model is missing"),
        (["m", "--tasks", "sums,sums"], "--tasks has sums twice: name it once"),
        (["m", "--tasks", "sums,"], "--tasks has an empty name: join names by single commas"),
        (["m", "--tasks", "sums,list"], "there is no task 'list': see them all with --tasks list"),
        (["m", "--tasks", "smus"], "there is no task 'smus': did you mean sums?"),
        (["m", "--tasks", "qqqqq"], "there is no task 'qqqqq': see them all with --tasks list"),
        (["m", "--tasks", "sums", "--limit", "0"], "--limit must be 1 or more, not 0"),
        (["m", "--tasks", "sums", "--seed", "-1"], "--seed must be from 0 to 4294967295, not -1"),
        (["m", "--tasks", "sums", "--shots", "-1"], "--shots must be 0 or more, not -1"),
        (["m", "--tasks", "sums", "--samples", "0"], "--samples must be 1 or more, not 0"),
        (["m", "--tasks", "sums,more", "--shots", "0"], "--shots changes nothing in sums, more: leave it out"),
        (["m", "--tasks", "sums", "--samples", "4"], "--samples changes nothing in sums: leave it out"),
        (["m", "--tasks", "sums", "--data", "no/where"], "--data must be a folder, not no/where"),
        (["m", "--tasks", "sums"], "m does not exist: give a model's folder"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(known, tmp_path, monkeypatch, arguments, sentence):
    known("sums", "more")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        command.start(arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_an_option_is_found_before_torch_is_imported():
    code = """
import sys
from nanochameleon.errors import UserError
from nanochameleon.evaluate.__main__ import start
try:
    start(["models/toy", "--tasks", "arc_easy", "--limit", "0"])
except UserError as error:
    print(error, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "--limit must be 1 or more, not 0 False\n"


@pytest.mark.parametrize("name", command.COMMANDS)
def test_each_command_says_what_it_does(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.start([name, "--help"])
    assert end.value.code == 0 and f"{command.PROGRAM} {name}" in capsys.readouterr().out


def test_commands_with_options_of_their_own_get_them(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        command.start(["compare", "--help"])
    assert end.value.code == 0 and "item by item" in capsys.readouterr().out


def test_missing_data_is_refused_by_the_task_that_needs_it(model, tmp_path, monkeypatch):
    from nanochameleon.evaluate.records import find_file

    monkeypatch.setattr(tasks, "TASKS", (sums(read=lambda options: find_file(options.data, "a.jsonl")),))
    with pytest.raises(UserError, match=r"--data is missing: give the folder that holds a.jsonl"):
        command.start([str(model), "--tasks", "sums", "--out", str(tmp_path)])


def test_all_tasks_have_names_of_their_own_that_can_be_folders():
    names = [task.name for task in tasks.TASKS]
    assert len(names) == len(set(names)) and all(re.fullmatch("[a-z0-9_]+", name) for name in names)
    assert "list" not in names
    for task in tasks.TASKS:
        assert task.title and bool(task.files) == bool(task.source) and task.chunk >= 1
