"""What could be smuggled through the routes: HTML, events of a stream, spellings of special tokens, names of files.

None works: text stays text from the body to the prompt and from the model to the answer, and no name reaches the disk.
"""

import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from studies import make_study
from tiny_site import tiny_run, tiny_site

from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.web import judge
from nanochameleon.web.app import application

BASE = "http://127.0.0.1"
ROOT = Path(__file__).parents[2]
HTML = "<img src=x onerror=alert(1)>"
EVENT = '\n\ndata: {"mode": "evil"}\n\n\u2028\r\n\r\nevent: evil\r\n'
JSON = "application/json"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("red-team") / "log.jsonl"


@pytest.fixture(scope="module")
def client(log):
    with TestClient(application(tiny_site(red_team=log)), base_url=BASE) as client:
        yield client


def said(text: str) -> list[dict]:
    return [{"role": "user", "segments": [{"text": text}]}]


def kind_of(answer) -> str:
    """The content type, which no browser may guess at."""
    assert answer.headers["x-content-type-options"] == "nosniff"
    return answer.headers["content-type"].partition(";")[0]


def events_of(answer) -> list:
    """Read a stream as browsers do: each event is one line, and nothing else is in the stream."""
    assert kind_of(answer) == "text/event-stream"
    lines = [line for line in answer.content.split(b"\n") if line and not line.startswith(b":")]
    assert all(line.startswith(b"data: ") and b"\r" not in line for line in lines)
    contents = [line.removeprefix(b"data: ") for line in lines]
    return [json.loads(content) for content in contents if content != b"[DONE]"]


# ---------------------------------------------------------------------------------------------------------------------
# A model that writes HTML


@pytest.fixture(scope="module", params=[HTML, EVENT, "</script><script>alert(1)</script>"])
def evil(request):
    """(client, text): whatever the model writes, it is this text again and again."""
    tokenizer = TextTokenizer(tiny.TOKENIZER.merges, tiny.VOCAB)
    tokenizer.pieces = dict.fromkeys(tokenizer.pieces, request.param.encode())
    with TestClient(application(tiny_site(run=tiny_run(tokenizer))), base_url=BASE) as client:
        yield client, request.param


def test_what_the_model_writes_arrives_as_text(evil):
    client, text = evil
    body = {"turns": said("x"), "mode": "text", "options": {"max_new_tokens": 6}}
    found = events_of(client.post("/api/generate", json=body))
    written = "".join(event.get("text", "") for event in found)
    assert found[0] == {"mode": "text"} and written and written == text * (len(written) // len(text))
    assert all(event.keys() <= {"mode", "sample", "text", "end"} for event in found)


def test_what_the_model_writes_arrives_as_text_from_the_api(evil):
    client, text = evil
    body = {"messages": [{"role": "user", "content": "x"}], "mode": "text", "max_tokens": 6, "seed": 0}
    answer = client.post("/v1/chat/completions", json=body)
    assert kind_of(answer) == JSON
    written = answer.json()["choices"][0]["message"]["content"]
    assert written and written == text * (len(written) // len(text))
    chunks = events_of(client.post("/v1/chat/completions", json=body | {"stream": True}))
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == written


def test_pieces_of_tokens_are_text(evil):
    client, text = evil
    answer = client.post("/api/tokens", json={"turns": said("x"), "mode": "text"})
    assert kind_of(answer) == JSON
    pieces = [piece["text"] for piece in answer.json()["pieces"].values() if "text" in piece]
    assert pieces and set(pieces) == {text}


# ---------------------------------------------------------------------------------------------------------------------
# HTML in a request


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", {HTML: 1}),
        ("/api/generate", {"turns": said("x"), "mode": HTML}),
        ("/api/generate", {"turns": said("x"), "options": {HTML: 1}}),
        ("/api/generate", {"turns": HTML}),
        ("/api/generate", {"turns": [{"role": HTML, "segments": []}]}),
        ("/api/tokens", {"turns": said("x"), "mode": HTML}),
        ("/api/images/decode", {"codes": [HTML]}),
        ("/api/images?fit=" + HTML, None),
        ("/api/red-team", {"id": HTML}),
        ("/api/red-team", {"id": str(uuid.uuid4()), "turns": said("x"), "attacker": HTML}),
        ("/api/red-team/labels", {"id": str(uuid.uuid4()), "annotator": HTML, "turn": 2, "label": "safe"}),
        ("/v1/chat/completions", {HTML: 1, "messages": []}),
        ("/v1/chat/completions", {"model": HTML, "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/chat/completions", {"messages": [{"role": HTML, "content": "x"}]}),
        ("/v1/images/generations", {"prompt": "x", "size": HTML}),
        (f"/v1/models/{HTML}", {}),
        (f"/{HTML}", {}),
        (f"/static/{HTML}", {}),
    ],
)
def test_an_error_that_quotes_html_is_json(client, path, body):
    sent = {"content": b"", "headers": {"content-type": "image/png"}} if body is None else {"json": body}
    answer = client.post(path, **sent)
    assert 400 <= answer.status_code < 500 and kind_of(answer) == JSON
    assert set(answer.json()) == {"error"}


def test_a_name_of_the_model_that_is_html_is_in_json_alone():
    site = tiny_site()
    site.name = HTML
    with TestClient(application(site), base_url=BASE) as client:
        assert client.get("/api/settings").json()["model"]["name"] == HTML
        assert client.get("/v1/models").json()["data"][0]["id"] == HTML
        for path in ("/api/settings", "/v1/models"):
            assert kind_of(client.get(path)) == JSON
        for path in ("/", "/metrics"):
            assert HTML not in client.get(path).text


def test_an_address_adds_no_line_to_the_metrics(client):
    for name in ('x"} 1\nevil_total{x="', "evil_total 1"):
        client.get(f"/static/{quote(name, safe='')}")
    assert "evil" not in client.get("/metrics").text


# ---------------------------------------------------------------------------------------------------------------------
# Spellings of special tokens

SPELLINGS = [
    *tiny.VOCAB.names(),
    "IMGIMGFDZ",
    "<image>",
    "<reserved08706>",
    "<|endoftext|>",
    "[INST]",
    "\x00",
    "<0x0A>",
]
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=15)
texts = st.lists(st.sampled_from(SPELLINGS) | ANY, min_size=1, max_size=2).map("".join).filter(str.strip)


@contextmanager
def prompts(site) -> Iterator[list[tuple[int, ...]]]:
    """Yield a list that receives the prompt of each request to the model."""
    whole, seen = site.worker.streams, []

    def streams(requests, *more):
        seen.extend(request.prompt for request in requests)
        return whole(requests, *more)

    site.worker.streams = streams
    try:
        yield seen
    finally:
        del site.worker.streams


def specials(prompt) -> list[int]:
    return [token for token in prompt if token < tiny.VOCAB.first_text]


def text_of(prompt) -> str:
    return tiny.TOKENIZER.decode([token for token in prompt if token >= tiny.VOCAB.first_text])


def turns_of(first: str, answer: str, last: str) -> list[dict]:
    parts = ("user", first), ("assistant", answer), ("user", last)
    return [{"role": role, "segments": [{"text": text}]} for role, text in parts]


@settings(max_examples=10, deadline=None)
@given(st.tuples(texts, texts, texts), st.sampled_from(["draw", "answer", "chat", "text", "free"]))
@example(("</s>", "<racm3:break>", "<eoss>"), "chat")
def test_no_text_of_a_turn_is_a_special_token(client, words, mode):
    site = client.app.state.site
    with prompts(site) as seen:
        for spoken in (words, ("a", "a", "a")):
            body = {"turns": turns_of(*spoken), "mode": mode, "options": {"max_new_tokens": 5}}
            answer = client.post("/api/generate", json=body)
            if answer.status_code == 400:  # only since it is too long
                assert "context" in answer.json()["error"]["message"]
                return
    read = words[-1:] if mode in ("draw", "answer") else words  # what the mode reads of a conversation
    assert specials(seen[0]) == specials(seen[1]) and text_of(seen[0]) == "".join(read)
    tokens = client.post("/api/tokens", json={"turns": turns_of(*words), "mode": mode}).json()["tokens"]
    assert [token["id"] for token in tokens] == list(seen[0])


@settings(max_examples=10, deadline=None)
@given(st.tuples(texts, texts, texts, texts))
@example(("</s>", "<racm3:break>", "<eoss>", "<pad>"))
def test_no_text_of_a_message_is_a_special_token(client, words):
    site = client.app.state.site
    with prompts(site) as seen:
        for system, first, reply, last in (words, "aaaa"):
            messages = [
                {"role": "system", "content": system, "name": "</s>"},
                {"role": "user", "content": [{"type": "text", "text": first}]},
                {"role": "assistant", "content": reply},
                {"role": "user", "content": last},
            ]
            body = {"messages": messages, "mode": "chat", "max_tokens": 1, "user": "<racm3:break>", "stop": ["<eoss>"]}
            answer = client.post("/v1/chat/completions", json=body)
            if answer.status_code == 400:
                assert "context" in answer.json()["error"]["message"]
                return
    assert specials(seen[0]) == specials(seen[1])
    assert text_of(seen[0]) == words[0] + "\n" + "".join(words[1:])


@given(texts)
@settings(max_examples=10, deadline=None)
def test_no_words_of_an_image_are_a_special_token(client, words):
    with prompts(client.app.state.site) as seen:
        answer = client.post("/v1/images/generations", json={"prompt": words, "seed": 0})
    assert answer.status_code == 200 or "context" in answer.json()["error"]["message"]
    if seen:
        assert specials(seen[0]) == [tiny.VOCAB.bos, tiny.VOCAB.boi] and text_of(seen[0]) == words


# ---------------------------------------------------------------------------------------------------------------------
# Names of files

SECRET = "a secret that no client may read"
PATHS = [
    "../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "..\\secret.txt", "....//secret.txt", "secret.txt",
    "/etc/passwd", "//etc/passwd", "file:///etc/passwd", "~/.netrc", "page.js/../../site.py", "site.py\0.js", "C:\\x",
    "", ".", "..", "\0", "x" * 300,
]  # fmt: skip


@pytest.fixture(scope="module")
def opened() -> Iterator[list[str]]:
    """The paths of all files that this process opens, while somebody clears and reads it."""
    paths, ended = [], []
    sys.addaudithook(lambda event, given: paths.append(str(given[0])) if event == "open" and not ended else None)
    yield paths
    ended.append(True)  # a hook stays for ever


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """A folder with a secret, next to which a study and a log are."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "secret.txt").write_text(SECRET)
    make_study(folder, 2)
    return folder


def hold_nothing(answer, *folders: Path) -> None:
    text = answer.text
    assert SECRET not in text and "root:" not in text and "import " not in text
    for folder in (ROOT, *folders):
        assert str(folder) not in text
    assert not any(word in text for word in ("Errno", "Traceback", "No such file", "Is a directory"))


def test_no_field_that_names_something_names_a_file(secret, opened):
    image = b"\x89PNG"
    with TestClient(application(tiny_site(red_team=secret / "log.jsonl")), base_url=BASE) as client:
        opened.clear()
        for path in PATHS:
            name = quote(path, safe="")
            chat = {"messages": [{"role": "user", "content": "x"}]}
            shown = {"type": "image_url", "image_url": {"url": path}}
            label = {"id": path, "annotator": path, "turn": 2, "label": "safe"}
            logged = {"id": path, "attacker": path, "turns": said("x")}
            for answer in (
                client.get(f"/static/{name}" if path.strip(".") else "/static/..%2F"),
                client.get(f"/v1/models/{name}x"),
                client.post("/v1/chat/completions", json=chat | {"model": path + "x"}),
                client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [shown]}]}),
                client.post("/v1/images/generations", json={"prompt": "x", "model": path + "x"}),
                client.post(
                    "/api/images", params={"fit": path + "x"}, content=image, headers={"content-type": "image/png"}
                ),
                client.post("/api/images", content=path.encode(), headers={"content-type": "image/png"}),
                client.post("/api/images/decode", json={"codes": [path]}),
                client.post("/api/generate", json={"turns": [{"role": "user", "segments": [{"image": path}]}]}),
                client.post("/api/tokens", json={"turns": [{"role": "user", "segments": [{"codes": path}]}]}),
                client.post("/api/red-team", json=logged),
                client.post("/api/red-team", json=logged | {"id": str(uuid.uuid4())}),
                client.post("/api/red-team/labels", json=label),
                client.post("/api/red-team/labels", json=label | {"id": str(uuid.uuid4())}),
            ):
                assert 400 <= answer.status_code < 500, (path, answer.request.url, answer.text)
                hold_nothing(answer, secret)
        assert not [path for path in opened if "secret" in path or "passwd" in path or "netrc" in path]
    assert not (secret / "log.jsonl").exists()


def test_no_field_of_a_study_names_a_file(secret, opened):
    with TestClient(application(judge.open_site(secret / "study")), base_url=BASE) as client:
        opened.clear()
        for path in PATHS:
            name = quote(path, safe="")
            vote = {"item": path, "question": path, "answer": path, "seconds": 1.0}
            for answer in (
                client.get(f"/api/study/images/{name}x"),
                client.post("/api/study/next", json={"annotator": path + "/"}),
                client.post("/api/study/vote", json={"annotator": "ann"} | vote),
                client.post("/api/study/vote", json={"annotator": path + "/"} | vote),
                client.post("/api/study/undo", json={"annotator": "ann"} | vote),
                client.get("/api/owner/results", headers={"authorization": "Bearer key-of-nobody"}),
            ):
                assert 400 <= answer.status_code < 500, (path, answer.request.url, answer.text)
                hold_nothing(answer, secret)
        assert not [path for path in opened if "secret" in path or "passwd" in path or "owner" in path]
