"""What a person does on the Talk page: types, sends, waits, looks. Used by the tests of that page."""

import re
import time

from playwright.sync_api import Locator, Page, expect
from serving import PATIENCE


def message(page: Page) -> Locator:
    """Where words are written; the last such place, if images divide the message."""
    return page.get_by_role("textbox", name="Message").last


def say(page: Page, words: str) -> None:
    """Type words and press Enter."""
    message(page).click()
    page.keyboard.type(words)
    page.keyboard.press("Enter")


def wait_for_answer(page: Page) -> Locator:
    """The last answer, when it is whole."""
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    return last_answer(page)


def last_answer(page: Page) -> Locator:
    return page.locator(".turn.model").last


def images(element: Locator) -> list[str]:
    """The addresses of the images that it shows, decoded by the browser."""
    shown = element.locator("img:visible")
    shown.evaluate_all("images => Promise.all(images.map(image => image.decode()))")
    return shown.evaluate_all("images => images.map(image => image.src)")


def words_of(element: Locator) -> str:
    return "\n".join(element.locator(".segment.words").all_inner_texts())


def wait_for_metric(page: Page, address: str, name: str, value: float) -> None:
    deadline = time.monotonic() + PATIENCE
    while (found := metric(page, address, name)) != value:
        assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
        page.wait_for_timeout(20)


def metric(page: Page, address: str, name: str) -> float:
    """The sum of a metric over its labels."""
    text = page.request.get(f"{address}/metrics").text()
    return sum(float(value) for value in re.findall(rf"^nanochameleon_{name}(?:\{{.*\}})? (\S+)$", text, re.M))
