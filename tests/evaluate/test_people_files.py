"""Prompts and other systems' answers from files: both forms, every mistake one sentence with its line."""

import json
from dataclasses import asdict, fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_studies import pairs, small_study

from nanochameleon.errors import UserError
from nanochameleon.evaluate.human import Votes, open_key, open_study
from nanochameleon.evaluate.people.export import read_jsonl
from nanochameleon.evaluate.people.prompts import Prompt, read_answers, read_prompts
from nanochameleon.evaluate.people.results import results
from nanochameleon.evaluate.people.votes import Vote

PAPER = [
    {"id": 5, "prompt": "<img> or <img>?", "task_type": "Comparison", "image_urls": ["https://a.org/x/a%20b.png?w=3",
                                                                                    "http://a.org/c.png"]},
    {"id": 6, "prompt": "words alone", "task_type": "", "image_urls": []},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in ("a b.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def write(folder, *rows, name="prompts.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_the_papers_form_is_cut_at_its_marks(folder):
    expected = [
        Prompt("5", "Comparison", [{"image": str(folder / "a b.png")}, {"text": " or "},
                                   {"image": str(folder / "c.png")}, {"text": "?"}]),
        Prompt("6", "unnamed", [{"text": "words alone"}]),
    ]  # fmt: skip
    assert read_prompts(write(folder, *PAPER), None) == expected
    as_list = write(folder, json.dumps(PAPER), name="prompts.json")
    assert read_prompts(as_list, None) == expected
    assert read_prompts(as_list, None, limit=1) == expected[:1]


def test_images_may_have_a_folder_of_their_own(folder, tmp_path):
    path = write(tmp_path, {"id": 1, "segments": [{"text": "see"}, {"text": " this: "}, {"image": "c.png"}]})
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "c.png")
    (found,) = read_prompts(path, tmp_path / "images")
    assert found.segments == [{"text": "see this: "}, {"image": str(tmp_path / "images" / "c.png")}]


GOOD = {"id": "1", "prompt": "x"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{", "is not JSON"),
        ({"prompt": "x"}, "has no 'id'"),
        ({"id": True, "prompt": "x"}, "has true as 'id'"),
        ({"id": 1, "prompt": "x"}, "has the id '1', as"),  # 1 and "1" are one id
        ({"id": 2}, "has no 'prompt'"),
        ({"id": 2, "prompt": " \n"}, "is an empty prompt"),
        ({"id": 2, "prompt": "x", "task_type": 3}, "has 3 as 'task_type'"),
        ({"id": 2, "prompt": "<img>", "image_urls": []}, "has 1 marks <img> and 0 image_urls"),
        ({"id": 2, "prompt": "x", "image_urls": ["c.png"]}, "has 0 marks <img> and 1 image_urls"),
        ({"id": 2, "prompt": "<img>", "image_urls": ["http://a.org/none.png"]}, "'none.png', which is not in"),
        ({"id": 2, "prompt": "<img>", "image_urls": ["../c.png"]}, "names must stay inside"),
        ({"id": 2, "segments": [{"text": "a", "image": "c.png"}]}, "has a broken segment"),
        ({"id": 2, "segments": ["a"]}, "has a broken segment"),
        ({"id": 2, "segments": [{"image": "/etc/passwd"}]}, "names must stay inside"),
        ({"id": 2, "segments": [{"image": 3}]}, "has 3 as 'image'"),
        ({"id": 2, "segments": [{"image": "a" * 5000}]}, "which is not in"),
        ({"id": 2, "prompt": "\ud800"}, "has half a surrogate pair"),
        ({"id": 2, "segments": {}}, "has {} as 'segments'"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_line(folder, row, sentence):
    with pytest.raises(UserError) as error:
        read_prompts(write(folder, GOOD, row), None)
    assert "prompts.jsonl:2" in str(error.value) and sentence in str(error.value)


def test_entries_of_a_list_are_named_by_number(folder):
    with pytest.raises(UserError, match=r"prompts.json, entry 2 is not a JSON object"):
        read_prompts(write(folder, "[{}, 3]", name="prompts.json"), None)


def test_answers_come_in_the_order_of_the_prompts(folder):
    asked = [Prompt(name, "x", [{"text": "?"}]) for name in ("7", "8")]
    one, other = {"id": 8, "segments": [{"image": "c.png"}, {"text": "that"}]}, {"id": "7", "segments": []}
    found = read_answers(write(folder, one, other, name="other.jsonl"), asked)
    assert found == [[], [{"image": str(folder / "c.png")}, {"text": "that"}]]
    with pytest.raises(UserError, match="has no answer to the prompt '7'"):
        read_answers(write(folder, one, name="other.jsonl"), asked)
    with pytest.raises(UserError, match=r"other.jsonl:2 has the id '8', as"):
        read_answers(write(folder, one, one, name="other.jsonl"), asked)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("c.png"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "image"]), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["id", "prompt", "task_type", "image_urls", "segments"]), anything))
def test_any_row_is_a_prompt_or_one_sentence(folder, row):
    try:
        (found,) = read_prompts(write(folder, row), None)
        assert found.segments and all(len(segment) == 1 for segment in found.segments)
    except UserError as error:
        assert "prompts.jsonl" in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([f.name for f in fields(Vote)]), anything)
def test_any_field_of_a_vote_is_good_or_refused(tmp_path, field, value):
    folder = tmp_path / "study"
    study = open_study(folder) if folder.exists() else small_study(folder, 1)[0]
    item = pairs(study)[0]
    good = Vote(study.id, item.id, "preference", "ann", item.answers, "same", 1.0, 1.0)
    path = write(tmp_path, {**asdict(good), field: value}, name="votes.jsonl")
    votes = Votes(study)
    try:
        votes.add(read_jsonl(path))
        results(study, open_key(folder), votes.current_votes(), least=1)
    except UserError:
        pass
    finally:
        votes.close()
