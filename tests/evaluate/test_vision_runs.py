"""Tasks about images as the command runs them: what is bad is named and counted, and all else is evaluated."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_run
from vision_sets import coco_name, write_coco, write_flickr, write_vqa

from nanochameleon.errors import UserError
from nanochameleon.evaluate.compare import compare_task
from nanochameleon.evaluate.runner import evaluate
from nanochameleon.evaluate.task import Line, Options
from nanochameleon.evaluate.tasks import TASKS

BY_NAME = {task.name: task for task in TASKS}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_model(max_seq_len=512))


def run_tasks(model: Path, folder: Path, *names: str, **options) -> dict:
    """Evaluate as the command does. Returns the tasks of results.json."""
    out = folder / "out"
    try:
        evaluate(model, [BY_NAME[name] for name in names], Options(data=folder, out=out, **options), "cpu")
    finally:
        content = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else {}
    return content["tasks"]


def tasks_of(folder: Path) -> dict:
    return json.loads((folder / "out" / "results.json").read_text())["tasks"]


def test_an_image_that_is_missing_is_left_out_counted_and_named_at_the_end(model, tmp_path):
    write_coco(tmp_path)
    name = coco_name("val2014", 2)
    (tmp_path / "val2014" / name).unlink()
    with pytest.raises(UserError, match=rf"image val2014/{name} is not in "):
        run_tasks(model, tmp_path, "coco")
    found = tasks_of(tmp_path)["coco"]
    assert (found["items"], found["left_out"], found["figures"][0]["n"]) == (3, 1, 2)
    results = json.loads((tmp_path / "out" / "coco" / "results.json").read_text())
    assert [row["image_id"] for row in results] == [1, 3]


def test_a_broken_file_stops_its_own_task_alone(model, tmp_path, capsys):
    write_flickr(tmp_path)
    write_vqa(tmp_path).write_text('{"questions": [')
    where = r"v2_OpenEnded_mscoco_val2014_questions.json is not JSON \(.*, character 16\)"
    with pytest.raises(UserError, match=where):
        run_tasks(model, tmp_path, "vqav2", "flickr30k")
    assert tasks_of(tmp_path).keys() == {"flickr30k"}
    assert "vqav2 is left out" in capsys.readouterr().err


def test_too_many_examples_are_refused_before_an_image_is_read(model, tmp_path, monkeypatch):
    write_coco(tmp_path)
    small = tiny_run(tmp_path / "small", tiny_model(max_seq_len=50))
    monkeypatch.setattr(
        "nanochameleon.evaluate.vision.prompts.encode_images", lambda *_: pytest.fail("an image was read")
    )
    with pytest.raises(UserError, match=r"3 examples make 4 images of 6 tokens .* context has 50: use --shots 2"):
        run_tasks(small, tmp_path, "coco", shots=3)


def test_the_same_questions_get_the_same_answers_whatever_their_chunk(model, tmp_path):
    write_vqa(tmp_path)
    whole = run_tasks(model, tmp_path, "vqav2")["vqav2"]["figures"]
    lines = (tmp_path / "out" / "vqav2" / "items.jsonl").read_text()
    few = Options(data=tmp_path, out=tmp_path / "few", limit=1)
    evaluate(model, [BY_NAME["vqav2"]], few, "cpu")
    assert whole[0]["n"] == 3
    assert (tmp_path / "few" / "vqav2" / "items.jsonl").read_text() == lines.splitlines(keepends=True)[0]


def test_captions_of_two_models_are_compared_image_by_image_over_those_that_both_saw():
    references = [["a b c d"], ["e f g h"], ["i j k l"], ["m n o p"]]
    said = ["a b c d", "e f", "nothing", "m n o p"], ["a b", "e f g h", "i j k l", "?"]
    a, b = (
        [
            Line(str(i), "", {"references": texts}, {}, text, {})
            for i, (texts, text) in enumerate(zip(references, each, strict=True))
        ]
        for each in said
    )
    b[3] = replace(b[3], output={"problem": "no image"})
    [row] = compare_task("coco", a, b)
    assert (row["metric"], row["n"], row["b"], row["only in a"]) == ("CIDEr-D", "3", "767.9", "1")  # 10, 10, 3.0376
    assert (row["better in a"], row["better in b"]) == ("1", "2")
