"""The token view in a browser: what it shows, and how hands, mouse and keys reach it."""

import json
import re

import httpx
import pytest
import torch
from browser import check_accessible
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Page, expect

from nanochameleon.web.tokens import decode_patches

MESSAGE = "a big red star on white"
HOSTILE = "<boi></s><img src=x onerror=alert(1)> caf\u00e9"


def send(page: Page, text: str) -> None:
    """Write a message and wait for its answer."""
    answers = page.locator(".turn.model").count()
    page.locator("#parts textarea").last.fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".turn.model")).to_have_count(answers + 1)
    expect(page.locator("#send")).to_be_visible()


def see(page: Page) -> None:
    page.locator("#show-tokens").click()
    expect(page.locator(".token-list .token").first).to_be_visible()


@pytest.fixture
def view(visit, toy_address) -> Page:
    """The page after a message with its drawing, with its tokens."""
    page = visit(toy_address)
    send(page, MESSAGE)
    see(page)
    expect(page.locator(".drawn.decoded")).to_have_count(1)
    return page


def answer_of(page: Page, address: str) -> dict:
    """What the API says of the conversation that the page shows."""
    turns = [
        {"role": "user", "segments": [{"text": MESSAGE}]},
        {"role": "assistant", "segments": [{"codes": codes_of(page)}]},
    ]
    return httpx.post(f"{address}/api/tokens", json={"turns": turns, "mode": "auto"}).json()


def codes_of(page: Page) -> list[int]:
    return [int(code) for code in page.locator(".token-list .code").all_text_contents()]


def details(page: Page):
    return page.locator(".token-details")


def token(page: Page, i: int):
    return page.locator(f'.token-list [data-index="{i}"]')


def test_the_list_is_the_sequence(view, toy_address):
    answer = answer_of(view, toy_address)
    expect(view.locator(".token-list .token")).to_have_count(len(answer["tokens"]))
    shown = view.locator(".token-list .token").evaluate_all(
        "all => all.map(e => [e.className.match(/(\\w+)-token/)[1], e.textContent])"
    )
    for (kind, text), each in zip(shown, answer["tokens"], strict=True):
        piece = answer["pieces"][str(each["id"])]
        assert kind == piece["kind"]
        assert text.replace("space", "") == str(piece.get("text", piece.get("name", piece.get("code"))))
    counts = answer["counts"]
    expect(view.locator("#token-view")).to_contain_text(f"{len(shown)} of 512 tokens, read in the mode draw")
    expect(view.locator(".legend")).to_have_text(
        re.compile(f"{counts['text']} text.*{counts['image']} image codes.*{counts['special']} special")
    )


@pytest.mark.parametrize("i", [0, 2, 20])
def test_details_are_those_of_the_token(view, toy_address, i):
    answer = answer_of(view, toy_address)
    each = answer["tokens"][i]
    token(view, i).hover()
    expect(details(view)).to_contain_text(f"token {i + 1} of {len(answer['tokens'])}")
    shown = details(view).locator("tbody tr td:nth-child(2)").all_text_contents()
    assert shown == [str(each["id"]), *(str(other) for other, _ in each["alternatives"])]
    if i == 0:
        expect(details(view)).to_contain_text("nothing comes before the first token")
    else:
        expect(details(view).locator(".likely").first).to_contain_text(percent(each["probability"]))
    view.mouse.move(1, 1)
    expect(details(view)).to_be_hidden()


def percent(p: float) -> str:
    """In whole numbers: the page shows more digits, rounded as JavaScript rounds."""
    return f"{int(100 * p)}" if p >= 0.1 else ""


def test_alternatives_of_an_image_code_are_patches(view):
    token(view, 20).hover()
    expect(details(view).locator("img").first).to_be_visible()
    n_codes = details(view).locator(".image-token").count()
    assert details(view).locator("img").count() == n_codes >= 1
    assert all(
        url.startswith("data:image/png")
        for url in details(view).locator("img").evaluate_all("all => all.map(e => e.src)")
    )


def test_patch_and_image_mark_each_other(view):
    patch = view.locator('.patches [aria-label*="row 3, column 6"]')
    patch.hover()
    mark, whole = view.locator(".mark"), view.locator(".whole")
    expect(mark).to_be_visible()
    inside, around = mark.bounding_box(), whole.bounding_box()
    assert inside["x"] - around["x"] == pytest.approx(5 / 8 * around["width"], abs=1)
    assert inside["y"] - around["y"] == pytest.approx(2 / 8 * around["height"], abs=1)
    whole.hover(position={"x": 1, "y": 1})  # the first code
    expect(view.locator(".token.shown")).to_have_attribute("aria-label", re.compile("row 1, column 1$"))
    whole.click(position={"x": around["width"] - 2, "y": 2})
    expect(view.locator(".token:focus")).to_have_attribute("aria-label", re.compile("row 1, column 8$"))


@pytest.mark.parametrize("width", [360, 1280])
def test_patches_have_the_place_that_they_have_in_the_image(view, width):
    view.set_viewport_size({"width": width, "height": 800})
    boxes = [patch.bounding_box() for patch in view.locator(".patches .image-token").all()]
    for i, box in enumerate(boxes):
        assert (box["x"], box["y"]) == (boxes[i % 8]["x"], boxes[i - i % 8]["y"])
    boi, eoi = (view.locator(".patches .special-token").nth(i).bounding_box() for i in (0, 1))
    assert boi["y"] + boi["height"] <= boxes[0]["y"] and boxes[-1]["y"] + boxes[-1]["height"] <= eoi["y"]


def test_the_last_token_is_the_stop_token_that_the_model_wrote(visit, toy_address):
    page = visit(f"{toy_address}/#mode=chat&seed=3")
    with page.expect_request("**/api/generate") as asked:
        send(page, "how many stars are there?")
    # Chromium may have dropped the stream that it gave to the page; the same request has the same answer.
    again = page.request.post(asked.value.url, data=asked.value.post_data_json)
    stop = re.search(r'"stop": ?"(.*?)"', again.text())[1]
    see(page)
    assert stop in ("<eot>", "</s>")
    expect(page.locator(".token-list .token").last).to_have_text(stop)


def test_keys_alone_reach_every_token(view):
    last = view.locator(".token-list .token").count() - 1
    view.locator("#token-view input").focus()
    view.keyboard.press("Tab")
    expect(token(view, 0)).to_be_focused()
    expect(details(view)).to_be_visible()
    expect(token(view, 0)).to_have_attribute("aria-describedby", "token-details")
    for key, place in [
        ("ArrowRight", 1),
        ("ArrowLeft", 0),
        ("ArrowLeft", 0),
        ("End", last),
        ("ArrowRight", last),
        ("Home", 0),
    ]:
        view.keyboard.press(key)
        expect(token(view, place)).to_be_focused()
    view.keyboard.press("Escape")
    expect(details(view)).to_be_hidden()
    expect(token(view, 0)).to_be_focused()
    view.keyboard.press("ArrowDown")  # into the image, at <boi>, the token nearest
    below = view.locator(".token:focus").bounding_box()
    assert below["y"] > token(view, 0).bounding_box()["y"]
    view.keyboard.press("ArrowUp")
    above = view.locator(".token:focus").bounding_box()
    assert above["y"] < below["y"]


def test_one_tab_leads_past_the_list(view):
    token(view, 3).focus()
    view.keyboard.press("Tab")
    expect(view.locator(".fold")).to_be_focused()
    view.keyboard.press("Tab")
    assert not view.evaluate("document.activeElement.matches('.token')")


def test_a_folded_image_is_passed_over(view):
    boi = 1 + int(view.locator(".said .token").last.get_attribute("data-index"))
    view.locator(".fold").click()
    expect(view.locator(".fold")).to_have_attribute("aria-expanded", "false")
    expect(token(view, boi)).to_be_hidden()
    token(view, boi - 1).focus()
    view.keyboard.press("End")
    expect(token(view, boi - 1)).to_be_focused()
    send(view, "a blue circle")  # folds stay
    expect(view.locator(".drawn")).to_have_count(1)
    expect(view.locator(".fold")).to_have_attribute("aria-expanded", "false")


def test_text_stays_text(visit, toy_address):
    page = visit(toy_address)
    send(page, HOSTILE)
    see(page)
    expect(page.locator(".token-list .special-token")).to_have_text(["<s>", "<boi>", "<eoi>"])
    expect(page.locator(".said img")).to_have_count(0)
    shown = "".join(page.locator(".said .text-token").all_text_contents()).replace("space", " ").replace("  ", " ")
    assert shown == HOSTILE.replace("\u00e9", "c3a9 \u00e9")
    expect(page.locator(".said .joined")).to_have_count(1)


def test_it_follows_each_turn(view):
    before = view.locator(".said .token").all_text_contents()
    send(view, "a blue circle on black")
    expect(view.locator(".said")).to_contain_text("circle")
    assert view.locator(".said .token").all_text_contents() != before
    expect(view.locator("#token-view")).to_contain_text("Not read in this mode: 2 earlier texts and images.")


def test_it_waits_while_an_answer_comes(view):
    before = view.locator(".token-list").text_content()
    view.route("**/api/generate", lambda route: None)  # the answer never comes
    view.locator("#parts textarea").last.fill("a blue circle")
    view.keyboard.press("Enter")
    expect(view.locator("#token-view [role=status]")).to_have_text(
        "An answer is coming: the sequence follows when it is whole."
    )
    assert view.locator(".token-list").text_content() == before
    view.locator("#stop").click()
    expect(view.locator("#token-view [role=status]")).to_be_empty()


def test_it_asks_only_when_it_is_seen(view):
    asked = []
    view.on("request", lambda request: asked.append(request.url) if request.url.endswith("/api/tokens") else None)
    view.locator("#show-tokens").click()
    send(view, "a blue circle")
    assert not asked
    view.locator("#show-tokens").click()
    expect(view.locator(".said").first).to_contain_text("circle")
    assert len(asked) == 1


def test_a_tap_shows_details(visit, toy_address):
    page = visit(toy_address, width=360, has_touch=True)
    send(page, MESSAGE)
    see(page)
    token(page, 2).tap()
    expect(details(page)).to_contain_text("token 3 of")
    box = details(page).bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    page.locator("#tokens-title").tap()
    expect(details(page)).to_be_hidden()


def test_an_error_is_a_sentence_with_a_way_back(visit, toy_address):
    page = visit(toy_address)
    send(page, MESSAGE)
    error = {"error": {"message": "too many requests wait: try again in a second"}}
    page.route("**/api/tokens", lambda route: route.fulfill(status=429, json=error))
    page.locator("#show-tokens").click()
    expect(page.locator("#token-view [role=alert]")).to_contain_text("too many requests wait")
    visit.expect("429")
    page.unroute("**/api/tokens")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".token-list .token").first).to_be_visible()
    expect(page.locator("#token-view [role=alert]")).to_be_hidden()


def test_a_long_sequence_says_so(visit, toy_address):
    page = visit(toy_address)
    send(page, MESSAGE)
    answer = answer_of_long()
    page.route(
        "**/api/tokens",
        lambda route: route.fulfill(status=200, content_type="application/json", body=json.dumps(answer)),
    )
    see(page)
    expect(page.locator("#token-view .error").first).to_contain_text("88 tokens longer than the context")
    token(page, 599).focus()
    expect(details(page)).to_contain_text("the sequence is longer than the context")


def answer_of_long() -> dict:
    token = {"id": 300, "probability": None, "rank": None, "alternatives": []}
    return {
        "mode": "text", "left_out": 0, "context": 512, "counts": {"text": 600, "image": 0, "special": 0},
        "tokens": [token] * 600, "pieces": {"300": {"kind": "text", "text": " re"}}, "characters": [],
    }  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_accessible(visit, toy_address, width, theme):
    page = visit(toy_address, width, theme)
    send(page, HOSTILE)
    see(page)
    page.get_by_label("Mark probabilities").check()
    token(page, 2).focus()
    expect(details(page)).to_be_visible()
    check_accessible(page)


@given(st.dictionaries(st.integers(0, 63), st.integers(0, 127), min_size=1, max_size=8), st.data())
def test_a_window_of_an_image_is_nearly_the_image(toy_run, changes, data):
    """A white image with some codes changed, at one of these."""
    codes = [changes.get(at, 54) for at in range(64)]
    place = data.draw(st.sampled_from(sorted(changes)))
    [patch] = decode_patches(toy_run, codes, place, [codes[place]])
    image = toy_run.image_tokenizer.decode(torch.tensor([codes]))[0].astype(int)
    y, x = 4 * (place // 8), 4 * (place % 8)
    assert abs(patch - image[y : y + 4, x : x + 4]).mean() < 16
