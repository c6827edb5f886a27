"""What one sees of the Talk page at 360 and 1,280 pixels: nothing is cut, covered or broken."""

import pytest
from playwright.sync_api import expect
from talk_page import last_answer, message, say, wait_for_answer
from test_accessibility import WIDTHS, draft, refused, several

IS_CUT = "area => area.scrollHeight > area.clientHeight"


@pytest.mark.parametrize("width", WIDTHS)
def test_all_words_of_the_message_are_seen(visit, toy_address, width):
    page = visit(toy_address, width)
    draft(page)
    assert not message(page).evaluate(IS_CUT)
    page.set_viewport_size({"width": 320, "height": 800})
    page.wait_for_function(f"!({IS_CUT})(document.querySelector('#parts textarea'))")


def test_what_is_refused_is_to_be_edited(visit, toy_address):
    """To send it again would fail again, also after the page was loaded again."""
    page = visit(toy_address)
    refused(page)
    visit.expect("status of 400")
    for _ in range(2):
        expect(last_answer(page).get_by_role("alert")).to_contain_text("a context of 512: shorten it")
        shown = last_answer(page).locator(".foot button:visible")
        assert shown.all_inner_texts() == ["Edit message", "Remove"]
        page.reload()
    page.get_by_role("button", name="Edit message").click()
    expect(message(page)).to_have_value(("word " * 600).strip())


@pytest.mark.parametrize("width", WIDTHS)
def test_several_answers_fill_the_width_and_numbers_stay_whole(visit, toy_address, width):
    page = visit(f"{toy_address}/#seed=1234567", width)
    several(page)
    cards = page.locator(".several .answer")
    right = max(box["x"] + box["width"] for box in map(lambda card: card.bounding_box(), cards.all()))
    thread = page.locator("#thread").bounding_box()
    assert abs(right - thread["x"] - thread["width"]) < 2
    for number in page.locator(".about[open] dd").all():
        assert number.bounding_box()["height"] < 30, number.inner_text()
    assert page.locator(".about[open] dl").first.evaluate("list => list.scrollWidth <= list.clientWidth")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_newest_answer_is_in_sight(visit, toy_address, width):
    page = visit(toy_address, width)
    for _ in range(3):
        say(page, "please draw a big red star on white")
        wait_for_answer(page)
        check_in_sight(page)


def check_in_sight(page) -> None:
    """The last image and the buttons under it are between the header and the message."""
    top = page.locator(".top").bounding_box()
    image, foot = last_answer(page).locator("img").bounding_box(), last_answer(page).locator(".foot").bounding_box()
    assert image["y"] >= top["y"] + top["height"]
    assert foot["y"] + foot["height"] <= page.locator("#composer").bounding_box()["y"]
