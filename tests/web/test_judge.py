"""Routes of a study: blinded, one vote of each name on a question, and nothing lost by retries."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from studies import MODELS, ask, cast, vote_of

from nanochameleon.errors import UserError
from nanochameleon.evaluate.people.study import IMAGES
from nanochameleon.web import judge


def test_annotator_votes_to_the_end_and_sees_all_images(opened_study):
    client, site = opened_study
    screen, images, total = ask(client), set(), ask(client)["progress"]["total"]
    for done in range(total):
        assert screen["progress"] == {"done": done, "total": total}
        shown = [s for each in (screen["asked"]["prompt"], *screen["asked"]["answers"]) for s in each]
        images |= {segment["image"] for segment in shown if "image" in segment} | {*screen["prefetch"]}
        screen = cast(client, vote_of(screen, seconds=done))
    assert screen["asked"] is None and screen["prefetch"] == [] and screen["progress"]["done"] == total
    assert images == {path.name for path in (site.study.folder / "shown" / "images").iterdir()}
    for name in images:
        answer = client.get(f"/api/study/images/{name}")
        assert answer.headers["content-type"] == "image/png" and answer.content.startswith(b"\x89PNG")
        assert "private" in answer.headers["cache-control"]
    assert sorted(vote.seconds for vote in site.votes.log()) == list(range(total))


def test_images_to_fetch_early_are_those_of_the_next_item(opened_study):
    client, _ = opened_study
    screen = ask(client)
    while (after := cast(client, vote_of(screen)))["asked"]["item"] == screen["asked"]["item"]:
        screen = after
    shown = [s for each in (after["asked"]["prompt"], *after["asked"]["answers"]) for s in each]
    assert screen["prefetch"] == [segment["image"] for segment in shown if "image" in segment]


def test_nothing_that_annotators_get_says_whose_an_answer_is_or_which_items_are_checks(opened_study):
    client, site = opened_study
    key = json.loads((site.study.folder / "owner" / "key.json").read_text())
    secrets = {*MODELS, *key["answers"], *(v for row in key["prompts"].values() for v in (row["id"], row["task_type"]))}
    secrets |= {"for_all_annotators", "attention", "duplicate", site.owner_key, str(site.study.folder)}
    screen, received, shapes = ask(client), [client.get("/api/study").text], set()
    while screen["asked"]:
        received.append(json.dumps(screen))
        shapes.add((*screen, *screen["asked"], *screen["asked"]["question"]))
        received += [str(client.get(f"/api/study/images/{name}").headers) for name in screen["prefetch"]]
        body = vote_of(screen)
        screen = cast(client, body)
        if "preference" in body.values():
            undone = client.post("/api/study/undo", json=body)
            received.append(undone.text + str(undone.headers))
            received.append(client.post("/api/study/vote", json=body | {"answer": "nothing"}).text)
            screen = cast(client, body)
    assert len(shapes) == 1  # checks have the fields of all other items
    assert len(received) > 40 and not [secret for secret in secrets if secret in "".join(received)]


def test_second_page_with_the_same_name_gets_the_next_question_and_a_sentence(opened_study):
    client, site = opened_study
    screen = ask(client)
    first, other = vote_of(screen, place=0), vote_of(screen, place=1)
    after = cast(client, first)
    assert after["note"] is None and cast(client, first) == after  # a retry
    stale = cast(client, other)
    assert stale == after | {"note": judge.ANSWERED}
    assert [vote.answer for vote in site.votes.log()] == [first["answer"]]


def test_undo_that_arrives_twice_takes_back_one_vote(opened_study):
    client, site = opened_study
    first = ask(client)
    second = cast(client, vote_of(first))
    third = cast(client, vote_of(second))
    for _ in range(2):
        undone = client.post("/api/study/undo", json={"annotator": "ann", **third["undo"]}).json()
        assert undone == second | {"note": judge.UNDONE}
    cast(client, vote_of(second))
    late = client.post("/api/study/undo", json={"annotator": "ann", **second["undo"]}).json()
    assert late == third | {"note": judge.NOT_LAST}
    assert len(site.votes.current_votes("ann")) == 2


PAGES = {"ann's": "ann", "ann's other": "ann", "bob's": "bob"}
acts = st.lists(st.tuples(st.sampled_from([*PAGES]), st.sampled_from(["vote", "retry", "undo", "reload"]),
                          st.integers(0, 2)), max_size=20)  # fmt: skip


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts)
def test_any_sequence_of_votes_undos_and_retries_leaves_one_vote_on_each_question(opened_study, acts):
    """A plain model: the votes of each name, in order. Each page acts on what it last got, however old that is."""
    client, site = opened_study
    with site.votes.transaction():
        site.votes.db.execute("DELETE FROM votes")
        site.votes.latest.clear()
        site.votes.people.clear()
    model = {"ann": {}, "bob": {}}
    screens, sent, n_records = {page: ask(client, name) for page, name in PAGES.items()}, {}, 0
    for page, act, place in acts:
        name, screen = PAGES[page], screens[page]
        own = model[name]
        if act == "vote" and screen["asked"]:
            sent[page] = "/api/study/vote", vote_of(screen, name, place)
        elif act == "undo" and screen["undo"]:
            sent[page] = "/api/study/undo", {"annotator": name, **screen["undo"]}
        elif act == "reload" or page not in sent:
            sent[page] = "/api/study/next", {"annotator": name}
        path, body = sent[page]
        about, last = (body.get("item"), body.get("question")), [*own][-1:]
        if path.endswith("vote") and about not in own:
            own[about] = body["answer"]
            n_records += 1
        elif path.endswith("undo") and last == [about]:
            del own[about]
            n_records += 1
        screens[page] = client.post(path, json=body).json()
        assert screens[page]["progress"]["done"] == len(own)
        assert screens[page]["undo"] == ([{"item": i, "question": q} for i, q in own][-1:] or [None])[0]
    for name, own in model.items():
        assert {(v.item, v.question): v.answer for v in site.votes.current_votes(name)} == own
    assert len(site.votes.log()) == n_records


@pytest.mark.parametrize("name", ["", "../x", "a b", "a/b", "x" * 33, "x" * 100_000, "änn", "ann\n", "ann\0", 7, None])
@pytest.mark.parametrize("act", ["next", "vote", "undo"])
def test_names_of_annotators_are_checked(opened_study, act, name):
    client, site = opened_study
    answer = client.post(f"/api/study/{act}", json=vote_of(ask(client)) | {"annotator": name})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "annotator" and len(answer.text) < 300
    assert site.votes.log() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("item", "0" * 32), ("item", "../owner/key.json"), ("item", None), ("item", 3), ("item", "\ud800"),
        ("question", "preferred"), ("question", ["preference"]), ("question", None),
        ("answer", "left"), ("answer", ""), ("answer", 1), ("answer", None),
        ("seconds", -1), ("seconds", 601), ("seconds", 10**400), ("seconds", "1"), ("seconds", True), ("seconds", None),
    ],
)  # fmt: skip
def test_votes_that_cannot_be_are_refused_by_a_sentence_without_a_path(opened_study, field, value):
    client, site = opened_study
    body = json.dumps(vote_of(ask(client)) | {field: value})
    answer = client.post("/api/study/vote", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field
    assert str(site.study.folder) not in answer.text and site.votes.log() == []


def test_question_of_another_item_is_refused(opened_study):
    client, site = opened_study
    screen = ask(client)
    while screen["asked"]["question"]["name"] == "preference":
        screen = cast(client, vote_of(screen))
    n = len(site.votes.log())
    answer = client.post("/api/study/vote", json=vote_of(screen) | {"question": "preference", "answer": "first"})
    assert answer.json()["error"]["param"] == "question" and len(site.votes.log()) == n


@pytest.mark.parametrize(
    "name", ["0" * 32 + ".png", "study.json", "..%2f..%2fowner%2fkey.json", "%2e%2e", "a%00.png", "é"]
)
def test_only_images_of_the_study_are_sent(opened_study, name):
    client, _ = opened_study
    answer = client.get(f"/api/study/images/{name}")
    assert answer.status_code == 404 and "prompt" not in answer.text


def test_a_study_whose_images_were_not_copied_is_not_opened(study_folder, tmp_path):
    """Annotators would judge answers that they cannot see."""
    copy = shutil.copytree(study_folder, tmp_path / "copy")
    image = min((copy / IMAGES).iterdir())
    image.unlink()
    with pytest.raises(UserError, match=f"lacks images of the study, such as {image.name}"):
        judge.open_site(copy)


def test_ten_thousand_names_take_no_memory(opened_study, monkeypatch):
    monkeypatch.setattr(judge, "MAX_ORDERS", 10)
    client, site = opened_study
    for number in range(50):
        ask(client, f"name-{number}")
    assert len(site.study.orders) <= 11 and len(site.votes.latest) <= 2
