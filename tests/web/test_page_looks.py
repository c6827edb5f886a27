"""What the page looks like to people who zoom, force colours, or write from right to left."""

import pytest
from browser import check_accessible
from playwright.sync_api import expect
from talk_page import say, wait_for_answer

DRAW = "please draw a big red star on white"


def test_zoom_of_400_percent_hides_nothing(visit, toy_address):
    page = visit(toy_address, width=320)
    page.set_viewport_size({"width": 320, "height": 256})
    say(page, DRAW)
    image = wait_for_answer(page).locator("img")
    image.evaluate("image => image.scrollIntoView()")
    box = image.bounding_box()
    middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    assert page.evaluate("({ x, y }) => document.elementFromPoint(x, y).tagName", middle) == "IMG"
    check_accessible(page)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_forced_colours_keep_what_colours_say(visit, toy_address, theme):
    page = visit(toy_address, theme=theme, forced_colors="active")
    tokens = page.get_by_role("button", name="Tokens", exact=True)
    looks = "button => [getComputedStyle(button).borderTopWidth, getComputedStyle(button).textDecorationLine]"
    say(page, DRAW)
    wait_for_answer(page)
    before = tokens.evaluate(looks)
    tokens.click()
    expect(page.locator(".swatch")).to_have_count(3)
    assert tokens.evaluate(looks) != before  # that it is pressed is seen
    background = "all => new Set(all.map(swatch => getComputedStyle(swatch).backgroundColor)).size"
    assert page.locator(".swatch").evaluate_all(background) == 3


def test_writing_from_right_to_left(visit, toy_address):
    page = visit(toy_address)
    words = "שלום a red circle"
    page.get_by_role("textbox", name="Message").fill(words)
    assert page.get_by_role("textbox", name="Message").evaluate("area => area.matches(':dir(rtl)')")
    page.keyboard.press("Enter")
    wait_for_answer(page)
    assert page.get_by_text(words).evaluate("said => said.matches(':dir(rtl)')")


def test_tokens_leave_the_last_answer_in_view(visit, toy_address):
    page = visit(toy_address)
    for _ in range(3):
        say(page, DRAW)
        wait_for_answer(page)
    for _ in range(2):  # on, and off again
        page.get_by_role("button", name="Tokens", exact=True).click()
        expect(page.get_by_role("button", name="Edit message")).to_be_in_viewport()


def test_tab_in_header_and_message_scrolls_nothing(visit, toy_address):
    page = visit(toy_address)
    for _ in range(4):
        say(page, DRAW)
        wait_for_answer(page)
    page.evaluate("scrollTo(0, 300)")
    for first, last in (("To the message", "Tokens"), ("Add image", "Settings")):
        page.get_by_role("button", name=first).evaluate("button => button.focus({ preventScroll: true })")
        while page.evaluate("document.activeElement.textContent") != last:
            page.keyboard.press("Tab")
            page.wait_for_function("new Promise((done) => requestAnimationFrame(() => done(true)))")
            assert page.evaluate("scrollY") == 300
