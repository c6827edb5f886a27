"""The terminal annotator, driven by a pipe: keys, undo, leaving and resuming, and text that a terminal would obey."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from small_studies import MODELS, pairs, prompts, small_study

from nanochameleon.errors import UserError
from nanochameleon.evaluate.human import Votes
from nanochameleon.evaluate.people import terminal
from nanochameleon.evaluate.people.make import build
from nanochameleon.images import output

HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202eevil\rover"


def vote_by_keys(folder, keys: str, capsys, monkeypatch, annotator: str = "ann") -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(keys))
    terminal.annotate(folder, annotator)
    return capsys.readouterr().out


def test_keys_are_labels_in_order_and_every_vote_is_saved_at_once(tmp_path, capsys, monkeypatch):
    study, _ = small_study(tmp_path, 3, questions="relative")
    printed = vote_by_keys(tmp_path, "1\n2\n 3 \n", capsys, monkeypatch)
    votes = sorted(Votes(study).log(), key=lambda vote: vote.time)
    assert [vote.answer for vote in votes] == ["first", "same", "second"]
    assert [vote.item for vote in votes] == [item.id for item in study.order("ann")]
    assert "[0 of 3]" in printed and "[2 of 3]" in printed and printed.endswith("thank you\n")


def test_what_is_first_on_the_screen_is_first_in_the_vote(tmp_path, capsys, monkeypatch):
    answers = {MODELS[0]: ["good"] * 20, MODELS[1]: ["bad"] * 20}
    study, key = small_study(tmp_path, 20, answers, questions="relative")
    printed = vote_by_keys(tmp_path, "1\n" * 20, capsys, monkeypatch)
    shown = [words.split()[0] for words in printed.split("First answer\n\n")[1:]]
    voted = {vote.item: key.answers[vote.order[0]] for vote in Votes(study).log()}
    assert shown == [{MODELS[0]: "good", MODELS[1]: "bad"}[voted[item.id]] for item in study.order("ann")]
    assert {"good", "bad"} == set(shown)


def test_u_takes_the_last_vote_back_and_asks_again(tmp_path, capsys, monkeypatch):
    study, _ = small_study(tmp_path, 2, questions="relative")
    printed = vote_by_keys(tmp_path, "u\n1\n2\n", capsys, monkeypatch)
    assert "there is nothing to undo" in printed
    assert [vote.answer for vote in sorted(Votes(study).current_votes(), key=lambda vote: vote.time)] == [
        "first",
        "same",
    ]
    printed = vote_by_keys(tmp_path, "1\nu\n3\nu\nu\n2\n2\n", capsys, monkeypatch, "bob")
    assert printed.count("taken back") == 2 and "there is nothing to undo" in printed
    assert [vote.answer for vote in Votes(study).current_votes("bob")] == ["same", "same"]


def test_q_and_the_end_of_the_input_leave_and_the_same_command_resumes(tmp_path, capsys, monkeypatch):
    study, _ = small_study(tmp_path, 4, questions="relative")
    assert "resumes" in vote_by_keys(tmp_path, "1\nq\n1\n", capsys, monkeypatch)
    assert "[1 of 4]" in vote_by_keys(tmp_path, "2\n", capsys, monkeypatch)
    assert "[2 of 4]" in vote_by_keys(tmp_path, "3\n3\n", capsys, monkeypatch)
    assert len(Votes(study).log()) == 4
    assert "nothing is left" in vote_by_keys(tmp_path, "", capsys, monkeypatch)


@pytest.mark.parametrize("key", ["", "0", "4", "first", "-1", "²", "11", "1 2", "\x1b[A", "1" * 5000])
def test_other_keys_are_no_vote(tmp_path, capsys, monkeypatch, key):
    study, _ = small_study(tmp_path, 1, questions="relative")
    assert "answer 1 to 3, u or q" in vote_by_keys(tmp_path, f"{key}\n", capsys, monkeypatch)
    assert Votes(study).log() == []


def test_a_byte_that_is_no_text_is_no_vote_and_what_follows_counts(tmp_path, capsys, monkeypatch):
    study, _ = small_study(tmp_path, 2, questions="relative")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xfc\n3\n1\n"), "utf-8"))
    terminal.annotate(tmp_path, "ann")
    assert "answer 1 to 3, u or q" in capsys.readouterr().out
    assert [vote.answer for vote in Votes(study).log()] == ["second", "first"]


def test_what_a_model_says_cannot_command_the_terminal(tmp_path, capsys, monkeypatch):
    small_study(tmp_path, 1, {MODELS[0]: [HOSTILE], MODELS[1]: ["fine"]})
    printed = vote_by_keys(tmp_path, "1\n" * 20, capsys, monkeypatch)
    assert "evil" in printed and not {"\x1b", "\x07", "\u202e", "\r"} & set(printed)


def test_a_name_that_could_be_a_path_is_refused(tmp_path):
    small_study(tmp_path, 1)
    with pytest.raises(UserError, match="must have 1 to 32"):
        terminal.annotate(tmp_path, "../ann")


def test_images_are_shown_or_their_random_names_are_printed(tmp_path, capsys, monkeypatch):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    answer = [{"text": "see "}, {"image": str(tmp_path / "red.png")}]
    build(
        tmp_path / "s",
        prompts(1),
        {model: [answer] for model in MODELS},
        duplicates=0,
        attention=0,
        questions="relative",
    )
    printed = vote_by_keys(tmp_path / "s", "q\n", capsys, monkeypatch)
    names = [path.name for path in (tmp_path / "s" / "shown" / "images").iterdir()]
    assert len(names) == 2 and all(printed.count(name) == 1 for name in names) and "red.png" not in printed
    shown = []
    monkeypatch.setattr(terminal, "terminal_mode", lambda *_: "blocks")
    monkeypatch.setattr(output, "show", shown.append)
    assert "image:" not in vote_by_keys(tmp_path / "s", "q\n", capsys, monkeypatch)
    assert len(shown) == 2 and all((np.array(image) == (255, 0, 0)).all() for image in shown)


PROGRAM = "import sys; from nanochameleon.evaluate.people.command import cli; cli(sys.argv[1:])"


def test_the_command_works_in_a_pipe_and_loads_no_torch(tmp_path):
    study, _ = small_study(tmp_path, 2, questions="relative")
    program = f"{PROGRAM}\nassert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program, "annotate", str(tmp_path), "--annotator", "ann"]
    done = subprocess.run(command, input="1\n3\n", capture_output=True, text=True, env=os.environ | {"TERM": "dumb"})
    assert (done.returncode, done.stderr) == (0, "")
    assert [vote.answer for vote in Votes(study).log()] == ["first", "second"]
    assert pairs(study)[0].id not in done.stdout
