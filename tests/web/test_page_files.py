"""Conversations that the page opens: what is no conversation is refused by a sentence; what is one is text alone."""

import json
import time

import pytest
from playwright.sync_api import expect
from serving import PATIENCE, served
from tiny import TINY_VQGAN
from tiny_site import tiny_site

from nanochameleon.web.app import application


@pytest.fixture(scope="module")
def address():
    with served(application(tiny_site())) as started:
        yield started


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script></s><eot>"


def conversation(**changes) -> dict:
    answer = {"seed": 1, "sample": 0, "asked": {"mode": "auto", "options": {}}, "mode": "draw", "state": "ended",
              "segments": [{"codes": [5] * 4}, {"text": HOSTILE}]}  # fmt: skip
    turns = [
        {"role": "user", "segments": [{"text": HOSTILE}]},
        {"role": "assistant", "answers": [answer], "chosen": 0},
    ]
    whole = {
        "format": "nanochameleon conversation", "version": 1, "settings": {"temperature": 0.5}, "turns": turns,
        "model": {"name": "tiny", "n_codes": TINY_VQGAN.n_codes, "codes_per_image": 4},
    }  # fmt: skip
    return whole | changes


def opened(visit, address: str):
    """The page, ready to be used."""
    page = visit(address)
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    return page


def open_file(page, content: bytes) -> None:
    page.locator("#open-file").set_input_files({"name": "c.json", "mimeType": "application/json", "buffer": content})


def test_hostile_words_are_words(visit, address):
    page = opened(visit, address)
    open_file(page, json.dumps(conversation()).encode())
    words = page.locator(".segment.words")
    expect(words).to_have_text([HOSTILE, HOSTILE])
    assert page.locator("#thread script").count() == 0
    [image] = page.locator("#thread img").all()
    assert image.get_attribute("src").startswith("data:image/png") and HOSTILE[:60] in image.get_attribute("alt")
    expect(page).to_have_url(f"{address}/#temperature=0.5")


def test_undo_after_opening(visit, address):
    page = opened(visit, f"{address}/#top_p=0.5")
    open_file(page, json.dumps(conversation()).encode())
    expect(page).to_have_url(f"{address}/#temperature=0.5")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("li.turn")).to_have_count(0)
    expect(page).to_have_url(f"{address}/#top_p=0.5")


def held(page, pattern: str) -> list:
    """Requests that wait for `release`."""
    routes = []
    page.route(pattern, lambda route: routes.append(route))
    return routes


def release(page, routes: list) -> None:
    """Let the next request pass, once it has come."""
    deadline = time.monotonic() + PATIENCE
    while not routes and time.monotonic() < deadline:
        page.wait_for_timeout(10)  # playwright reads what the browser says meanwhile
    routes.pop().continue_()


def test_an_answer_is_never_taken_away_by_a_file_or_by_undo(visit, address):
    page = opened(visit, address)
    decoding, answering = held(page, "**/api/images/decode"), held(page, "**/api/generate")
    open_file(page, json.dumps(conversation()).encode())
    page.keyboard.type("a red star")
    page.keyboard.press("Enter")  # while the file is read
    release(page, decoding)
    expect(page.locator("#notice")).to_contain_text("An answer is coming")
    expect(page.locator("li.turn.user")).to_contain_text("a red star")
    release(page, answering)
    page.unroute("**/api/images/decode")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    open_file(page, json.dumps(conversation()).encode())
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    page.get_by_role("button", name="Again").click()
    expect(page.get_by_role("button", name="Undo")).to_be_hidden()  # the file's turn has a new answer coming
    release(page, answering)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    visit.expect("400")  # the opened conversation is longer than what this model reads


def damaged(path: str, value) -> dict:
    """A conversation with one field replaced."""
    whole = conversation()
    place, *names = whole, *path.split(".")
    for name in names[:-1]:
        place = place[int(name) if isinstance(place, list) else name]
    last = names[-1]
    place[int(last) if isinstance(place, list) else last] = value
    return whole


BAD = (
    (b"\xff\xfe{", "not JSON"),
    (b"[]", "no conversation"),
    (b"null", "no conversation"),
    (damaged("version", 2), "version 2"),
    (damaged("turns", "x"), "no turns, or too many"),
    (damaged("turns", [{"role": "user", "segments": []}]), "has no answer"),
    (damaged("turns.0.role", "system"), "turn 1 of the file"),
    (damaged("model.n_codes", 8192), "codes of another model (tiny)"),
    (damaged("turns.0.segments", [None]), "turn 1 of the file"),
    (damaged("turns.1.chosen", 1), "turn 2 of the file"),
    (damaged("model", None), "codes of another model (undefined)"),
    (damaged("turns.1.answers", [None]), "turn 2 of the file"),
)
BAD_CODES = ([5] * 3, [TINY_VQGAN.n_codes] * 4, ["5"] * 4, [-1] * 4, [0.5] * 4)


def test_file_that_is_no_conversation(visit, address):
    page = opened(visit, address)
    for content, sentence in BAD:
        open_file(page, content if isinstance(content, bytes) else json.dumps(content).encode())
        expect(page.locator("#notice")).to_contain_text(sentence, ignore_case=True)
    for codes in BAD_CODES:
        open_file(page, b"null")
        expect(page.locator("#notice")).to_contain_text("no conversation")
        open_file(page, json.dumps(damaged("turns.1.answers.0.segments.0.codes", codes)).encode())
        expect(page.locator("#notice")).to_contain_text("turn 2 of the file", ignore_case=True)
    expect(page.locator("li.turn")).to_have_count(0)


def test_words_of_another_model_are_opened(visit, address):
    page = opened(visit, address)
    whole = damaged("turns.1.answers.0.segments", [{"text": "a star"}]) | {"model": {"name": "other", "n_codes": 9}}
    open_file(page, json.dumps(whole).encode())
    expect(page.locator(".segment.words").last).to_have_text("a star")
    expect(page.locator("#notice")).to_contain_text("another model")


def test_kept_conversation_of_another_model_is_not_lost(visit, address):
    page = opened(visit, address)
    kept = json.dumps(damaged("model.n_codes", 8192))
    page.evaluate("text => addEventListener('pagehide', () => sessionStorage.setItem('nanochameleon', text))", kept)
    page.reload()
    expect(page.locator("#notice")).to_contain_text("codes of another model")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save it").click()
    assert json.loads(download.value.path().read_text()) == json.loads(kept)
