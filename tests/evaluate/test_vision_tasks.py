"""Tasks about images: a model that sees the right answer gets all of it, and official files hold what it said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, tiny_run
from vision_sets import (
    ANSWERS,
    CAPTIONS,
    TRAINING,
    TRAINING_ANSWERS,
    write_blip,
    write_coco,
    write_flickr,
    write_images,
    write_questions,
    write_vizwiz,
    write_vqa,
)

from nanochameleon.data.sources.scenes import NUMBERS, World, scenes
from nanochameleon.documents import Text, parse
from nanochameleon.errors import UserError
from nanochameleon.evaluate.captions import facts, parse_caption, score_caption
from nanochameleon.evaluate.contamination import strings
from nanochameleon.evaluate.task import Line, Options, Task
from nanochameleon.evaluate.vision import captioning, prompts, questions, shapes_tasks
from nanochameleon.evaluate.vision.prompts import parts_of
from nanochameleon.evaluate.vision.shapes_tasks import true_captions
from nanochameleon.evaluate.writing import Written
from nanochameleon.training.run import Run
from nanochameleon.weights.model_folder import open_model

TASKS = {task.name: task for task in (*captioning.TASKS, *questions.TASKS, *shapes_tasks.TASKS)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A model with room for three images and their texts."""
    return open_model(tiny_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_model(max_seq_len=512)), "cpu")


def answered(task: Task, run: Run, options: Options) -> list[Line]:
    """Read, answer and score a task as a run does, through JSON."""
    items = json.loads(json.dumps([[item.id, item.group, item.content] for item in task.read(options)]))
    lines = []
    for item, answer in zip(task.read(options), task.answer(run, task.read(options), options), strict=True):
        content, output = json.loads(json.dumps([item.content, answer.output]))
        extracted, metrics = (None, {}) if "problem" in output else task.score(content, output)
        lines.append(Line(item.id, item.group, content, output, extracted, metrics))
    assert [line.id for line in lines] == [name for name, _, _ in items]
    return lines


class Says:
    """Stands in for writing.write: says an item's next text when it sees an image, another one when it does not."""

    def __init__(self, texts: list[str], blind: str = "nothing"):
        self.texts, self.blind = iter(texts), blind
        self.prompts: list[list[int]] = []

    def __call__(self, run, given, *_):
        self.prompts += given
        sees = [run.vocab.boi in prompt for prompt in given]
        return [Written(next(self.texts) if seen else self.blind, False, True) for seen in sees]


def figure(task: Task, lines: list[Line], name: str):
    (found,) = [figure for figure in task.figures(lines) if figure.name == name]
    return found


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "write"), [("coco", write_coco), ("coco", write_blip), ("flickr30k", write_flickr)])
def test_captions_follow_their_images_and_true_ones_score_high(run, tmp_path, monkeypatch, name, write):
    write(tmp_path)
    monkeypatch.setattr(prompts, "write", says := Says([f" {texts[0]}" for texts in CAPTIONS.values()]))
    lines = answered(TASKS[name], run, Options(data=tmp_path))
    assert [line.extracted for line in lines] == [texts[0] for texts in CAPTIONS.values()]
    cider = figure(TASKS[name], lines, "CIDEr-D")
    assert cider.n == 3 and cider.unit == "images" and cider.value > 400 > 50 > cider.baseline
    assert "make the set" in cider.note and "Table 7" in cider.note
    written = [s.text for s in parse(says.prompts[0], run.tokenizer, run.vocab) if isinstance(s, Text)]
    examples = {" ".join(texts[0].split()) + "\n" for texts in TRAINING.values()}
    assert len(written) == 2 and set(written) <= examples  # the image in question is the end: no text after it


def test_results_are_the_official_file_and_each_images_score(run, tmp_path, monkeypatch):
    write_coco(tmp_path)
    monkeypatch.setattr(prompts, "write", Says(["a red ball on grass", "", "a bus"]))
    lines = answered(TASKS["coco"], run, Options(data=tmp_path))
    lines.append(Line("4", "", {}, {"problem": "image 4.jpg is not there"}, None, {}))
    TASKS["coco"].export(lines, Options(), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == [
        {"image_id": 1, "caption": "a red ball on grass"},
        {"image_id": 2, "caption": ""},
        {"image_id": 3, "caption": "a bus"},
    ]
    rows = [json.loads(line) for line in (tmp_path / "per_image.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rows] == [1, 2, 3] and rows[1]["CIDEr-D"] == 0 < rows[0]["CIDEr-D"]
    mean = sum(row["CIDEr-D"] for row in rows) / 3
    assert figure(TASKS["coco"], lines[:3], "CIDEr-D").value == pytest.approx(mean)


def test_the_blind_baseline_of_captions_is_another_images_caption():
    texts = ["a b c d", "e f g h", "i j k l"]
    lines = [Line(str(i), "", {"references": [text]}, {}, text, {}) for i, text in enumerate(texts)]
    swapped = [replace(line, extracted=texts[(i + 1) % 3]) for i, line in enumerate(lines)]
    assert captioning.cider_figure(lines, "").value == pytest.approx(1_000)
    worst = captioning.cider_figure(swapped, "")
    assert (worst.value, worst.low, worst.high) == (0, 0, 0)  # no share, so no interval of a share
    assert captioning.cider_figure(lines, "").baseline == worst.value


@pytest.mark.parametrize(("shots", "n"), [(0, 1), (1, 2), (None, 3)])
def test_shots_are_two_unless_asked_otherwise(tmp_path, shots, n):
    write_coco(tmp_path)
    assert {len(parts_of(item.content)) for item in TASKS["coco"].read(Options(data=tmp_path, shots=shots))} == {n}


@pytest.mark.parametrize("name", ["coco", "vqav2"])
def test_words_of_examples_are_no_words_of_an_item(tmp_path, name):
    """Else the check for contamination would find training data in every item."""
    write_coco(tmp_path)
    write_vqa(tmp_path)
    without, with_examples = (TASKS[name].read(Options(data=tmp_path, shots=shots)) for shots in (0, None))
    assert all(len(parts_of(item.content)) == 3 for item in with_examples)
    assert [[*strings(item.content)] for item in with_examples] == [[*strings(item.content)] for item in without]


def test_without_examples_training_files_and_images_are_not_needed(run, tmp_path):
    write_images(tmp_path)
    write_questions(tmp_path, "v2_", "val2014", ANSWERS)
    for path in (tmp_path / "train2014").iterdir():
        path.unlink()
    assert len(answered(TASKS["vqav2"], run, Options(data=tmp_path, shots=0))) == 3
    with pytest.raises(UserError, match=r"has no v2_OpenEnded_mscoco_train2014_questions.json"):
        TASKS["vqav2"].read(Options(data=tmp_path))
    write_questions(tmp_path, "v2_", "train2014", TRAINING_ANSWERS)
    with pytest.raises(UserError, match=r"use --shots 0"):
        TASKS["vqav2"].read(Options(data=tmp_path))


# --- questions -------------------------------------------------------------------------------------------------------

SETS = {"vqav2": write_vqa, "okvqa": lambda folder: write_vqa(folder, ""), "vizwiz": write_vizwiz}


@pytest.mark.parametrize("name", SETS)
def test_the_right_answers_have_accuracy_1_and_blind_ones_0(run, tmp_path, monkeypatch, name):
    SETS[name](tmp_path)
    monkeypatch.setattr(prompts, "write", says := Says([" ball.", " 2", " yes."]))
    lines = answered(TASKS[name], run, Options(data=tmp_path))
    assert [line.extracted for line in lines] == ["ball", "2", "yes"]
    total = figure(TASKS[name], lines, "acc")
    assert (total.value, total.baseline, total.n, total.ceiling) == (1, 0, 3, 1)
    assert {f.name for f in TASKS[name].figures(lines)} == {
        "acc", "acc, number", "acc, other", "acc, yes/no", "always 'ball'"
    }  # fmt: skip
    assert figure(TASKS[name], lines, "always 'ball'").value == pytest.approx(1 / 3)
    texts = [s.text for s in parse(says.prompts[0], run.tokenizer, run.vocab) if isinstance(s, Text)]
    assert texts[-1] == "Question: what is red? Short answer:"
    assert all(text.endswith("? Short answer: a thing\n") for text in texts[:-1]) and len(texts) == 3
    assert parse(says.prompts[3], run.tokenizer, run.vocab) == [Text("".join(texts))]  # blind, after all that see


def test_a_ceiling_is_what_people_agree_on():
    lines = [
        Line(str(i), kind, {"references": references}, {}, "x", {"acc": 0.0, "acc_blind": 0.0})
        for i, (references, kind) in enumerate([(["a"] * 10, "a"), (["a"] * 2 + list("bcdefghi"), "b")])
    ]
    by_name = {figure.name: figure.ceiling for figure in questions.figures(lines)}
    assert by_name["acc, a"] == 1 and by_name["acc, b"] == pytest.approx(0.6) and by_name["acc"] == pytest.approx(0.8)


def test_official_files_have_the_official_keys(run, tmp_path, monkeypatch):
    for name, key in [("vqav2", "question_id"), ("vizwiz", "image")]:
        SETS[name](folder := tmp_path / name)
        monkeypatch.setattr(prompts, "write", Says(["ball", "2", "yes"]))
        TASKS[name].export(answered(TASKS[name], run, Options(data=folder)), Options(data=folder), folder)
        written = json.loads((folder / "results.json").read_text())
        ids = list(ANSWERS) if key == "question_id" else [f"VizWiz_val_{n:08d}.jpg" for n in ANSWERS]
        assert written == [{key: i, "answer": text} for i, text in zip(ids, ["ball", "2", "yes"], strict=True)]


def write_test(folder: Path) -> Options:
    write_images(folder)
    (folder / "val2014").rename(folder / "test2015")
    for path in (folder / "test2015").iterdir():
        path.rename(path.with_name(path.name.replace("val2014", "test2015")))
    write_questions(folder, "v2_", "test2015", ANSWERS, annotated=False)
    write_questions(folder, "v2_", "train2014", TRAINING_ANSWERS)
    return Options(data=folder)


def test_test_questions_give_a_file_and_no_accuracy(run, tmp_path, monkeypatch):
    options, task = write_test(tmp_path), TASKS["vqav2_test"]
    monkeypatch.setattr(prompts, "write", says := Says(["ball", "2", "yes"]))
    lines = answered(task, run, options)
    assert [f.name for f in task.figures(lines)] == ["answered"] and len(
        says.prompts
    ) == 3  # no blind questions, since nothing compares with them
    task.export(lines, options, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())[2] == {"question_id": 30, "answer": "yes"}


def test_evalai_gets_all_questions_or_none(run, tmp_path, capsys):
    options, task = write_test(tmp_path), TASKS["vqav2_test"]
    task.export([Line("10", "", {}, {"text": "x"}, "x", {})], replace(options, limit=1), tmp_path)
    task.export([Line("10", "", {}, {"problem": "no image"}, None, {})], options, tmp_path)
    assert not (tmp_path / "results.json").exists()
    assert capsys.readouterr().err.count("EvalAI wants the answers to all questions") == 2


@given(st.text(max_size=30))
def test_an_answer_is_one_line_without_a_final_full_stop(text):
    answer = questions.short(text)
    assert answer == answer.strip() and len(answer.splitlines()) <= 1 and answer in text


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [World(), World.rich()])
def test_all_captions_of_a_scene_are_true_and_different(world):
    for scene in scenes(world, 0, 60, test=True):
        captions = true_captions(scene)
        assert captions[0] == scene.caption() and len(set(captions)) == len(captions)
        for text in captions:
            said = parse_caption(text, world)
            wrong = {name for name, value in facts(scene).items() if facts(said).get(name) != value}
            assert wrong <= {"background"}
        n_orders = 2 if scene.relation else 6 if len(set(scene.things)) == 3 else 1
        assert len(captions) == 2 * n_orders
        assert sum(score_caption(text, scene, world) == 1 for text in captions) == n_orders


@pytest.mark.parametrize("name", ["shapes_captions", "shapes_questions"])
def test_who_says_the_truth_about_shapes_reaches_the_ceiling(run, tmp_path, monkeypatch, name):
    task, options = TASKS[name], Options(world=World(), limit=30)
    monkeypatch.setattr(prompts, "write", Says([item.content["references"][0] for item in task.read(options)]))
    monkeypatch.setattr(shapes_tasks, "render_all", lambda run, docs: [
        [run.vocab.bos, *[run.vocab.boi] * (len(doc) > 2)] for doc in docs
    ])  # fmt: skip
    lines = answered(task, run, options)
    assert all(f.value == pytest.approx(f.ceiling) and f.baseline < 0.6 * f.value for f in task.figures(lines)[:2])


def test_shapes_need_a_model_of_the_shapes_world():
    for name in ("shapes_captions", "shapes_questions"):
        with pytest.raises(UserError, match=r"the model knows no shapes world"):
            TASKS[name].read(Options())
        assert len(TASKS[name].read(Options(world=World()))) == 400
        few = TASKS[name].read(Options(world=World(), limit=5))
        assert few == TASKS[name].read(Options(world=World(), limit=9))[:5]


def test_shapes_questions_have_the_types_of_vqa():
    items = TASKS["shapes_questions"].read(Options(world=World(), limit=60))
    assert all(len(item.content["references"]) == 10 for item in items)
    answers = {
        kind: {i.content["references"][0] for i in items if i.group == kind} for kind in {i.group for i in items}
    }
    assert answers.keys() == {"yes/no", "number", "other"} and answers["yes/no"] == {"yes", "no"}
    assert answers["number"] <= set(NUMBERS) and answers["other"].isdisjoint({"yes", "no", *NUMBERS})


def test_chance_is_a_guess_among_the_answers_of_a_type():
    given = [("yes/no", "yes"), ("yes/no", "no"), ("yes/no", "no"), ("number", "one")]
    scene = {"background": "white", "things": [], "cells": [], "relation": None}
    lines = [
        Line(str(i), kind, {"references": [text] * 10, "question": "?", "scene": scene, "world": {}}, {}, text,
             {"acc": 1.0, "acc_blind": 0.0})
        for i, (kind, text) in enumerate(given)
    ]  # fmt: skip
    chances = {figure.name: figure.chance for figure in shapes_tasks.question_figures(lines)}
    assert chances == {"acc": 2.5 / 4, "acc, number": 1, "acc, yes/no": 0.5, "always 'no'": None}
