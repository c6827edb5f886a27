"""A study is blinded: nothing that an annotator's side holds says whose an answer is."""

import io
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image
from small_studies import MODELS, pairs, prompts, small_study

from nanochameleon.errors import UserError
from nanochameleon.evaluate.human import Votes, next_question, open_study
from nanochameleon.evaluate.people import make, terminal
from nanochameleon.evaluate.people.make import build
from nanochameleon.evaluate.people.study import open_key, write_json


def image_answers(folder) -> dict[str, list]:
    """One model draws small JPEG files, the other large PNG files with a comment."""
    from PIL.PngImagePlugin import PngInfo

    comment = PngInfo()
    comment.add_text("Software", MODELS[1])
    Image.new("RGB", (40, 30), "red").save(folder / f"{MODELS[0]}.jpg")
    Image.new("RGB", (600, 600), "blue").save(folder / f"{MODELS[1]}.png", pnginfo=comment)
    files = {MODELS[0]: folder / f"{MODELS[0]}.jpg", MODELS[1]: folder / f"{MODELS[1]}.png"}
    return {model: [[{"text": "here:"}, {"image": str(file)}]] * 2 for model, file in files.items()}


def test_nothing_on_the_annotators_side_names_a_model_a_path_or_a_prompts_id(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    asked = [replace(prompt, id=f"id-of-the-owner-{prompt.id}") for prompt in prompts(2)]
    study = build(folder, asked, image_answers(tmp_path), duplicates=0.5)
    votes = Votes(study)
    for keys in ("1\n2\n" * 50, "2\n1\n" * 50):
        monkeypatch.setattr("sys.stdin", io.StringIO(keys))
        terminal.annotate(folder, "ann" if keys[0] == "1" else "bob")
    printed = capsys.readouterr().out.replace(str(folder), "")
    files = [path for path in folder.rglob("*") if path.is_file() and "owner" not in path.parts]
    assert len([path for path in files if path.suffix == ".png"]) == 4
    held = {str(path.relative_to(folder)): path.read_bytes().decode("latin-1") for path in files}
    for name, text in {**held, "printed": printed, "names": " ".join(held), "log": str(votes.log())}.items():
        for secret in (*MODELS, "id-of-the-owner"):  # names of files and paths hold those of models
            assert secret not in text, f"{name} holds {secret}"
    keys_of_pages = [json.dumps(vars(next_question(study, votes, "new")), default=vars)]
    assert not any(model in page for page in keys_of_pages for model in MODELS)


def test_images_of_all_models_have_one_size_and_one_encoder(tmp_path):
    build(tmp_path / "study", prompts(2), image_answers(tmp_path))
    images = [Image.open(path) for path in (tmp_path / "study" / "shown" / "images").iterdir()]
    assert {(image.size, image.format, image.mode, str(image.info)) for image in images} == {
        ((512, 512), "PNG", "RGB", "{}")
    }


def test_neither_the_order_of_answers_nor_their_names_depend_on_the_model(tmp_path):
    (study, key), (again, _) = small_study(tmp_path / "a", 60), small_study(tmp_path / "b", 60)
    first = Counter(key.answers[item.answers[0]] for item in pairs(study))
    assert all(12 <= first[model] <= 48 for model in MODELS)  # fair coins miss this once in 200,000 times
    assert not study.answers.keys() & again.answers.keys() and not study.items.keys() & again.items.keys()
    assert list(study.answers) == sorted(study.answers) and list(study.items) == sorted(study.items)


def test_sides_are_fair_fixed_and_differ_between_annotators(tmp_path):
    study, key = small_study(tmp_path, 60)
    left = {
        name: [key.answers[study.sides(name, item)[0]] == MODELS[0] for item in pairs(study)] for name in ("ann", "bob")
    }
    assert all(12 <= sum(sides) <= 48 for sides in left.values())
    assert 12 <= sum(a != b for a, b in zip(*left.values(), strict=True)) <= 48
    same = open_study(tmp_path)
    assert all(same.sides("ann", item) == study.sides("ann", item) for item in pairs(study))
    other, _ = small_study(tmp_path / "other", 60, seed=1)
    assert other.seed == 1


def test_the_seed_decides_sides_and_order(tmp_path):
    study, _ = small_study(tmp_path, 30)
    content = json.loads((tmp_path / "shown" / "study.json").read_text())
    write_json(tmp_path / "shown" / "study.json", content | {"seed": 1})
    other = open_study(tmp_path)
    assert [i.id for i in other.order("ann")] != [i.id for i in study.order("ann")]
    assert any(other.sides("ann", item) != study.sides("ann", item) for item in pairs(study))


def test_each_annotator_meets_every_item_once_in_an_own_order_and_copies_far_apart(tmp_path):
    study, key = small_study(tmp_path, 30, duplicates=0.2, attention=2)
    orders = {name: [item.id for item in study.order(name)] for name in ("ann", "bob")}
    assert orders["ann"] != orders["bob"]
    assert len(key.duplicates) == 18 and len(key.attention) == 4  # of 90 items: 60 answers and 30 pairs
    for order in orders.values():
        assert sorted(order) == sorted(study.items)
        assert all(abs(order.index(copy) - order.index(first)) > 10 for copy, first in key.duplicates.items())


def test_a_copy_and_its_original_are_for_all_annotators_and_look_alike(tmp_path):
    study, key = small_study(tmp_path, 20, duplicates=0.1)
    for copy, first in key.duplicates.items():
        one, other = study.items[copy], study.items[first]
        assert one.for_all_annotators and other.for_all_annotators
        assert (one.prompt, one.answers) == (other.prompt, other.answers)
    plain = [item for item in study.items.values() if item.id not in {*key.duplicates, *key.duplicates.values()}]
    assert len(plain) > 40 and not any(item.for_all_annotators for item in plain)


def test_a_check_says_what_to_choose(tmp_path):
    study, key = small_study(tmp_path, attention=3)
    assert len(key.attention) == 6
    for name, right in key.attention.items():
        item = study.items[name]
        assert right.keys() == {question.name for question in study.questions(item)}
        sentence = study.prompts[item.prompt][0]["text"]
        for question in study.questions(item):
            labels = list(question.labels)
            wanted = question.labels[right[question.name]] if len(item.answers) == 2 else "the first choice"
            assert wanted in sentence and (len(item.answers) == 2 or right[question.name] == labels[0])


def test_questions_about_images_are_only_asked_of_answers_with_images(tmp_path):
    study, _ = small_study(tmp_path / "text")
    (folder := tmp_path / "files").mkdir()
    drawn = build(tmp_path / "drawn", prompts(2), image_answers(folder))
    names = {len(s.questions(i)) for s in (study, drawn) for i in s.items.values() if len(i.answers) == 1}
    assert names == {6, 8}


def test_the_first_model_against_each_other_or_every_two(tmp_path):
    answers = {name: ["x", "y"] for name in ("a", "b", "c")}
    sizes = {}
    for pairing in ("first", "all"):
        for questions in ("both", "absolute", "relative"):
            study, _ = small_study(tmp_path / pairing / questions, 2, answers, pairing=pairing, questions=questions)
            sizes[pairing, questions] = len(study.items) - len(pairs(study)), len(pairs(study))
    assert sizes == {
        ("first", "both"): (6, 4), ("first", "absolute"): (6, 0), ("first", "relative"): (0, 4),
        ("all", "both"): (6, 6), ("all", "absolute"): (6, 0), ("all", "relative"): (0, 6),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["../owner/key.json", "x.png", "/etc/passwd", "a" * 32, "A" * 32 + ".png", "a" * 32 + ".png\n", ""]
)
def test_only_names_of_images_lead_to_files(tmp_path, name):
    study, _ = small_study(tmp_path)
    with pytest.raises(UserError, match="is no image of this study"):
        study.image(name)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("shown/study.json", "{", "is not JSON"),
        ("shown/study.json", "{}", "is damaged: make the study again"),
        (
            "shown/study.json",
            '{"seed":0,"votes_per_item":3,"prompts":{},"answers":{},"items":[{"id":"a"}]}',
            "is damaged",
        ),
        ("owner/key.json", "{}", "is damaged: restore it"),
        ("owner/key.json", None, "only the owner of the study"),
        ("shown/study.json", None, "holds no study"),
    ],
)
def test_a_damaged_study_is_one_sentence(tmp_path, file, content, sentence):
    small_study(tmp_path)
    (tmp_path / file).unlink()
    if content:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        (open_study if "shown" in file else open_key)(tmp_path)


def test_a_study_is_never_overwritten(tmp_path):
    small_study(tmp_path)
    with pytest.raises(UserError, match="already holds a study"):
        small_study(tmp_path)
    (tmp_path / "shown" / "study.json").unlink()  # its votes are left
    with pytest.raises(UserError, match="already holds a study"):
        small_study(tmp_path)


def test_after_a_kill_images_are_those_of_the_answers_as_they_are_now(tmp_path, monkeypatch):
    def study_of(colour: str, **more):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "a.png")
        answers = {model: [[{"image": str(tmp_path / "a.png")}]] for model in MODELS}
        return build(tmp_path / "s", prompts(1), answers, attention=0, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make, "write_json", interrupt)
        study_of("red")
    study = study_of("blue")
    names = [segments[0]["image"] for segments in study.answers.values()]
    assert {Image.open(study.image(name)).getpixel((0, 0)) for name in names} == {(0, 0, 255)}


def interrupt(*_):
    raise KeyboardInterrupt
