"""The page's own files: what is served, as what, and that nothing else of the disk is."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scopes import ask
from starlette.testclient import TestClient
from tiny_site import tiny_site

from nanochameleon.web.app import application
from nanochameleon.web.static_files import FOLDER, TYPES, read_files

NAMES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def client():
    return TestClient(application(tiny_site()), base_url="http://127.0.0.1")


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_served_whole_with_its_type(client, name):
    answer = client.get(f"/static/{name}")
    assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == f"{TYPES[Path(name).suffix]}; charset=utf-8"


def test_a_browser_that_has_a_file_gets_304(client):
    answer = client.get("/static/style.css")
    tag = answer.headers["etag"]
    for tags, status in ((tag, 304), (f'"x", {tag}', 304), ('"x"', 200), (tag[:-2] + '"', 200), ("", 200)):
        again = client.get("/static/style.css", headers={"if-none-match": tags})
        assert again.status_code == status and again.headers["etag"] == tag
        assert again.content == (b"" if status == 304 else answer.content)


def test_files_that_differ_have_tags_that_differ():
    tags = [file.etag for file in read_files().values()]
    assert len(set(tags)) == len({file.content for file in read_files().values()})


OTHERS = [
    "../app.py", "..", ".", "../static/page.js", "..\\app.py", "/etc/passwd", "page.js/", "page.js\0", "PAGE.JS",
    "page.js.", "%2e%2e/app.py", "%2e%2e%2fapp.py", "....//app.py", "page", "", "page.js;x", "C:page.js",
    "page.js::$DATA", "\ufffd",
]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_name_is_served(client, name):
    """The names as they are once the server has decoded them. Nothing of the disk is in the answer."""
    status, body = ask(client.app, path=f"/static/{name}")
    assert status == 404 and set(json.loads(body)) == {"error"} and b"app.py" not in body and b"directory" not in body


def test_files_are_read_at_the_start_and_not_again(client, monkeypatch):
    monkeypatch.setattr(Path, "open", None)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert client.get("/static/page.js").status_code == client.get("/").status_code == 200


class References(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.addresses += [
            value for name, value in attributes if name in ("src", "href") and not value.startswith(("#", "data:"))
        ]
        self.inline += [name for name, _ in attributes if name == "style" or name.startswith("on")]
        self.inline += [tag] * (tag == "style" or (tag == "script" and "src" not in dict(attributes)))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".html")])
def test_a_page_has_nothing_inline_and_names_files_that_are_there(client, name):
    page = References((FOLDER / name).read_text(encoding="utf-8"))
    assert page.addresses and page.inline == []
    assert [each for each in page.addresses if client.get(each).status_code != 200] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".js", ".css"))])
def test_a_script_or_style_names_files_that_are_there_and_none_elsewhere(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    imports = re.findall(r"""(?:from|import|import\()\s*["']\.?/?(?:static/)?([^"']+)["']""", text)
    assert [each for each in imports if each not in NAMES] == []
    assert re.findall(r"https?://(?!www\.w3\.org/)[^\s\"'`)]+", text) == []
    assert re.findall(r"\binnerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function\b", text) == []
