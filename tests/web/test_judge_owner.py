"""What is around a study: its database, its owner, its start."""

import asyncio
import json
import sqlite3
import subprocess
import sys
from contextlib import closing

import httpx
import pytest
from studies import MODELS, ask, cast, make_study, opened, vote_of

from nanochameleon.errors import UserError
from nanochameleon.evaluate.human import Votes, results_so_far
from nanochameleon.evaluate.people.tables import all_tables
from nanochameleon.web import judge
from nanochameleon.web.app import application

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


def test_votes_that_wait_too_long_for_each_other_are_503_and_none_is_saved(study_folder, monkeypatch):
    monkeypatch.setattr(judge, "WAIT", 0.05)
    site = judge.open_site(study_folder, locked=0.3)
    site.votes.db.execute("DELETE FROM votes")
    bodies = [vote_of(judge.screen(site, name), name) for name in ("ann", "bob")]

    async def run():
        transport = httpx.ASGITransport(application(site))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await asyncio.gather(*(client.post("/api/study/vote", json=body) for body in bodies))

    with closing(sqlite3.connect(study_folder / "votes.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert [answer.status_code for answer in asyncio.run(run())] == [503, 503]
    assert site.votes.log() == []
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


def test_owner_sees_the_tables_of_the_report(opened_study):
    client, site = opened_study
    for name in ("ann", "bob"):
        for place in range(20):
            cast(client, vote_of(ask(client, name), name, place))
    content = results(client, site).json()
    tables = all_tables(results_so_far(site.study, site.votes, site.key))
    assert content["votes"] == 40
    assert content["tables"] == json.loads(json.dumps([vars(table) for table in tables]))
    assert {"alpha", "annotators", "table_9"} <= {table["name"] for table in content["tables"]}


def test_results_are_sent_again_only_after_a_vote(opened_study, monkeypatch):
    client, site = opened_study
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
    with closing(Votes(site.study)) as other:  # as a terminal's, in another process
        other.undo("ann")
    assert results(client, site, **{"if-none-match": fresh.headers["etag"]}).json()["votes"] == 0


@pytest.mark.parametrize("key", [None, "", "wrong", "\xfc" * 22])
def test_results_need_the_owner_s_key(opened_study, key):
    client, _ = opened_study
    headers = {} if key is None else {"x-owner-key": key.encode("latin-1")}
    answer = client.get("/api/owner/results", headers=headers)
    assert answer.status_code == 403 and not any(model in answer.text for model in MODELS)


def test_keys_differ_between_servers(study_folder):
    keys = [judge.open_site(study_folder).owner_key for _ in range(2)]
    assert keys[0] != keys[1] and min(map(len, keys)) >= 20


def test_copy_of_annotators_says_that_it_has_no_results(tmp_path):
    (make_study(tmp_path, 1) / "owner" / "key.json").unlink()
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
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        judge.open_site(tmp_path)
