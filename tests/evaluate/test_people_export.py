"""What is exported can be read back, says who is better from any side, and starts no formula."""

import csv
import io
import json

import pytest
from small_studies import MODELS, pairs, prompts, side_of, small_study

from nanochameleon.errors import UserError
from nanochameleon.evaluate.human import Votes, next_question
from nanochameleon.evaluate.people.export import as_csv, as_jsonl, as_labelstudio, as_lmsys, read_jsonl
from nanochameleon.evaluate.people.make import build
from nanochameleon.evaluate.people.study import open_key

A, B = MODELS


@pytest.fixture
def voted(tmp_path):
    """ann finds A better everywhere, bob finds none better, -e finds B better; an undo and checks are in it."""
    study, key = small_study(tmp_path / "study", 4, duplicates=0.1, attention=1)
    votes = Votes(study)
    for item in pairs(study):
        if item.id not in key.attention:
            votes.cast("ann", item.id, "preference", side_of(study, key, "ann", item, A), 2.5)
            votes.cast("bob", item.id, "preference", "same", 1.5)
            votes.cast("-e", item.id, "preference", side_of(study, key, "-e", item, B), 0.5)
    while asked := next_question(study, votes, "ann"):
        votes.cast("ann", asked.item, asked.question.name, list(asked.question.labels)[-1], 1.0)
    votes.undo("ann")
    return study, key, votes


def test_json_lines_are_read_back_once(voted, tmp_path):
    study, _, votes = voted
    (tmp_path / "votes.jsonl").write_text(as_jsonl(votes.log()))
    read = read_jsonl(tmp_path / "votes.jsonl")
    assert read == votes.log() and "model" not in as_jsonl(votes.log())
    assert set(json.loads(as_jsonl(votes.log()).splitlines()[0])) == {
        "study", "item", "question", "annotator", "order", "answer", "seconds", "time", "version",
    }  # fmt: skip
    assert votes.add(read) == 0
    before = votes.current_votes()
    votes.db.execute("DELETE FROM votes")
    fresh = Votes(study)
    assert fresh.add(read) == len(read) and sorted(fresh.current_votes(), key=str) == sorted(before, key=str)


def test_a_vote_that_cannot_be_is_named_with_its_line(voted, tmp_path):
    _, _, votes = voted
    wrong = json.loads(as_jsonl(votes.log()[1:2])) | {"answer": "maybe"}
    (tmp_path / "votes.jsonl").write_text(as_jsonl(votes.log()[:1]) + "\n" + json.dumps(wrong))
    with pytest.raises(UserError, match="jsonl:3: the vote says 'maybe'"):
        read_jsonl(tmp_path / "votes.jsonl", votes.check)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "jsonl:2 is not JSON"),
        ("[1]", "jsonl:2 is not a JSON object"),
        ('{"study": 3}', "jsonl:2 has 3 as 'study': it must be a text"),
        ("{}", "jsonl:2 has no 'study'"),
    ],
)
def test_a_broken_line_is_one_sentence_with_its_place(voted, tmp_path, line, sentence):
    _, _, votes = voted
    (tmp_path / "votes.jsonl").write_text(as_jsonl(votes.log()[:1]) + line + "\n")
    with pytest.raises(UserError, match=sentence.replace("[", r"\[")):
        read_jsonl(tmp_path / "votes.jsonl")


def test_csv_says_who_is_better_and_starts_no_formula(voted):
    study, key, votes = voted
    rows = list(csv.DictReader(io.StringIO(as_csv(study, key, votes.current_votes()))))
    assert len(rows) == len(votes.current_votes())
    pair_rows = [row for row in rows if row["question"] == "preference" and row["kind"] == "study"]
    assert {(row["annotator"], row["meaning"]) for row in pair_rows} == {("ann", A), ("bob", "tie"), ("'-e", B)}
    for row in pair_rows:
        better = {"first": row["left"], "second": row["right"], "same": "tie"}[row["answer"]]
        assert better == row["meaning"] and {row["left"], row["right"]} == {A, B}
        assert row["task_type"] == ("Advice" if row["prompt"] in ("q0", "q1") else "Story")
    assert {row["kind"] for row in rows} == {"study", "duplicate", "attention"}
    assert not any(cell.startswith(tuple("=+-@")) for row in rows for cell in row.values())


def test_battles_have_the_arenas_fields(voted):
    study, key, votes = voted
    battles = [json.loads(line) for line in as_lmsys(study, key, votes.current_votes()).splitlines()]
    assert len(battles) == 12  # 4 prompts and 3 people, without checks
    fields = "question_id model_a model_b winner judge conversation_a conversation_b turn anony language tstamp"
    for battle in battles:
        assert set(battle) == set(fields.split())
        better = {"model_a": battle["model_a"], "model_b": battle["model_b"]}.get(battle["winner"], "tie")
        assert better == {"ann": A, "bob": "tie", "-e": B}[battle["judge"]]
        number = battle["question_id"][1:]
        for side in "ab":
            user, assistant = battle[f"conversation_{side}"]
            assert (user["role"], user["content"]) == ("user", f"please do {number}")
            assert (assistant["role"], assistant["content"]) == ("assistant", f"text {number}")


def test_label_studio_gets_one_task_an_item_with_everybodys_annotations(voted):
    study, key, votes = voted
    tasks = json.loads(as_labelstudio(study, key, votes.current_votes()))
    assert len(tasks) == 12  # 8 answers and 4 pairs
    for task in tasks:
        data, results = task["data"], [result for a in task["annotations"] for result in a["result"]]
        if "left" not in data:
            assert {result["type"] for result in results} == {"choices"} and data["answer_model"] in MODELS
            continue
        said = {}
        for result in results:
            name = result["meta"]["text"][0]
            chosen = result["value"].get("selected") or result["value"]["choices"][0]
            said[name] = "tie" if chosen == "same" else data[f"{chosen}_model"]
        assert said == {"ann": A, "bob": "tie", "-e": B}


def test_images_keep_their_places_in_exports(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    answer = [{"text": "see "}, {"image": str(tmp_path / "red.png")}, {"text": " there"}]
    study = build(tmp_path / "s", prompts(1), {A: [answer], B: [answer]}, questions="relative", duplicates=0)
    key, votes = open_key(tmp_path / "s"), Votes(study)
    (item,) = [item for item in pairs(study) if key.counts(item)]
    votes.cast("ann", item.id, "preference", "same", 1.0)
    battle = json.loads(as_lmsys(study, key, votes.current_votes()))
    message = battle["conversation_a"][1]
    assert message["content"] == "see <img> there" and len(message["images"]) == 1
    assert (tmp_path / "s" / message["images"][0]).is_file()
    (task,) = json.loads(as_labelstudio(study, key, votes.current_votes()))
    assert task["data"]["left"] == "see <img> there" and len(task["data"]["left_images"]) == 1
