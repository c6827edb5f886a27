"""The command that runs tasks on a model: what it writes, how it resumes, and what it refuses."""

import dataclasses
import errno
import json
import os
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from made_up_tasks import after, refused, score, sums, with_problem
from tiny import nano_folder, tiny_model, tiny_run

from nanochameleon.convert import Args as ConvertArgs
from nanochameleon.convert import convert
from nanochameleon.errors import Interrupted, UserError
from nanochameleon.evaluate import runner
from nanochameleon.evaluate.header import HEADER, tensors_hash
from nanochameleon.evaluate.log import ITEMS, Log, read_lines
from nanochameleon.evaluate.runner import evaluate, rescore
from nanochameleon.evaluate.task import Options
from nanochameleon.files import write_file
from nanochameleon.training.run import CONFIG
from nanochameleon.training.run_folder import claim


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def opened_once():
    """Opening the same model again takes most of the time of a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("open_model", "open_config"):
            patch.setattr(runner, name, cache(getattr(runner, name)))
        yield


def run(model: Path, out: Path, *asked, **options) -> dict:
    device, dtype = options.pop("device", "cpu"), options.pop("dtype", "auto")
    return evaluate(model, asked, Options(out=out, **options), device, dtype)


def log_of(out: Path, name: str = "sums") -> bytes:
    return (out / name / ITEMS).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# What it does


def test_tasks_run_one_after_another_and_everything_is_written(model, tmp_path, capsys):
    result = run(model, tmp_path / "out", sums(9), sums(4, name="more"), limit=6)
    assert {name: (each["items"], each["answered"]) for name, each in result["tasks"].items()} == {
        "sums": (6, 6),
        "more": (4, 4),
    }
    figures = {figure["name"]: figure["value"] for figure in result["tasks"]["sums"]["figures"]}
    assert figures == {"acc": pytest.approx(4 / 6), "acc, even": pytest.approx(2 / 3), "acc, odd": pytest.approx(2 / 3)}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"header.json", "results.json", "table.md", "table.html", "sums", "more"}
    said = capsys.readouterr().out
    assert said.startswith(f"10 items (sums 6, more 4) -> {tmp_path / 'out'}\n")
    assert re.search(r"^sums +acc +66.7% +22.3% to 95.7% +6 items$", said, re.MULTILINE)
    assert said.endswith("table.html\n")


def test_the_header_says_what_the_figures_depend_on(model, tmp_path):
    header = run(model, tmp_path, sums(3), seed=5, data=tmp_path)["header"]
    assert header == json.loads((tmp_path / HEADER).read_text())
    assert header["model"].items() >= {"path": str(model), "dtype": "float32", "device": "cpu"}.items()
    assert header["options"] == {"seed": 5, "shots": None, "samples": 1} and header["tasks"] == {"sums": 3}
    [session] = header["sessions"]
    assert session["versions"]["torch"] == torch.__version__ and session["seconds"] >= 0
    assert session["kernels"].keys() >= {"rms_norm", "decoder"} and "thread" in session["machine"]
    assert re.fullmatch(r"[0-9a-f]{7,}|unknown", session["commit"]) and type(session["uncommitted_changes"]) is bool


def test_lines_do_not_depend_on_the_machine_or_the_time(model, tmp_path):
    run(model, tmp_path / "a", sums(9))
    run(model, tmp_path / "b", sums(9))
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_a_model_has_the_same_hashes_in_another_layout(model, tmp_path):
    convert(ConvertArgs(model, tmp_path / "nano", "nano"))
    run(model, tmp_path / "out", sums(3))
    result = run(tmp_path / "nano", tmp_path / "out", sums(3))
    assert len(result["header"]["sessions"]) == 2


def test_other_weights_have_another_hash():
    model, same, other = tiny_model(0), tiny_model(0), tiny_model(1)
    assert tensors_hash(model) == tensors_hash(same) != tensors_hash(other)
    with torch.no_grad():
        same.output.weight[0, 0] += 1e-3
    assert tensors_hash(model) != tensors_hash(same)
    assert tensors_hash(model) != tensors_hash(model.to(torch.bfloat16))


def test_another_guidance_is_another_evaluation(model, tmp_path):
    """Tasks that draw take the model's own parameters."""
    run(model, tmp_path / "out", sums(3))
    same = tiny_run(tmp_path / "same")
    config = json.loads((same / CONFIG).read_text())
    config["sample"]["guidance_scale"] = 2.5
    (same / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="with another set of sampling parameters"):
        run(same, tmp_path / "out", sums(3))


def test_int8_weights_are_another_evaluation(model, tmp_path):
    run(model, tmp_path / "out", sums(3))
    same = tiny_run(tmp_path / "same")
    with pytest.raises(UserError, match=r"dtype was float32 and is int8"):
        run(same, tmp_path / "out", sums(3), dtype="int8")
    assert run(same, tmp_path / "int8", sums(3), dtype="int8")["header"]["model"]["dtype"] == "int8"


def test_a_task_knows_the_world_of_the_model(model, tmp_path):
    seen = []
    task = sums(2)

    def read(options):
        seen.append(options.world)
        return task.read(options)

    run(model, tmp_path / "a", dataclasses.replace(task, read=read))
    other = nano_folder(tmp_path / "model")  # says nothing of a world
    run(other, tmp_path / "b", dataclasses.replace(task, read=read))
    assert [world is not None for world in seen] == [True, False]


def test_a_task_writes_its_files_for_official_scorers_once_all_items_are_there(model, tmp_path):
    calls = []
    task = sums(
        6, export=lambda lines, options, folder: calls.append((len(lines), options.seed, folder.is_dir(), folder))
    )
    run(model, tmp_path, task)
    assert calls == [(6, 0, True, tmp_path / "sums")]


def test_without_a_progress_bar_the_time_left_is_said_once_after_the_first_chunk(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "WORTH_SAYING", -1.0)
    run(model, tmp_path, sums(12))
    assert capsys.readouterr().out.count("sums: about 0 s left\n") == 1


def test_tasks_of_an_earlier_session_stay_in_the_table(model, tmp_path):
    run(model, tmp_path, sums(3))
    result = run(model, tmp_path, sums(4, name="more"))
    assert list(result["tasks"]) == ["sums", "more"] and result["header"]["tasks"] == {"sums": 3, "more": 4}
    assert [session["tasks"] for session in result["header"]["sessions"]] == [["sums"], ["more"]]


# ---------------------------------------------------------------------------------------------------------------------
# Faults of some tasks and items


def test_a_bad_file_ends_the_command_with_its_sentence_after_the_others_ran(model, tmp_path, capsys):
    with pytest.raises(UserError, match=r"^x.jsonl:3 is not JSON$"):
        run(model, tmp_path, refused("x.jsonl:3 is not JSON"), sums(3))
    assert "refused is left out: x.jsonl:3 is not JSON" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "results.json").read_text())["tasks"]) == ["sums"]


def test_a_bad_file_alone_leaves_nothing(model, tmp_path):
    with pytest.raises(UserError, match=r"^no file$"):
        run(model, tmp_path / "out", refused("no file"))
    with pytest.raises(UserError, match=r"^2 tasks could not be run; the first: no file$"):
        run(model, tmp_path / "out", refused("no file"), refused("not JSON", name="other"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (sums(0), "sums has no items: look at its file"),
        (
            sums(2, read=lambda options: sums(2).read(options) * 2),
            "sums: an item has the id 'sum-0', as sums: an item has",
        ),
    ],
)
def test_a_task_without_items_or_with_equal_ids_is_refused(model, tmp_path, task, sentence):
    with pytest.raises(UserError, match=sentence):
        run(model, tmp_path, task)


def test_items_that_cannot_be_asked_are_left_out_and_end_with_exit_code_2(model, tmp_path):
    with pytest.raises(
        UserError, match=r"^2 items could not be asked; the first: sums, item sum-2: a.png:1 has no image: mend it$"
    ):
        run(model, tmp_path, with_problem(["sum-2", "sum-5"]))
    result = json.loads((tmp_path / "results.json").read_text())["tasks"]["sums"]
    assert (result["left_out"], result["figures"][0]["n"]) == (2, 18)
    with pytest.raises(UserError, match=r"2 items"):  # also where nothing is left to ask
        run(model, tmp_path, with_problem(["sum-2", "sum-5"]))


def test_what_could_not_be_asked_is_asked_again_and_ends_with_the_same_bytes(model, tmp_path):
    with pytest.raises(UserError, match=r"3 items"):
        run(model, tmp_path / "mended", with_problem(["sum-2", "sum-5", "sum-17"]), limit=18)
    with pytest.raises(UserError, match=r"sum-5: a.png:1 has no image"):  # the other two are there now
        run(model, tmp_path / "mended", with_problem(["sum-5"]))
    result = run(model, tmp_path / "mended", sums())["tasks"]["sums"]
    assert (result["left_out"], result["answered"]) == (0, 20)
    run(model, tmp_path / "through", sums())
    assert log_of(tmp_path / "mended") == log_of(tmp_path / "through")


def test_chunks_without_a_problem_are_not_asked_again(model, tmp_path):
    with pytest.raises(UserError, match=r"1 item|sum-5"):
        run(model, tmp_path, with_problem(["sum-5"]))
    asked = []

    def answer(_, items, options) -> list:
        asked.append([item.id for item in items])
        return sums().answer(None, items, options)

    run(model, tmp_path, sums(answer=answer))
    assert asked == [["sum-5"], ["sum-4", "sum-5", "sum-6", "sum-7"]]


def test_chunks_that_lacked_every_image_are_asked_once_and_written_together(model, tmp_path, monkeypatch):
    """As after a benchmark's images were forgotten: thousands of chunks, and a log of hundreds of MB."""
    with pytest.raises(UserError, match=r"20 items"):
        run(model, tmp_path, with_problem([f"sum-{i}" for i in range(20)]))
    asked, saves, save = [], [], Log.save
    monkeypatch.setattr(Log, "save", lambda log: saves.append(1) or save(log))

    def answer(_, items, options) -> list:
        asked.extend(item.id for item in items)
        return sums().answer(None, items, options)

    run(model, tmp_path, sums(answer=answer))
    assert asked == [f"sum-{i}" for i in range(20)] and len(saves) == 1
    run(model, tmp_path / "through", sums())
    assert log_of(tmp_path) == log_of(tmp_path / "through")


def test_a_folder_that_refused_a_smaller_limit_still_has_its_number_of_items(model, tmp_path):
    run(model, tmp_path, sums(20))
    with pytest.raises(UserError, match=r"has 20 items, of which this command wants 8"):
        run(model, tmp_path, sums(20), limit=8)
    assert rescore([sums(20)], Options(out=tmp_path))["tasks"]["sums"]["items"] == 20


def test_half_a_character_in_the_name_of_a_group_is_spelled_out(model, tmp_path):
    def read(options: Options) -> list:
        return [dataclasses.replace(item, group=f"{item.group} \ud800") for item in sums(4).read(options)]

    run(model, tmp_path, sums(4, read=read))
    for name in ("table.md", "table.html"):
        assert "even \\ud800" in (tmp_path / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [HEADER, "results.json", "table.html", "for_others.json"])
def test_any_file_that_does_not_fit_on_the_disk_is_named(model, tmp_path, monkeypatch, name):
    def replaced(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    def export(lines, options, folder):
        write_file(folder / "for_others.json", b"[]")

    real = os.replace
    monkeypatch.setattr("os.replace", replaced)
    sentence = r"cannot write to .* \(No space left on device\): free some space, and the same command resumes"
    with pytest.raises(UserError, match=sentence):
        run(model, tmp_path / "out", sums(4, export=export))


def test_faults_of_tasks_and_items_are_counted_together(model, tmp_path):
    with pytest.raises(UserError, match=r"^1 task could not be run and 1 item could not be asked; the first: bad$"):
        run(model, tmp_path, with_problem(["sum-1"]), refused("bad"))


def test_an_answer_that_is_refused_ends_its_task_alone(model, tmp_path):
    def act():
        raise UserError("the model cannot draw")

    with pytest.raises(UserError, match=r"^the model cannot draw$"):
        run(model, tmp_path, after(6, act, sums(9)), sums(3, name="more"))
    assert len(read_lines(tmp_path / "sums" / ITEMS)) == 4
    assert list(json.loads((tmp_path / "results.json").read_text())["tasks"]) == ["more"]


# ---------------------------------------------------------------------------------------------------------------------
# Stopped, resumed, refused


def test_ctrl_c_says_the_command_that_resumes(model, tmp_path, capsys, monkeypatch):
    def act():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["/x/__main__.py", "models/toy", "--tasks", "sums", "--out", "a folder"])
    with pytest.raises(Interrupted):
        run(model, tmp_path, after(6, act, sums(9)))
    said = capsys.readouterr().err
    assert "stopped; what was answered is kept" in said
    assert said.rstrip().endswith("-m nanochameleon.evaluate models/toy --tasks sums --out 'a folder'")
    assert len(read_lines(tmp_path / "sums" / ITEMS)) == 4
    run(model, tmp_path, sums(9))
    run(model, tmp_path / "through", sums(9))
    assert log_of(tmp_path) == log_of(tmp_path / "through")


def test_another_model_is_refused(model, tmp_path):
    run(model, tmp_path / "out", sums(3))
    other = tiny_run(tmp_path / "other", tiny_model(seed=1))
    with pytest.raises(UserError, match=r"holds an evaluation with another model: choose another --out"):
        run(other, tmp_path / "out", sums(3))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, r"another evaluation \(seed was 0 and is 1\): choose another --out, or the same --seed"),
        ({"shots": 2}, r"\(shots was the task's own and is 2\)"),
        ({"samples": 4}, r"\(samples was 1 and is 4\)"),
        ({"dtype": "bf16"}, r"\(dtype was float32 and is bfloat16\)"),
    ],
)
def test_other_options_are_refused(model, tmp_path, changes, sentence):
    run(model, tmp_path, sums(3))
    before = log_of(tmp_path)
    with pytest.raises(UserError, match=sentence):
        run(model, tmp_path, sums(9), **changes)
    assert log_of(tmp_path) == before and len(json.loads((tmp_path / HEADER).read_text())["sessions"]) == 1


def test_a_log_with_other_items_is_refused_and_other_tasks_run(model, tmp_path):
    run(model, tmp_path, sums(5))
    with pytest.raises(UserError, match=rf"{ITEMS} has 5 items, of which this command wants 3"):
        run(model, tmp_path, sums(3), sums(2, name="more"))
    assert (tmp_path / "more" / ITEMS).exists()


def test_two_processes_in_one_folder_are_refused(model, tmp_path):
    with (
        claim(tmp_path, "evaluates"),
        pytest.raises(UserError, match=rf"evaluates in {tmp_path}: wait for it, stop it"),
    ):
        run(model, tmp_path, sums(3))


def test_lines_of_two_versions_are_warned_of(model, tmp_path, capsys, monkeypatch):
    run(model, tmp_path, sums(9), limit=4)
    monkeypatch.setattr("nanochameleon.evaluate.header.commit", lambda: "1234567")
    run(model, tmp_path, sums(9))
    assert "sums was begun with another commit: its answers come from two versions" in capsys.readouterr().err
    run(model, tmp_path, sums(9))  # asks nothing
    assert "begun" not in capsys.readouterr().err


def test_a_folder_without_its_header_or_with_a_strange_one_is_refused(model, tmp_path):
    run(model, tmp_path, sums(3))
    (tmp_path / HEADER).write_text("{}")
    with pytest.raises(UserError, match=r"is not the header of an evaluation: choose another --out"):
        run(model, tmp_path, sums(3))
    (tmp_path / HEADER).unlink()
    with pytest.raises(UserError, match=r"holds files, and no header.json of an evaluation: choose another --out"):
        run(model, tmp_path, sums(3))


def test_a_folder_with_other_files_such_as_the_model_is_refused(model, tmp_path):
    (tmp_path / "results.json").write_text("mine")
    for folder in (tmp_path, model):
        with pytest.raises(UserError, match=r"holds files, and no header.json of an evaluation: choose another --out"):
            run(model, folder, sums(3))
    assert (tmp_path / "results.json").read_text() == "mine" and not (model / HEADER).exists()


def test_what_is_no_model_is_refused_before_any_item_is_read(tmp_path):
    with pytest.raises(UserError, match=r"nothing does not exist: give a model's folder"):
        run(tmp_path / "nothing", tmp_path / "out", refused("read"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is not a run"):
        run(tmp_path / "empty", tmp_path / "out", refused("read"))
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_refused_before_any_item_is_read(model, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match=r"choose another --out"):
            run(model, out, refused("read"))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring again


def test_rescore_needs_neither_the_model_nor_the_data_and_changes_no_byte(model, tmp_path, capsys):
    first = run(model, tmp_path, sums(9))
    before = log_of(tmp_path)
    without = sums(9, read=lambda options: 1 / 0, answer=lambda run, items, options: 1 / 0)
    again = rescore([without], Options(out=tmp_path))
    assert log_of(tmp_path) == before and again["tasks"] == first["tasks"]
    assert "another score" not in capsys.readouterr().out


def test_rescore_with_another_rule_changes_scores_and_tables(model, tmp_path, capsys):
    run(model, tmp_path, sums(9))
    answers = [line.output for line in read_lines(tmp_path / "sums" / ITEMS)]
    lenient = sums(9, score=lambda content, output: ("any", {"acc": 1.0}))
    result = rescore([lenient], Options(out=tmp_path))
    assert result["tasks"]["sums"]["figures"][0]["value"] == 1
    assert [line.output for line in read_lines(tmp_path / "sums" / ITEMS)] == answers
    assert "sums: 9 of 9 items have another score than before" in capsys.readouterr().out
    assert rescore([sums(9)], Options(out=tmp_path))["tasks"]["sums"]["figures"][0]["value"] == pytest.approx(6 / 9)


def test_rescore_writes_the_files_for_official_scorers_with_the_options_of_the_run(model, tmp_path):
    given = []
    task = sums(6, export=lambda lines, options, folder: given.append((len(lines), options.limit, options.seed)))
    run(model, tmp_path, task, limit=4, seed=3)
    run(model, tmp_path, sums(6, name="more"), seed=3)
    rescore([task], Options(out=tmp_path))
    assert given == [(4, 4, 3), (4, 4, 3)]


def test_rescore_keeps_items_that_could_not_be_asked_out(model, tmp_path):
    with pytest.raises(UserError):
        run(model, tmp_path, with_problem(["sum-2"]))
    strict = sums(score=lambda content, output: score(content, output))
    assert rescore([strict], Options(out=tmp_path))["tasks"]["sums"]["left_out"] == 1


def test_rescore_of_a_stopped_task_says_so_and_writes_no_file_for_official_scorers(model, tmp_path):
    def act():
        raise UserError("stopped")

    with pytest.raises(UserError):
        run(model, tmp_path, after(6, act, sums(9)))
    result = rescore([sums(9, export=lambda *_: 1 / 0)], Options(out=tmp_path))
    assert (result["tasks"]["sums"]["answered"], result["tasks"]["sums"]["items"]) == (4, 9)
    assert "only 4 of 9 items" in (tmp_path / "table.md").read_text()


def test_rescore_refuses_a_folder_without_an_evaluation_or_without_the_task(model, tmp_path):
    with pytest.raises(UserError, match=r"holds no evaluation: give the --out of one"):
        rescore([sums()], Options(out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    run(model, tmp_path, sums(3))
    with pytest.raises(UserError, match=r"more has no items.jsonl: more was not run into this --out"):
        rescore([sums(name="more")], Options(out=tmp_path))
