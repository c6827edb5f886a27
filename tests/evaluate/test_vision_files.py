"""The published files of captions and questions are read whole; what is wrong with one is said in one sentence."""

import json
import sys
from pathlib import Path

import pytest
from vision_sets import (
    ANSWERS,
    CAPTIONS,
    TRAINING,
    coco_content,
    write_blip,
    write_coco,
    write_flickr,
    write_image,
    write_json,
    write_questions,
    write_vizwiz,
    write_vqa,
)

from nanochameleon.errors import UserError
from nanochameleon.evaluate.vision import files
from nanochameleon.evaluate.vision.files import find_image, is_there


@pytest.mark.parametrize(
    ("write", "read"), [(write_coco, files.coco), (write_blip, files.coco), (write_flickr, files.flickr30k)]
)
def test_captions_keep_all_references_as_written(tmp_path, write, read):
    write(tmp_path)
    test, training = read(tmp_path, True)
    assert {each.id: list(each.references) for each in test} == {str(n): texts for n, texts in CAPTIONS.items()}
    assert {each.id: list(each.references) for each in training} == {str(n): texts for n, texts in TRAINING.items()}
    assert all(is_there(tmp_path, each.image) for each in test + training)


@pytest.mark.parametrize(
    ("write", "read"),
    [(write_vqa, files.vqav2), (lambda folder: write_vqa(folder, ""), files.okvqa), (write_vizwiz, files.vizwiz)],
)
def test_questions_have_their_ten_answers_and_a_type(tmp_path, write, read):
    write(tmp_path)
    asked, training = read(tmp_path, True)
    assert [(each.question, list(each.references), each.answer_type) for each in asked] == list(ANSWERS.values())
    assert len(training) == 4 and all(is_there(tmp_path, each.image) for each in asked + training)
    assert read(tmp_path, False) == (asked, [])  # without examples no training file is wanted


def test_annotations_are_joined_by_id_and_not_by_order(tmp_path):
    questions = write_vqa(tmp_path)
    content = json.loads(questions.read_text())
    content["questions"].reverse()
    questions.write_text(json.dumps(content))
    assert [list(each.references) for each in files.vqav2(tmp_path, False)[0]] == [
        answers for _, answers, _ in reversed(ANSWERS.values())
    ]


@pytest.mark.parametrize("split", ["test2015", "test-dev2015"])
def test_test_questions_have_no_answers_and_images_of_test2015(tmp_path, split):
    write_questions(tmp_path, "v2_", split, ANSWERS, annotated=False)
    asked, _ = files.vqav2_test(tmp_path, False)
    assert [each.id for each in asked] == ["10", "20", "30"] and not any(each.references for each in asked)
    assert asked[0].image == "test2015/COCO_test2015_000000000001.jpg"


def test_equal_answers_are_one_text_in_memory(tmp_path):
    write_vqa(tmp_path)
    texts = [text for each in files.vqav2(tmp_path, False)[0] for text in each.references]
    assert len({id(text) for text in texts}) == len(set(texts)) and texts[0] is sys.intern("ball")


@pytest.mark.parametrize(
    "place", ["val2014/1.jpg", "images/val2014/1.jpg", "coco/val2014/1.jpg", "images/1.jpg", "1.jpg"]
)
def test_images_are_found_where_archives_put_them(tmp_path, place):
    write_image(tmp_path / place, 0)
    assert find_image(tmp_path, "val2014/1.jpg") == tmp_path / place


def test_no_image_is_read_from_outside_of_the_folder(tmp_path):
    write_image(tmp_path / "secret.jpg", 0)
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "val2014/../../secret.jpg"):
        with pytest.raises(UserError, match=r"names must stay inside"):
            find_image(tmp_path / "data", name)


@pytest.mark.parametrize("name", ["x" * 5_000, "\ud800.jpg", "", ".", "val2014", "con\n.jpg"])
def test_an_odd_name_is_an_image_that_is_not_there(tmp_path, name):
    (tmp_path / "val2014").mkdir()
    with pytest.raises(UserError, match=r"^image .* is not in ") as error:
        find_image(tmp_path, name)
    assert str(error.value).isprintable() and not is_there(tmp_path, name)


# ---------------------------------------------------------------------------------------------------------------------
# What a user can get wrong: one sentence that names the file and the entry


def changed(change) -> dict:
    content = coco_content()
    change(content["images"][1])
    return content


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "dataset_coco.json does not hold an object"),
        ({"images": []}, "dataset_coco.json has no image of the split 'test'"),
        ({"annotations": []}, "dataset_coco.json has no 'images': it must be a list"),
        ({"images": ["x"]}, "dataset_coco.json: image 1 is not an object"),
        (changed(lambda row: row.update(split=3)), "dataset_coco.json: image 2 has 3 as 'split'"),
        (changed(lambda row: row.update(filepath=None)), "dataset_coco.json: image 2 has null as 'filepath'"),
        (changed(lambda row: row.update(sentences=[])), "image 2 has 'sentences' without texts"),
        (changed(lambda row: row["sentences"][0].pop("raw")), "image 2 has 'sentences' without texts"),
        (changed(lambda row: row.update(cocoid=1)), "image 2 has the id '1', as .*: image 1 has"),
    ],
)
def test_a_wrong_file_of_captions(tmp_path, content, sentence):
    write_json(tmp_path / "dataset_coco.json", content)
    with pytest.raises(UserError, match=sentence) as error:
        files.coco(tmp_path, False)
    assert "\n" not in str(error.value)


def drop(path: Path, name: str, number: int) -> None:
    content = json.loads(path.read_text())
    del content[name][number]
    path.write_text(json.dumps(content))


def double(path: Path, name: str) -> None:
    content = json.loads(path.read_text())
    content[name].append(content[name][0])
    path.write_text(json.dumps(content))


def test_a_question_without_annotation(tmp_path):
    write_vqa(tmp_path)
    drop(tmp_path / "v2_mscoco_val2014_annotations.json", "annotations", 1)
    with pytest.raises(UserError, match=r"questions.json: question 2 has the question_id 20, which .*annotations.json"):
        files.vqav2(tmp_path, False)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("v2_OpenEnded_mscoco_val2014_questions.json", "questions"),
        ("v2_mscoco_val2014_annotations.json", "annotations"),
    ],
)
def test_ids_must_differ(tmp_path, name, field):
    write_vqa(tmp_path)
    double(tmp_path / name, field)
    with pytest.raises(UserError, match=f"{name}: {field[:-1]} 4 has the id '10', as .*{field[:-1]} 1 has"):
        files.vqav2(tmp_path, False)


@pytest.mark.parametrize(
    ("data", "sentence"), [(b"", "is empty"), (b'{"questions": [{', "is not JSON"), (b"\xff\xfe1", "is not UTF-8")]
)
def test_a_file_that_holds_nothing_or_is_cut_off(tmp_path, data, sentence):
    write_vqa(tmp_path).write_bytes(data)
    with pytest.raises(UserError, match=f"v2_OpenEnded_mscoco_val2014_questions.json {sentence}"):
        files.vqav2(tmp_path, False)


def test_an_answer_that_is_no_text(tmp_path):
    path = write_vizwiz(tmp_path)
    content = json.loads(path.read_text())
    content[2]["answers"][4]["answer"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"val.json: question 3 has 'answers' without texts"):
        files.vizwiz(tmp_path, False)


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--data is missing: give the folder that holds dataset_flickr30k.json"):
        files.flickr30k(None, True)
    with pytest.raises(UserError, match=r"has no dataset_coco.json and no coco_karpathy_test.json"):
        files.coco(tmp_path, True)
    write_vqa(tmp_path)
    (tmp_path / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(UserError, match=r"has no v2_mscoco_train2014_annotations.json"):
        files.vqav2(tmp_path, True)


def test_a_broken_file_of_many_lines_is_named_with_its_line(tmp_path):
    path = write_coco(tmp_path)
    path.write_text(json.dumps(coco_content(), indent=1).replace('"split": "test"', '"split" "test"', 1))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if '"split" "test"' in text)
    with pytest.raises(UserError, match=rf"dataset_coco.json is not JSON \(Expecting ':' delimiter, line {line}, char"):
        files.coco(tmp_path, False)
