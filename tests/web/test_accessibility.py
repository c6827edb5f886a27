"""The Talk page is for everybody: in each of its states axe-core finds nothing, and nothing scrolls sideways.

In light and dark, on a phone (360 pixels) and a desk (1,280). All controls are reached by Tab and show their focus.
"""

import itertools

import pytest
from browser import check_accessible
from playwright.sync_api import expect
from talk_page import last_answer, message, say, wait_for_answer
from test_page_browser import DRAW, choose_file, square

WIDTHS, THEMES = (360, 1280), ("light", "dark")


def check_screens(page) -> None:
    for width, theme in itertools.product(WIDTHS, THEMES):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=theme)
        try:
            check_accessible(page)
        except AssertionError as error:
            raise AssertionError(f"{width} {theme}: {error}") from None


def empty(page) -> None:
    expect(message(page)).to_be_focused()


def draft(page) -> None:
    choose_file(page, square())
    expect(page.locator("#parts").get_by_role("img")).to_be_visible()  # images that were sent are called the same
    message(page).fill("how many squares are there?")


def talked(page) -> None:
    say(page, DRAW)
    wait_for_answer(page)
    draft(page)
    page.keyboard.press("Enter")
    wait_for_answer(page)


def tokens(page) -> None:
    say(page, DRAW)
    wait_for_answer(page)
    page.get_by_role("button", name="Tokens").click()
    listed = page.get_by_role("list", name="Tokens of the conversation")
    listed.locator(".text-token").nth(2).click()
    expect(page.locator("#token-details")).to_be_visible()


def settings(page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("textbox", name="Seed").fill("not a number")


def several(page) -> None:
    page.evaluate("location.hash = 'samples=3&temperature=1'")
    say(page, DRAW)
    wait_for_answer(page)
    last_answer(page).locator("summary").first.click()


def refused(page) -> None:
    message(page).fill("word " * 600)
    page.keyboard.press("Enter")
    expect(last_answer(page).get_by_role("alert")).not_to_be_empty()


def removed(page) -> None:
    say(page, DRAW)
    wait_for_answer(page)
    page.get_by_role("button", name="Remove").click()
    expect(page.get_by_role("button", name="Undo")).to_be_visible()


STATES = [empty, draft, talked, tokens, settings, several, refused, removed]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_state(visit, toy_address, state):
    page = visit(f"{toy_address}/#seed=3", reduced_motion="reduce")
    state(page)
    if state is refused:
        visit.expect("status of 400")
    check_screens(page)


def test_state_answering(paced_toy, visit):
    address, pace = paced_toy
    page = visit(address, reduced_motion="reduce")
    pace.hold()
    say(page, DRAW)
    pace.allow(20)
    expect(last_answer(page).get_by_role("progressbar")).to_be_visible()
    check_screens(page)
    pace.allow()
    wait_for_answer(page)


# The look of the focused element, of that element without the focus, its name, and whether it is on top on the screen.
# Words show their focus by the box around them.
LOOK_AT_FOCUS = """() => {
  const element = document.activeElement;
  if (element === document.body) return null;
  const styles = (one) => {
    const style = getComputedStyle(one);
    return [style.outlineStyle, style.outlineWidth, style.outlineColor, style.borderColor, style.boxShadow].join();
  };
  const look = () => [element, element.parentElement, element.closest(".box") ?? element].map(styles).join();
  const focused = look();
  const { left, top, width, height } = element.getBoundingClientRect();
  const above = document.elementFromPoint(left + width / 2, top + height / 2);
  element.blur();
  const blurred = look();
  element.focus({ focusVisible: true, preventScroll: true });
  element.dataset.met = "yes";
  const name = `${element.tagName} ${element.innerText || element.getAttribute("aria-label") || element.id}`;
  return { name, isMarked: focused !== blurred, isOnTop: element.contains(above) || above?.contains(element) };
}"""
UNMET = """() => [...document.querySelectorAll("a[href], button, input, select, textarea, summary")]
  .filter((one) => !one.disabled && one.tabIndex >= 0 && one.checkVisibility({ visibilityProperty: true }))
  .filter((one) => !one.dataset.met).map((one) => one.outerHTML)"""


@pytest.mark.parametrize("width", WIDTHS)
def test_every_control_is_reached_by_tab_and_shows_it(visit, toy_address, width):
    page = visit(f"{toy_address}/#seed=3", width, reduced_motion="reduce")
    talked(page)
    draft(page)
    page.evaluate("document.getElementById('skip').focus({focusVisible: true})")
    while (seen := page.evaluate(LOOK_AT_FOCUS)) is not None:
        assert seen["isMarked"] and seen["isOnTop"], seen
        page.keyboard.press("Tab")
    assert page.evaluate(UNMET) == []


def test_nothing_moves_for_those_who_want_no_motion(paced_toy, visit):
    address, pace = paced_toy
    page = visit(address, reduced_motion="reduce")
    pace.hold()
    say(page, DRAW)
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    moving = "document.getAnimations().filter(a => a.effect.getComputedTiming().duration > 1).length"
    assert page.evaluate(moving) == 0
    pace.allow()
    wait_for_answer(page)
