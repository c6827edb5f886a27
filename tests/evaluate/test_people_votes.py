"""Votes: the last one of a person counts, none is lost or doubled, and what belongs to no study is refused."""

import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_studies import pairs, small_study

from nanochameleon.errors import UserError
from nanochameleon.evaluate.human import Votes, next_question, progress, results_so_far
from nanochameleon.evaluate.people.results import ALL


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return small_study(tmp_path_factory.mktemp("study"), 3)[0]


def emptied(study) -> Votes:
    votes = Votes(study)
    votes.db.execute("DELETE FROM votes")
    return votes


people, labels = st.sampled_from(["ann", "bob", "-c_3"]), st.sampled_from(["first", "same", "second"])
acts = st.lists(st.tuples(people, st.integers(0, 2), labels) | people, max_size=25)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts)
def test_the_last_vote_of_a_person_on_an_item_counts_and_undo_takes_it_back(shared, acts):
    votes, items = emptied(shared), pairs(shared)
    expected: dict[tuple[str, str], str] = {}  # in the order of the votes
    for act in acts:
        if isinstance(act, str):
            own = [key for key in expected if key[0] == act]
            undone = votes.undo(act)
            assert (undone and undone.item) == (own[-1][1] if own else None)
            if own:
                del expected[own[-1]]
        else:
            name, number, answer = act
            changed = votes.cast(name, items[number].id, "preference", answer, 1.0)
            assert changed == (expected.get((name, items[number].id)) != answer)
            if changed:
                expected.pop((name, items[number].id), None)
                expected[name, items[number].id] = answer
    assert {(vote.annotator, vote.item): vote.answer for vote in votes.current_votes()} == expected
    for vote in votes.log():
        assert vote.order == shared.sides(vote.annotator, shared.items[vote.item])
    for name in ("ann", "bob"):
        assert {vote.item for vote in votes.current_votes(name)} == {item for who, item in expected if who == name}
        others = [{who for who, item in expected if item == i.id and who != name} for i in items]
        assert [votes.n_others(item.id, name) for item in items] == [len(who) for who in others]
    again = Votes(shared)  # another process, which reads the log from its start
    assert sorted(again.current_votes(), key=str) == sorted(votes.current_votes(), key=str)
    again.close()
    votes.close()


def test_the_log_only_grows(shared):
    votes, item = emptied(shared), pairs(shared)[0].id
    votes.cast("ann", item, "preference", "first", 2.0)
    votes.undo("ann")
    votes.cast("ann", item, "preference", "same", 3.5)
    votes.cast("ann", item, "preference", "same", 9.9)  # a click that arrives twice
    assert [(vote.answer, vote.seconds) for vote in votes.log()] == [("first", 2.0), ("", 0.0), ("same", 3.5)]


def test_a_clock_that_jumps_back_changes_no_order(shared, monkeypatch):
    votes, item = emptied(shared), pairs(shared)[0].id
    clock = iter([2_000_000_000.0, 1_000_000_000.0, 1_500_000_000.0])
    monkeypatch.setattr("nanochameleon.evaluate.people.votes.time.time", lambda: next(clock, 2e9))
    for answer in ("first", "second", "same"):
        votes.cast("ann", item, "preference", answer, 1.0)
    assert [vote.answer for vote in votes.current_votes()] == ["same"] and len(votes.log()) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"annotator": "a b"}, "must have 1 to 32 of the characters"),
        ({"annotator": ""}, "must have 1 to 32 of the characters"),
        ({"annotator": "x" * 33}, "must have 1 to 32 of the characters"),
        ({"annotator": "ann\n"}, "must have 1 to 32 of the characters"),
        ({"item": "nothing"}, "is not in"),
        ({"question": "accuracy"}, "ask one of preference"),
        ({"answer": "left"}, "answer one of first, same, second"),
        ({"seconds": -1.0}, "has no real time"),
        ({"seconds": float("nan")}, "has no real time"),
        ({"seconds": 10**400}, "has no real time"),
    ],
)
def test_a_vote_that_cannot_be_is_refused(shared, change, sentence):
    votes = emptied(shared)
    vote = {"annotator": "ann", "item": pairs(shared)[0].id, "question": "preference", "answer": "first", "seconds": 1}
    with pytest.raises(UserError, match=sentence):
        votes.cast(**vote | change)
    assert votes.log() == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"study": "another"}, "open the right study"),
        ({"order": ("a", "b")}, "has other answers than the item"),
        ({"version": 10**30}, "has no real time or version"),
        ({"time": 1e12}, "has no real time"),  # later votes could not be later than this one
    ],
)
def test_imported_votes_are_added_all_or_none(shared, change, sentence):
    votes, items = emptied(shared), pairs(shared)
    votes.cast("ann", items[0].id, "preference", "first", 1.0)
    (vote,) = votes.log()
    good = replace(vote, annotator="bob")
    with pytest.raises(UserError, match=sentence):
        votes.add([good, replace(vote, **change)])
    assert votes.log() == [vote]
    assert votes.add([good, vote]) == 1 and votes.add([good, vote]) == 0 and len(votes.log()) == 2


def test_threads_may_share_one_object(shared):
    votes, items = emptied(shared), pairs(shared)
    names = [f"p{number}" for number in range(8)]

    def vote(name):
        for item in items:
            votes.cast(name, item.id, "preference", "first", 1.0)
            votes.undo(name)
            votes.cast(name, item.id, "preference", "second", 1.0)

    threads = [threading.Thread(target=vote, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(votes.log()) == 8 * 3 * 3
    assert {vote.answer for vote in votes.current_votes()} == {"second"} and len(votes.current_votes()) == 24


def test_a_failed_transaction_leaves_nothing(shared):
    votes = emptied(shared)
    with pytest.raises(UserError, match="could not be saved"), votes.transaction():
        votes.append(replace_vote(shared))
        raise sqlite3.OperationalError("disk is full")
    assert votes.log() == [] and votes.cast("ann", pairs(shared)[0].id, "preference", "same", 1.0)


def replace_vote(study):
    from nanochameleon.evaluate.people.votes import Vote

    item = pairs(study)[0]
    return Vote(study.id, item.id, "preference", "ann", item.answers, "first", 1.0, 0.0)


def test_a_file_that_holds_no_votes_is_one_sentence(tmp_path):
    study, _ = small_study(tmp_path)
    for path in tmp_path.glob("votes.sqlite*"):
        path.unlink()
    (tmp_path / "votes.sqlite").write_bytes(b"no database, however long it is" * 100)
    with pytest.raises(UserError, match="it must be a file of votes"):
        Votes(study)


def test_a_damaged_file_is_one_sentence(tmp_path):
    study, _ = small_study(tmp_path, 20)
    votes = Votes(study)
    for item in pairs(study):
        votes.cast("ann", item.id, "preference", "same", 1.0)
    votes.close()
    path = tmp_path / "votes.sqlite"
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"Z" * (len(data) - 4096))
    for use in (lambda: Votes(study).current_votes(), lambda: Votes(study).log()):
        with pytest.raises(UserError, match=r"damaged|cannot open"):
            use()


def test_a_table_of_something_else_is_one_sentence(tmp_path):
    study, _ = small_study(tmp_path)
    (tmp_path / "votes.sqlite").unlink()
    with sqlite3.connect(tmp_path / "votes.sqlite") as db:
        db.execute("CREATE TABLE votes (a INTEGER)")
    with pytest.raises(UserError, match=r"votes\.sqlite is damaged"):
        Votes(study).current_votes()


def test_votes_do_not_pass_to_a_study_that_was_changed(tmp_path):
    study, _ = small_study(tmp_path)
    Votes(study).cast("ann", pairs(study)[0].id, "preference", "same", 1.0)
    changed = replace(study, id="another")
    with pytest.raises(UserError, match="has votes on another study"):
        Votes(changed).current_votes()


def test_each_vote_is_flushed_to_the_disk(shared):
    votes = Votes(shared)
    assert votes.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert votes.db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


# ---------------------------------------------------------------------------------------------------------------------
# Who is asked what


def answer_everything(study, votes, name, most=1_000) -> int:
    count = 0
    while count < most and (asked := next_question(study, votes, name)):
        votes.cast(name, asked.item, asked.question.name, next(iter(asked.question.labels)), 1.0)
        count += 1
    return count


def test_items_with_enough_votes_are_not_asked_again_but_checks_are(tmp_path):
    study, key = small_study(tmp_path, 2, duplicates=0.1, attention=1, votes_per_item=2)
    votes = Votes(study)
    counts = [answer_everything(study, votes, name) for name in ("ann", "bob", "cat")]
    everyone = sum(len(study.questions(item)) for item in study.items.values() if item.for_all_annotators)
    assert counts[0] == counts[1] == sum(len(study.questions(item)) for item in study.items.values())
    assert counts[2] == everyone > 0
    assert {item for item in study.items if item in key.attention} <= {vote.item for vote in votes.current_votes("cat")}


def test_a_begun_item_is_finished_even_if_others_were_faster(tmp_path):
    study, _ = small_study(tmp_path, 1, votes_per_item=1, questions="absolute", answers={"a": ["x"]})
    votes = Votes(study)
    assert answer_everything(study, votes, "slow", most=2) == 2
    assert answer_everything(study, votes, "fast") == 0  # the one vote is taken
    assert progress(study, votes, "slow").done == 2 and progress(study, votes, "slow").total == 6
    assert answer_everything(study, votes, "slow") == 4


def test_after_an_undo_the_same_question_comes_again(tmp_path):
    study, _ = small_study(tmp_path, 4)
    votes = Votes(study)
    answer_everything(study, votes, "ann", most=9)
    asked = next_question(study, votes, "ann")
    votes.cast("ann", asked.item, asked.question.name, next(iter(asked.question.labels)), 1.0)
    before = progress(study, votes, "ann")
    votes.undo("ann")
    assert next_question(study, votes, "ann") == asked
    assert progress(study, votes, "ann").done == before.done - 1
    assert progress(study, votes, "ann").total == before.total


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, one of which is killed

JUDGE = """
import sys
from pathlib import Path
from nanochameleon.evaluate.human import Votes, next_question, open_study

folder, name = Path(sys.argv[1]), sys.argv[2]
study = open_study(folder)
votes = Votes(study)
while (asked := next_question(study, votes, name)) and sys.stdin.readline():
    left, right = (int(answer[0]["text"]) for answer in asked.answers)
    if name == "bob" and asked.prompt[0]["text"].split()[-1] in ("18", "19"):
        left, right = right, left  # bob disagrees here
    answer = "first" if left > right else "second" if right > left else "same"
    print(f"votes {asked.item} {answer}", flush=True)
    votes.cast(name, asked.item, asked.question.name, answer, 1.0)
    print(f"saved {asked.item} {answer}", flush=True)
"""


def judge(folder, name) -> subprocess.Popen:
    """A process that votes once for each line of its stdin."""
    command = [sys.executable, "-c", JUDGE, str(folder), name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_annotators_at_once_one_of_them_killed_lose_no_vote_and_double_none(tmp_path):
    """20 pairs: model A is better in 9, equal in 5, worse in 6. bob disagrees in two of those, which become ties."""
    answers = {"A": ["2"] * 9 + ["1"] * 5 + ["0"] * 6, "B": ["1"] * 20}
    study, key = small_study(tmp_path, 20, answers, questions="relative", votes_per_item=2)
    ann, bob = judge(tmp_path, "ann"), judge(tmp_path, "bob")
    ann.stdin.write("\n" * 20)
    ann.stdin.flush()
    bob.stdin.write("\n" * 8)  # the eighth vote is under way, or just saved, when the kill comes
    bob.stdin.flush()
    acknowledged = []
    while len(acknowledged) < 7:
        word, *vote = bob.stdout.readline().split()
        acknowledged += [vote] * (word == "saved")
    bob.send_signal(signal.SIGKILL)
    acknowledged += [line.split()[1:] for line in bob.stdout.read().splitlines() if line.startswith("saved")]
    assert bob.wait() == -signal.SIGKILL
    votes = Votes(study)
    saved = [[vote.item, vote.answer] for vote in votes.log() if vote.annotator == "bob"]
    assert saved[: len(acknowledged)] == acknowledged and 7 <= len(saved) <= len(acknowledged) + 1 <= 9
    again = judge(tmp_path, "bob")  # the same command resumes
    again.communicate("\n" * 20)
    ann.communicate()
    assert (ann.returncode, again.returncode) == (0, 0)
    log = votes.log()
    assert len(log) == len({(vote.annotator, vote.item) for vote in log}) == 40
    found = results_so_far(study, votes, key)
    assert found.outcomes(("A", "B")) == {
        ALL: (9, 7, 4), "text-only": (9, 7, 4), "Advice": (9, 1, 0), "Story": (0, 6, 4),
    }  # fmt: skip
    assert found.win_rates()["A", "B"][0] == pytest.approx(12.5 / 20)
    assert found.agreement(("A", "B")) == (18, 0, 2)


def test_a_vote_that_must_not_replace_and_an_undo_of_one_vote_leave_all_others(shared):
    votes, (one, other) = emptied(shared), [item.id for item in pairs(shared)[:2]]
    assert votes.cast("ann", one, "preference", "first", 1.0, replace=False)
    assert not votes.cast("ann", one, "preference", "second", 1.0, replace=False)
    assert votes.cast("ann", other, "preference", "same", 1.0, replace=False)
    assert votes.undo("ann", only=(one, "preference")) is None
    assert [(vote.item, vote.answer) for vote in votes.current_votes("ann")] == [(one, "first"), (other, "same")]
    assert votes.undo("ann", only=(other, "preference")).answer == "same"
    assert votes.undo("ann", only=(other, "preference")) is None
    assert votes.cast("ann", other, "preference", "second", 1.0, replace=False)  # what was undone is no vote
    assert votes.last_vote("ann").answer == "second" and votes.last_vote("bob") is None
