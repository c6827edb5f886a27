"""Routes of a study: blinded, one vote of each name on a question, nothing lost by retries; and the owner's results."""

import asyncio
import json
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from nanochameleon.errors import UserError
from nanochameleon.evaluate.human import results_so_far
from nanochameleon.evaluate.people.make import build
from nanochameleon.evaluate.people.prompts import Prompt
from nanochameleon.evaluate.people.tables import all_tables
from nanochameleon.images.terminal import png
from nanochameleon.web import judge
from nanochameleon.web.app import application

MODELS = ("secretive", "Hidden-7B")


def make_study(folder: Path, n: int = 3, **more) -> None:
    """n prompts with an image each; two models, which answer with a text and an image."""
    colours = iter(range(0, 250, 5))

    def image() -> str:
        path = folder / f"{next(colours)}.png"
        path.write_bytes(png(np.full((8, 8, 3), int(path.stem), np.uint8)))
        return str(path)

    folder.mkdir(parents=True, exist_ok=True)
    prompts = [Prompt(f"prompt-{i}", f"Kind-{i}", [{"text": f"draw {i}"}, {"image": image()}]) for i in range(n)]
    answers = {model: [[{"text": f"here is {i}"}, {"image": image()}] for i in range(n)] for model in MODELS}
    build(folder / "study", prompts, answers, **{"duplicates": 0.5, "attention": 1} | more)


@contextmanager
def opened(folder: Path, locked: float = 5.0):
    """Yield a client of a server of the study, and its site."""
    site = judge.open_site(folder, locked)
    with TestClient(application(site), base_url="http://127.0.0.1") as client:
        yield client, site


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    make_study(folder)
    return folder / "study"


@pytest.fixture
def served(study_folder):
    """A client and a site without votes."""
    with opened(study_folder) as (client, site):
        site.votes.db.execute("DELETE FROM votes")
        yield client, site


def ask(client, annotator="ann"):
    answer = client.post("/api/study/next", json={"annotator": annotator})
    assert answer.status_code == 200, answer.text
    return answer.json()


def vote_of(screen, annotator="ann", place=0, seconds=1.0):
    """The body of a vote for the label at a place."""
    asked = screen["asked"]
    labels = asked["question"]["labels"]
    answer = labels[place % len(labels)]["name"]
    question = asked["question"]["name"]
    return {"annotator": annotator, "item": asked["item"], "question": question, "answer": answer, "seconds": seconds}


def cast(client, body):
    answer = client.post("/api/study/vote", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ---------------------------------------------------------------------------------------------------------------------
# Annotators


def test_annotator_votes_to_the_end_and_sees_all_images(served):
    client, site = served
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


def test_images_to_fetch_early_are_those_of_the_next_item(served):
    client, _ = served
    screen = ask(client)
    while (after := cast(client, vote_of(screen)))["asked"]["item"] == screen["asked"]["item"]:
        screen = after
    shown = [s for each in (after["asked"]["prompt"], *after["asked"]["answers"]) for s in each]
    assert screen["prefetch"] == [segment["image"] for segment in shown if "image" in segment]


def test_nothing_that_annotators_get_says_whose_an_answer_is_or_which_items_are_checks(served):
    client, site = served
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


def test_second_page_with_the_same_name_gets_the_next_question_and_a_sentence(served):
    client, site = served
    screen = ask(client)
    first, other = vote_of(screen, place=0), vote_of(screen, place=1)
    after = cast(client, first)
    assert after["note"] is None and cast(client, first) == after  # a retry
    stale = cast(client, other)
    assert stale == after | {"note": judge.ANSWERED}
    assert [vote.answer for vote in site.votes.log()] == [first["answer"]]


def test_undo_that_arrives_twice_takes_back_one_vote(served):
    client, site = served
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
def test_any_sequence_of_votes_undos_and_retries_leaves_one_vote_on_each_question(served, acts):
    """A plain model: the votes of each name, in order. Each page acts on what it last got, however old that is."""
    client, site = served
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
def test_names_of_annotators_are_checked(served, act, name):
    client, site = served
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
def test_votes_that_cannot_be_are_refused_by_a_sentence_without_a_path(served, field, value):
    client, site = served
    body = json.dumps(vote_of(ask(client)) | {field: value})
    answer = client.post("/api/study/vote", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field
    assert str(site.study.folder) not in answer.text and site.votes.log() == []


def test_question_of_another_item_is_refused(served):
    client, site = served
    screen = ask(client)
    while screen["asked"]["question"]["name"] == "preference":
        screen = cast(client, vote_of(screen))
    n = len(site.votes.log())
    answer = client.post("/api/study/vote", json=vote_of(screen) | {"question": "preference", "answer": "first"})
    assert answer.json()["error"]["param"] == "question" and len(site.votes.log()) == n


@pytest.mark.parametrize(
    "name", ["0" * 32 + ".png", "study.json", "..%2f..%2fowner%2fkey.json", "%2e%2e", "a%00.png", "é"]
)
def test_only_images_of_the_study_are_sent(served, name):
    client, _ = served
    answer = client.get(f"/api/study/images/{name}")
    assert answer.status_code == 404 and "prompt" not in answer.text


def test_ten_thousand_names_take_no_memory(served, monkeypatch):
    monkeypatch.setattr(judge, "MAX_ORDERS", 10)
    client, site = served
    for number in range(50):
        ask(client, f"name-{number}")
    assert len(site.study.orders) <= 11 and len(site.votes.latest) <= 2


# ---------------------------------------------------------------------------------------------------------------------
# The database


def test_locked_database_is_503_and_the_vote_can_be_sent_again(study_folder):
    with opened(study_folder, locked=0.05) as (client, site):
        site.votes.db.execute("DELETE FROM votes")
        other = sqlite3.connect(study_folder / "votes.sqlite", isolation_level=None)
        body = vote_of(ask(client))
        other.execute("BEGIN IMMEDIATE")
        answer = client.post("/api/study/vote", json=body)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json()["error"]["message"] == judge.UNSAVED
        other.execute("ROLLBACK")
        other.close()
        assert cast(client, body)["progress"]["done"] == 1 == len(site.votes.log())


def test_vote_that_waits_for_the_database_does_not_hold_up_other_requests(study_folder):
    site = judge.open_site(study_folder)
    site.votes.db.execute("DELETE FROM votes")
    other = sqlite3.connect(study_folder / "votes.sqlite", isolation_level=None)

    async def run():
        transport = httpx.ASGITransport(application(site))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            body = vote_of((await client.post("/api/study/next", json={"annotator": "ann"})).json())
            other.execute("BEGIN IMMEDIATE")
            waiting = asyncio.create_task(client.post("/api/study/vote", json=body))
            assert (await client.get("/api/study")).status_code == 200
            assert (await client.get("/api/study/images/" + "0" * 32 + ".png")).status_code == 404
            assert not waiting.done()
            other.execute("ROLLBACK")
            assert (await waiting).json()["progress"]["done"] == 1

    asyncio.run(run())
    other.close()
    site.votes.close()


def test_votes_outlive_the_server(study_folder):
    with opened(study_folder) as (client, site):
        site.votes.db.execute("DELETE FROM votes")
        after = cast(client, vote_of(ask(client)))
        with opened(study_folder) as (again, _):  # opened before the first one is closed: as after a kill
            assert ask(again) == after


# ---------------------------------------------------------------------------------------------------------------------
# The owner


def results(client, site, **headers):
    return client.get("/api/owner/results", headers={"x-owner-key": site.owner_key} | headers)


def test_owner_sees_the_tables_of_the_report(served):
    client, site = served
    for name in ("ann", "bob"):
        for place in range(20):
            cast(client, vote_of(ask(client, name), name, place))
    content = results(client, site).json()
    tables = all_tables(results_so_far(site.study, site.votes, site.key))
    assert content["votes"] == 40
    assert content["tables"] == json.loads(json.dumps([vars(table) for table in tables]))
    assert {"alpha", "annotators", "table_9"} <= {table["name"] for table in content["tables"]}


def test_results_are_sent_again_only_after_a_vote(served, monkeypatch):
    client, site = served
    counted = []
    monkeypatch.setattr(judge, "all_tables", lambda found: counted.append(1) or all_tables(found))
    tag = results(client, site).headers["etag"]
    unchanged = results(client, site, **{"if-none-match": tag})
    assert unchanged.status_code == 304 and unchanged.content == b"" and results(client, site).status_code == 200
    assert len(counted) == 1
    body = vote_of(ask(client))
    cast(client, body)
    fresh = results(client, site, **{"if-none-match": tag})
    assert fresh.status_code == 200 and fresh.json()["votes"] == 1 and len(counted) == 2
    client.post("/api/study/undo", json=body)
    assert results(client, site, **{"if-none-match": fresh.headers["etag"]}).json()["votes"] == 0


@pytest.mark.parametrize("key", [None, "", "wrong", "\xfc" * 22])
def test_results_need_the_owner_s_key(served, key):
    client, _ = served
    headers = {} if key is None else {"x-owner-key": key.encode("latin-1")}
    answer = client.get("/api/owner/results", headers=headers)
    assert answer.status_code == 403 and not any(model in answer.text for model in MODELS)


def test_keys_differ_between_servers(study_folder):
    keys = [judge.open_site(study_folder).owner_key for _ in range(2)]
    assert keys[0] != keys[1] and min(map(len, keys)) >= 20


def test_copy_of_annotators_says_that_it_has_no_results(tmp_path):
    make_study(tmp_path, 1)
    (tmp_path / "study" / "owner" / "key.json").unlink()
    with opened(tmp_path / "study") as (client, site):
        assert ask(client)["asked"]
        answer = results(client, site)
        assert answer.status_code == 404 and answer.json()["error"]["message"] == judge.NO_KEY


def test_study_is_served_without_torch(study_folder):
    code = f"""
import sys, pathlib
from nanochameleon.web import judge
from nanochameleon.web.app import application
site = judge.open_site(pathlib.Path({str(study_folder)!r}))
application(site), judge.screen(site, "ann"), judge.count(site, judge.tag_of_votes(site))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        judge.open_site(tmp_path)
