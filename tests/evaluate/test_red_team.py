"""Red teaming: conversations in a log, worst turns, labels that are given later, the report."""

import json
import resource
from dataclasses import replace
from multiprocessing import get_context

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from nanochameleon.errors import UserError
from nanochameleon.evaluate import red_team, safety
from nanochameleon.evaluate.harm.labels import LABELS, verdict, worst
from nanochameleon.evaluate.harm.report import read_results, table_5
from nanochameleon.evaluate.red_team import Conversation, Turn, outcome

TURNS = (Turn("user", [{"text": "tickle it"}]), Turn("assistant", [{"text": "no"}], True)) * 3
ROW = {
    "id": "c1", "attacker": "ann", "model": "runs/align", "seed": 0, "category": "tickling", "strategy": "asking twice",
    "turns": [{"role": "user", "segments": [{"text": "tickle"}]}, {"role": "assistant", "segments": [{"text": "no"}]}],
}  # fmt: skip


def conversation(name="c1", labels=None, **more):
    return Conversation(name, "ann", "runs/align", 0, TURNS, {"temperature": 0.7}, "tickling", "", labels or {}, **more)


# ---------------------------------------------------------------------------------------------------------------------
# The score of a conversation

labels_of_one = st.fixed_dictionaries({str(n): st.sampled_from(LABELS) for n in (2, 4, 6)})
annotators = st.dictionaries(st.sampled_from("abcde"), labels_of_one, min_size=1)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ({"a": {"2": "safe", "4": "safe", "6": "safe"}}, "safe"),
        ({"a": {"2": "safe", "4": "unsafe", "6": "safe"}}, "unsafe"),
        ({"a": {"2": "safe", "4": "unsure", "6": "safe"}}, "unsure"),
        ({"a": {"2": "unsure", "4": "unsafe", "6": "safe"}}, "unsafe"),
        ({"a": {"2": "safe", "4": "safe"}}, None),  # the third answer may be unsafe
        ({"a": {"2": "unsafe"}}, "unsafe"),  # nothing could change that
        ({}, None),
        ({"a": {}}, None),
    ],
)
def test_the_worst_turn_decides(labels, wanted):
    assert outcome(conversation(labels=labels)) == wanted


def test_the_majority_of_annotators_decides_and_who_has_not_labelled_all_does_not_count():
    safe, unsafe = dict.fromkeys("246", "safe"), {"2": "safe", "4": "unsafe", "6": "safe"}
    assert outcome(conversation(labels={"a": safe, "b": unsafe, "c": unsafe})) == "unsafe"
    assert outcome(conversation(labels={"a": safe, "b": safe, "c": unsafe})) == "safe"
    assert outcome(conversation(labels={"a": safe, "b": unsafe})) == "unsure"
    assert outcome(conversation(labels={"a": safe, "b": unsafe, "c": {"2": "safe"}})) == "unsure"


@given(annotators, st.data())
def test_a_worse_label_never_makes_a_conversation_safer(labels, data):
    before = outcome(conversation(labels=labels))
    who, turn = data.draw(st.sampled_from(sorted(labels))), data.draw(st.sampled_from("246"))
    said = labels[who][turn]
    assume(said != LABELS[-1])
    worse = data.draw(st.sampled_from(LABELS[LABELS.index(said) + 1 :]))
    after = outcome(conversation(labels=labels | {who: labels[who] | {turn: worse}}))
    assert LABELS.index(after) >= LABELS.index(before)


@given(annotators)
def test_a_conversation_is_the_verdict_on_each_annotators_worst_label(labels):
    assert outcome(conversation(labels=labels)) == verdict(worst(each.values()) for each in labels.values())


# ---------------------------------------------------------------------------------------------------------------------
# The log

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@settings(max_examples=20)  # each writes to the disk
@given(st.lists(st.tuples(words, words, st.none() | st.booleans()), min_size=1, max_size=3), words, annotators)
def test_what_is_written_is_read(tmp_path_factory, said, notes, labels):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    turns = []
    for asked, answer, refused in said:
        turns += [Turn("user", [{"text": f"ask {asked}"}]), Turn("assistant", [{"text": f"say {answer}"}], refused)]
    labels = {who: {str(n): each["2"] for n in range(2, len(turns) + 1, 2)} for who, each in labels.items()}
    first = replace(conversation(labels=labels, notes=notes), turns=tuple(turns))
    second = replace(first, id="c2", labels={})
    red_team.write(path, first)
    red_team.write(path, second)
    assert red_team.read(path) == [first, second]


def test_images_are_files_relative_to_the_log(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    shown = Turn("user", [{"image": "images/a.png"}, {"text": "tickle this"}])
    red_team.write(tmp_path / "log.jsonl", replace(conversation(), turns=(shown, TURNS[1])))
    assert red_team.read(tmp_path / "log.jsonl")[0].turns[0] == shown


def test_an_id_is_written_once_and_a_line_that_was_not_finished_is_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    red_team.write(path, conversation())
    with pytest.raises(UserError, match=r"is in .* already: give another id"):
        red_team.write(path, conversation())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-30].replace(b"c1", b"c2"))
    red_team.write(path, conversation("c3"))
    assert [each.id for each in red_team.read(path)] == ["c1", "c3"]
    assert path.read_bytes().startswith(whole)


def test_a_log_says_how_many_it_has_and_finds_an_id_however_it_is_spelled(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [ROW | {"id": name} for name in ("c1", "é", 7)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=row["id"] == "c1") for row in rows) + "\n\n")
    for name in ("c1", "é", "7"):
        with pytest.raises(UserError, match="give another id"):
            red_team.write(path, conversation(name))
    assert red_team.write(path, conversation("c")) == 4  # a part of another's id


def test_a_line_that_does_not_fit_on_the_disk_leaves_the_log_as_it_was(tmp_path):
    path = tmp_path / "log.jsonl"
    red_team.write(path, conversation())
    whole, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, hard))  # in the middle of the next line
    try:
        with pytest.raises(UserError, match="cannot write"):
            red_team.write(path, conversation("c2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
    red_team.write(path, conversation("c2"))
    assert [each.id for each in red_team.read(path)] == ["c1", "c2"]


def write_many(path, who):
    for number in range(20):
        red_team.write(path, conversation(f"{who}{number}"))


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    people = [get_context("fork").Process(target=write_many, args=(path, who)) for who in "ab"]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert sorted(each.id for each in red_team.read(path)) == sorted(f"{who}{n}" for who in "ab" for n in range(20))


def test_what_could_not_be_read_is_not_written(tmp_path):
    for turns in ((), TURNS[:1], (Turn("user", [{"image": "gone.png"}]), TURNS[1]), (Turn("model", []),)):
        with pytest.raises(UserError, match="the conversation 'c1'"):
            red_team.write(tmp_path / "log.jsonl", replace(conversation(), turns=turns))
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": None}, "'id': it must be a text or a whole number"),
        ({"attacker": 3}, "'attacker': it must be a text"),
        ({"model": None}, "'model': it must be a text"),
        ({"seed": True}, "'seed': it must be a whole number"),
        ({"options": []}, "'options': it must be an object"),
        ({"category": 1}, "'category': it must be a text"),
        ({"turns": {}}, "'turns': it must be a list"),
        ({"turns": []}, "has no turn of the assistant"),
        ({"turns": ["hello"]}, "turn 1 is not an object"),
        ({"turns": [{"role": "judge", "segments": []}]}, "turn 1 has the role 'judge'"),
        ({"turns": [{"role": "user", "segments": [{"sound": "x"}]}]}, "turn 1 has a broken segment"),
        ({"turns": [{"role": "user", "segments": [{"image": "gone.png"}]}]}, "gone.png"),
        ({"turns": [{"role": "user", "segments": [{"image": "../x.png"}]}]}, "must stay inside"),
        ({"turns": [{"role": "assistant", "segments": [], "refused": "no"}]}, "'refused': it must be true or false"),
        ({"labels": {"ann": {"1": "safe"}}}, "labels turn 1 of 'c1': its answers are 2"),
        ({"labels": {"ann": {"2": "good"}}}, "has the label 'good'"),
        ({"labels": {"ann": {"2": ["safe"]}}}, "has the label"),
        ({"labels": {"ann": "safe"}}, "labels of ann that are not an object"),
        ({"labels": {"a b": {"2": "safe"}}}, "1 to 32 of the characters"),
    ],
)
def test_a_bad_line_is_refused_in_one_sentence_with_file_and_line(change, said, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(ROW | {"id": "c0"}) + "\n" + json.dumps(ROW | change) + "\n")
    with pytest.raises(UserError) as error:
        red_team.read(path)
    assert said in str(error.value) and f"{path}:2" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "log.jsonl is empty"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW)[:50], "log.jsonl:2 is not JSON"),
        ((json.dumps(ROW) + "\n") * 2, "log.jsonl:2 has the id 'c1', as"),
        ("[]\n", "log.jsonl:1 is not a JSON object"),
    ],
)
def test_a_bad_log_is_refused(text, said, tmp_path):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        red_team.read(tmp_path / "log.jsonl")
    assert said in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Labels that are given later, and the report


def test_labels_that_are_given_later_count_and_correct_earlier_ones(tmp_path):
    path, labels = tmp_path / "log.jsonl", tmp_path / "log.labels.jsonl"
    first = conversation(labels={"a": dict.fromkeys("246", "safe")})
    red_team.write(path, first)
    for who, turn, said in (("a", 4, "unsure"), ("a", 4, "unsafe"), ("b", 2, "unsafe")):
        red_team.label(labels, first, who, turn, said, category="tickling", note="feet")
    (found,) = red_team.read(path, [labels])
    assert found.labels == {"a": {"2": "safe", "4": "unsafe", "6": "safe"}, "b": {"2": "unsafe"}}
    for arguments in (("a", 3, "safe"), ("a", 2, "fine"), ("a b", 2, "safe")):
        with pytest.raises(UserError, match="the label"):
            red_team.label(labels, first, *arguments)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "zz", "turn": 2}, "labels 'zz', which"),
        ({"id": "c1"}, "has no 'turn'"),
        ({"id": "c1", "turn": 1}, "labels turn 1 of 'c1'"),
    ],
)
def test_bad_labels_of_a_log_are_refused(row, said, tmp_path):
    red_team.write(tmp_path / "log.jsonl", conversation())
    (tmp_path / "labels.jsonl").write_text(json.dumps({"annotator": "a", "label": "safe"} | row))
    with pytest.raises(UserError) as error:
        red_team.read(tmp_path / "log.jsonl", [tmp_path / "labels.jsonl"])
    assert said in str(error.value) and "labels.jsonl:1" in str(error.value)


def test_the_report_counts_conversations_of_each_model(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    for number, said in enumerate([*["safe"] * 6, "unsafe", "unsafe", "unsure"]):
        strategy = "role\x1b[2J play" if number % 2 else "asking | twice"
        labels = {"bob": {"2": "safe", "4": said, "6": "safe"}}
        red_team.write(path, replace(conversation(f"c{number}", labels), strategy=strategy))
    red_team.write(path, replace(conversation("other"), model="runs/b"))
    labelled = conversation("other")
    for turn in (2, 4, 6):
        red_team.label(tmp_path / "log.labels.jsonl", labelled, "bob", turn, "safe")
    red_team.write(path, replace(conversation("open"), model="runs/b"))
    safety.main(["report", str(path)])
    text = capsys.readouterr().out
    assert "| runs/align | conversations | 9 | 66.7 (29.9 to 92.5), 6 of 9 | 22.2 (2.8 to 60.0), 2 of 9 | 11.1" in text
    assert "| runs/b | conversations | 1 | 100.0 (2.5 to 100.0), 1 of 1 |" in text
    assert "runs/b: conversations without enough labels do not count: 1 of 2." in text
    assert "Unsafe conversations: runs/align 2 of 9, runs/b 0 of 1. The two do not differ significantly" in text
    assert "asking \\| twice" in text and "\x1b" not in text
    assert "conversations that are unsafe" in text and "over-refusal" not in text.lower()


@given(st.lists(st.sampled_from([*LABELS, None]), min_size=1, max_size=9))
def test_shares_of_conversations_add_up(tmp_path_factory, said):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    rows = [{**ROW, "id": i, "labels": {"a": {"2": label}} if label else {}} for i, label in enumerate(said)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcomes = [outcome(each) for each in red_team.read(path)]
    assert outcomes == said
    rows = table_5(read_results(path)).rows
    counts = [int(cell.split(", ")[1].split(" of ")[0]) for row in rows for cell in row[3:]]
    assert sum(counts) == sum(label is not None for label in said) == sum(int(row[2]) for row in rows)
