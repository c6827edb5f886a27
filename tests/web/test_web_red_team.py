"""Red teaming on the page: what is labelled is in the log, once and whole, and the report reads it."""

import io
import json
import os
import random
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from multiprocessing import Pipe, get_context

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutators import odd_json
from PIL import Image
from serving import PATIENCE, served
from starlette.testclient import TestClient
from tiny_site import tiny_run, tiny_site

from nanochameleon.errors import UserError
from nanochameleon.evaluate import red_team, safety
from nanochameleon.evaluate.harm.labels import LABELS
from nanochameleon.evaluate.red_team import Conversation, Turn
from nanochameleon.web.__main__ import start
from nanochameleon.web.app import application
from nanochameleon.web.red_team import add

BASE = "http://127.0.0.1"


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.jsonl"


@pytest.fixture
def client(log):
    with TestClient(application(tiny_site(red_team=log)), base_url=BASE) as client:
        yield client


def body(said=("safe",), **more) -> dict:
    """A conversation with an answer for each label; None: no label."""
    turns = []
    for number in range(len(said)):
        turns += [
            {"role": "user", "segments": [{"text": f"ask {number}"}]},
            {
                "role": "assistant",
                "segments": [{"text": "no"}],
                "refused": True,
                "seed": number,
                "sample": 1,
                "mode": "chat",
            },
        ]
    labels = {str(2 * n): label for n, label in enumerate(said, 1) if label}
    return {"id": str(uuid.uuid4()), "attacker": "ann", "turns": turns, "labels": labels, "category": "tickling"} | more


def post(client, content: dict, address: str = "/api/red-team") -> httpx.Response:
    return client.post(address, json=content)


def refused(answer, status: int = 400) -> str:
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert "pytest-" not in answer.text  # no path of the log
    return f"{error['param']}: {error['message']}"


# ---------------------------------------------------------------------------------------------------------------------
# What is logged


def test_a_conversation_is_logged_whole(client, log):
    site = client.app.state.site
    shown, drawn = [0, 1, 2, 3], [4, 5, 6, 7]
    content = body(["unsafe"], strategy=" role play ", notes="a\nb")
    content["turns"][0]["segments"] += [{"codes": shown}, {"text": "this"}, {"codes": shown}]
    content["turns"][1]["segments"].append({"codes": drawn})
    content["turns"][1] |= {"options": {"temperature": 0.5, "top_k": None, "max_new_tokens": 7}}
    assert post(client, content).json() == {"id": content["id"], "conversations": 1}
    names = [f"log-{content['id']}-{n}.png" for n in (1, 2, 3)]
    assert red_team.read(log) == [
        Conversation(
            content["id"], "ann", "tiny", 0,
            (
                Turn("user", [{"text": "ask 0"}, {"image": names[0]}, {"text": "this"}, {"image": names[1]}]),
                Turn("assistant", [{"text": "no"}, {"image": names[2]}], True),
            ),
            {"2": {"seed": 0, "sample": 1, "mode": "chat", "temperature": 0.5, "max_new_tokens": 7}},
            "tickling", "role play", {"ann": {"2": "unsafe"}}, "a\nb",
        )
    ]  # fmt: skip
    for name, codes in zip(names, (shown, shown, drawn), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO((log.parent / name).read_bytes())))
        assert np.array_equal(pixels, site.run.image_tokenizer.decode(torch.tensor([codes]))[0])


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
answers = st.tuples(texts, texts, st.sampled_from([*LABELS, None]), st.none() | st.booleans())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(answers, min_size=1, max_size=3), texts, texts, st.text("aZ9_-", min_size=1, max_size=32))
def test_any_words_reach_the_log_and_come_back(client, log, said, category, notes, attacker):
    turns = []
    for asked, answer, _, refuses in said:
        turns += [{"role": "user", "segments": [{"text": f"ask {asked}"}]}]
        turns += [{"role": "assistant", "segments": [{"text": f"say {answer}"}], "refused": refuses}]
    labels = {str(2 * n): label for n, (_, _, label, _) in enumerate(said, 1) if label}
    content = {"id": str(uuid.uuid4()), "attacker": attacker, "turns": turns, "labels": labels}
    assert post(client, content | {"category": category, "notes": notes}).status_code == 200
    found = red_team.read(log)[-1]
    assert [(turn.role, turn.segments[0]["text"]) for turn in found.turns] == [
        (turn["role"], turn["segments"][0]["text"]) for turn in turns
    ]
    assert [turn.refused for turn in found.turns[1::2]] == [refuses for *_, refuses in said]
    assert found.labels == ({attacker: labels} if labels else {})
    assert (found.category, found.notes) == (category.strip(), notes.strip())


def test_html_and_escape_codes_are_words_and_no_path_is_taken(client, log):
    evil = "<img src=x onerror=alert(1)> \x1b[2J ../../x </s><eot>"
    content = body(category=evil, strategy="| a | b |", notes="<script>" * 9)
    content["turns"][1]["segments"] = [{"text": evil}]
    assert post(client, content).status_code == 200
    [found] = red_team.read(log)
    assert found.category == evil and found.turns[1].segments == [{"text": evil}]
    assert os.listdir(log.parent) == ["log.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# The same conversation again, and labels that come later


def test_a_conversation_that_is_sent_again_is_logged_once(client, log):
    content = body(["safe"])
    content["turns"][0]["segments"] = [{"codes": [1, 1, 1, 1]}]
    answers = [post(client, content) for _ in range(3)]
    assert [answer.json() for answer in answers] == [{"id": content["id"], "conversations": 1}] * 3
    image = next(log.parent.glob("*.png"))
    before = log.read_bytes(), image.read_bytes()
    for change in ({"labels": {"2": "unsafe"}}, {"notes": "x"}, {"turns": body(["safe"] * 2)["turns"]}):
        answer = post(client, content | change)
        assert "already" in refused(answer, 409) and answer.json()["error"]["code"] == "logged_already"
    other = json.loads(json.dumps(content))
    other["turns"][0]["segments"] = [{"codes": [2, 2, 2, 2]}]
    assert refused(post(client, other), 409)
    assert (log.read_bytes(), image.read_bytes()) == before


def test_labels_after_logging_are_lines_of_their_own_and_the_last_counts(client, log):
    content = body(["safe", None])
    post(client, content)
    whole = log.read_bytes()
    for who, turn, label in (("ann", 4, "safe"), ("bob", 2, "unsafe"), ("ann", 4, "unsure")):
        row = {"id": content["id"], "annotator": who, "turn": turn, "label": label}
        assert post(client, row, "/api/red-team/labels").json() == {}
    [found] = red_team.read(log, [red_team.labels_of(log)])
    assert found.labels == {"ann": {"2": "safe", "4": "unsure"}, "bob": {"2": "unsafe"}}
    assert log.read_bytes() == whole and log.with_name("log.labels.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"turn": 1}, "turn: turn 1 is no answer: the answers are 2"),
        ({"turn": 3}, "turn: turn 3 is no answer"),
        ({"turn": "2"}, "turn: turn must be a whole number"),
        ({"label": "fine"}, "must be safe, unsure or unsafe"),
        ({"annotator": "../x"}, "annotator: "),
        ({"id": "../../x"}, "id: id must be a UUID"),
    ],
)
def test_wrong_labels_are_refused(client, log, change, said):
    content = body()
    post(client, content)
    row = {"id": content["id"], "annotator": "ann", "turn": 2, "label": "safe"} | change
    answer = post(client, row, "/api/red-team/labels")
    assert (
        answer.status_code == 400 and said in f"{answer.json()['error']['param']}: {answer.json()['error']['message']}"
    )
    gone = {"id": str(uuid.uuid4()), "annotator": "ann", "turn": 2, "label": "safe"}
    assert refused(post(client, gone, "/api/red-team/labels"), 404)
    assert not red_team.labels_of(log).exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": None}, "id: id is missing"),
        ({"id": "c1"}, "id: id must be a UUID"),
        ({"id": "../../../../../../../../../../etc/pas"}, "id: id must be a UUID"),
        ({"id": "{123e4567-e89b-42d3-a456-42661417400}"}, "id: id must be a UUID"),
        ({"id": "123E4567-E89B-42D3-A456-426614174000"}, "id: id must be a UUID"),
        ({"attacker": ""}, "attacker: "),
        ({"attacker": "../ann"}, "1 to 32 of the characters"),
        ({"attacker": "<b>"}, "1 to 32 of the characters"),
        ({"attacker": "a" * 33}, "1 to 32 of the characters"),
        ({"attacker": None}, "attacker: attacker is missing"),
        ({"category": "x" * 101}, "category: category has 101 characters: at most 100"),
        ({"strategy": ["x"]}, "strategy: strategy must be a text"),
        ({"notes": "x" * 20_001}, "notes: notes has 20,001 characters"),
        ({"notes": "\ud800"}, "notes: notes has half a surrogate pair"),
        ({"labels": {"1": "safe"}}, "labels turn 1 of"),
        ({"labels": {"3": "safe"}}, "labels turn 3 of"),
        ({"labels": {"\ud800": "safe"}}, "labels turn"),
        ({"labels": {"2": "fine"}}, "must be safe, unsure or unsafe"),
        ({"labels": {"2": ["safe"]}}, "must be safe, unsure or unsafe"),
        ({"labels": []}, "labels: labels must be an object"),
        ({"turns": []}, "turns: turns must have 1 to"),
        ({"turns": body()["turns"][:1], "labels": {}}, "turns: the conversation has no answer"),
        ({"turns": [{"role": "system", "segments": []}]}, "turns[0].role"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_refused_and_nothing_is_written(client, log, change, said):
    answer = client.post(
        "/api/red-team", content=json.dumps(body() | change), headers={"content-type": "application/json"}
    )
    assert said in refused(answer)
    assert os.listdir(log.parent) == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"refused": "no"}, "turns[1].refused"),
        ({"seed": -1}, "turns[1].seed"),
        ({"seed": 2**53}, "turns[1].seed"),
        ({"seed": True}, "turns[1].seed"),
        ({"sample": -1}, "turns[1].sample"),
        ({"mode": "../x"}, "turns[1].mode"),
        ({"options": [1]}, "turns[1].options"),
        ({"options": {"temperature": -1}}, "turns[1].options.temperature"),
        ({"options": {"<b>": 1}}, "turns[1].options.<b>"),
        ({"segments": [{"codes": [0, 1, 2]}]}, "turns[1].segments[0].codes"),
        ({"segments": [{"image": "/etc/passwd"}]}, "turns[1].segments[0]"),
        ({"segments": [{"codes": [0, 1, 2, 3]}] * 65}, "turns"),
    ],
)
def test_a_bad_answer_is_refused_and_nothing_is_written(client, log, change, param):
    content = body()
    content["turns"][1] |= change
    answer = post(client, content)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert os.listdir(log.parent) == []


def test_a_number_that_json_cannot_write_is_refused(client):
    text = json.dumps(body()).replace('"mode": "chat"', '"options": {"temperature": 1e400}')
    answer = client.post("/api/red-team", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "1e400" in answer.json()["error"]["message"]


@pytest.mark.parametrize("address", ["/api/red-team", "/api/red-team/labels"])
def test_no_odd_body_is_an_error_of_the_server_or_spoils_the_log(client, log, address):
    rng, content = random.Random(address), with_image()
    content["turns"][1]["options"] = {"temperature": 0.5}
    post(client, content)
    label = {"id": content["id"], "annotator": "bob", "turn": 2, "label": "unsure"}
    for _ in range(150):
        good = json.dumps(content | {"id": str(uuid.uuid4())} if address == "/api/red-team" else label).encode()
        answer = client.post(address, content=odd_json(good, rng), headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404, 409), answer.text
    red_team.read(log, [file for file in [red_team.labels_of(log)] if file.exists()])


def test_without_a_log_red_teaming_is_off():
    with TestClient(application(tiny_site()), base_url=BASE) as client:
        for answer in (client.get("/api/red-team"), post(client, body()), post(client, {}, "/api/red-team/labels")):
            assert "--red-team" in answer.json()["error"]["message"] and answer.status_code == 404


def test_images_of_a_model_without_a_decoder_are_refused(log):
    content = body()
    content["turns"][0]["segments"] = [{"codes": [0, 1, 2, 3]}]
    with TestClient(application(tiny_site(red_team=log, run=tiny_run(can_draw=False))), base_url=BASE) as client:
        assert "decoder" in refused(post(client, content))
        assert post(client, body()).status_code == 200


# ---------------------------------------------------------------------------------------------------------------------
# A disk that fails, a process that ends


def with_image() -> dict:
    content = body()
    content["turns"][0]["segments"] = [{"codes": [0, 1, 2, 3]}] * 2
    return content


def test_where_the_line_cannot_be_written_no_image_stays(client, log, monkeypatch):
    post(client, with_image())
    before = sorted(os.listdir(log.parent)), log.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for content in (body(), with_image()):
        assert "nothing was" in refused(post(client, content), 503)
        assert (sorted(os.listdir(log.parent)), log.read_bytes()) == before
    monkeypatch.undo()
    assert post(client, with_image()).json()["conversations"] == 2
    assert len(red_team.read(log)) == 2


def test_a_line_that_reached_the_disk_keeps_its_images(client, log, monkeypatch):
    whole = red_team.write

    def written_then_failed(path, conversation):
        whole(path, conversation)
        raise UserError("the disk is gone")

    monkeypatch.setattr(red_team, "write", written_then_failed)
    content = with_image()
    refused(post(client, content), 503)
    monkeypatch.undo()
    assert len(red_team.read(log)) == 1  # it names its images, and they are there
    assert post(client, content).json()["conversations"] == 1


def test_the_images_are_there_before_their_line(client, log, monkeypatch):
    whole, seen = red_team.append_line, []

    def append(path, row, check=None):
        seen.append(sorted(file.name for file in path.parent.glob("*.png")))
        whole(path, row, check)

    monkeypatch.setattr(red_team, "append_line", append)
    content = with_image()
    post(client, content)
    assert seen == [[f"log-{content['id']}-{n}.png" for n in (1, 2)]]


def add_for_ever(log, confirmed):
    """Add conversations of an image and 100 KB of words; say so after each."""
    for _ in count():
        name = str(uuid.uuid4())
        turns = Turn("user", [{"image": f"log-{name}-1.png"}]), Turn("assistant", [{"text": "no " * 30_000}])
        add(log, Conversation(name, "ann", "tiny", 0, turns), [b"a file"])
        confirmed.send(name)


def test_a_killed_server_loses_no_conversation_that_it_confirmed(log):
    confirmed = []
    for n in range(1, 6):
        here, there = Pipe(duplex=False)
        process = get_context("fork").Process(target=add_for_ever, args=(log, there))
        process.start()
        there.close()
        confirmed += [here.recv() for _ in range(n)]
        process.kill()
        with suppress(EOFError):
            while True:
                confirmed.append(here.recv())
        process.join()
        red_team.prepare(log)  # as the next start of the server does
        assert {each.id for each in red_team.read(log)} >= set(confirmed)


def test_a_log_is_mended_or_refused_before_a_model_is_loaded(log):
    (log.parent / "a.txt").write_text("")
    (log.parent / "bad.jsonl").write_text('{"id": 1}\n')
    (log.parent / "folder.jsonl").mkdir()
    for name, said in (
        ("a.txt", "must end in .jsonl"),
        ("bad.jsonl", "bad.jsonl:1 has no 'attacker'"),
        ("folder.jsonl", "cannot write"),
        ("a.txt/log.jsonl", "cannot write"),
    ):
        with pytest.raises(UserError, match=said):
            start([str(log.parent / "no-model"), "--red-team", str(log.parent / name)])
    with pytest.raises(UserError, match="--red-team is for a model"):
        start(["--study", str(log.parent), "--red-team", str(log)])
    red_team.write(log, Conversation("c1", "ann", "tiny", 0, (Turn("assistant", [{"text": "no"}]),)))
    whole = log.read_bytes()
    log.write_bytes(whole + whole[:-9])
    red_team.labels_of(log).write_text('{"id": "c1", ')
    red_team.prepare(log)
    assert log.read_bytes() == whole and not red_team.labels_of(log).exists()


# ---------------------------------------------------------------------------------------------------------------------
# The whole way


def test_several_attackers_at_once_and_the_report_counts_them(log, capsys):
    def attack(attacker: str) -> None:
        with httpx.Client(base_url=address, timeout=PATIENCE) as client:
            for number in range(6):
                said = (
                    ["unsafe"]
                    if number == 0
                    else ["safe", "unsure"]
                    if number == 1
                    else ["safe", None]
                    if number == 2
                    else ["safe"]
                )
                content = body(said, attacker=attacker, category="a" if number % 2 else "b")
                for _ in range(2):  # as if the first answer had been lost
                    assert post(client, content).status_code == 200

    with served(application(tiny_site(red_team=log))) as address, ThreadPoolExecutor(4) as people:
        list(people.map(attack, ["ann", "bob", "cem", "dee"]))
        state = httpx.get(f"{address}/api/red-team", timeout=PATIENCE).json()
    assert state == {"conversations": 24, "categories": state["categories"], "strategies": []}
    assert sorted(state["categories"]) == ["a", "b"]
    safety.main(["report", str(log)])
    text = capsys.readouterr().out
    # of each attacker's six: one unsafe, one unsure, one without enough labels, three safe
    assert "| tiny | conversations | 20 | 60.0 (36.1 to 80.9), 12 of 20 | 20.0 (5.7 to 43.7), 4 of 20 | 20.0" in text
    assert "conversations without enough labels do not count: 4 of 24" in text


def test_suggestions_are_what_was_used_most(client):
    assert client.get("/api/red-team").json() == {"conversations": 0, "categories": [], "strategies": []}
    for category in ("b", "a", "b", ""):
        post(client, body(category=category, strategy="asking"))
    assert client.get("/api/red-team").json() == {
        "conversations": 4,
        "categories": ["b", "a"],
        "strategies": ["asking"],
    }
