"""What the address after # sets, and what the page makes of wrong values there."""

import pytest
from playwright.sync_api import expect
from serving import served
from tiny_site import tiny_site

from nanochameleon.web.app import application


@pytest.fixture(scope="module")
def address():
    with served(application(tiny_site())) as started:
        yield started


def opened(visit, address: str):
    """The page, ready to be used."""
    page = visit(address)
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    return page


def asked_for(page) -> dict:
    """The body that the page sends for a message."""
    with page.expect_request("**/api/generate") as request:
        page.get_by_role("textbox", name="Message").fill("a red star")
        page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    return request.value.post_data_json


def test_address_sets_the_request(visit, address):
    page = opened(visit, f"{address}/#mode=draw&temperature=0.25&top_p=0.5&guidance_scale=2&seed=7&samples=2")
    asked = asked_for(page)
    assert asked["mode"] == "draw" and asked["seed"] == 7 and asked["samples"] == 2
    assert asked["options"] == {"temperature": 0.25, "top_p": 0.5, "guidance_scale": 2}
    expect(page.locator("#set")).to_have_text("draw · temperature 0.25 · top-p 0.5 · guidance 2 · answers 2 · seed 7")


WRONG = (
    "mode=hack", "temperature=-1", "temperature=1e400", "temperature=NaN", "top_p=0", "top_p=1.5", "samples=9",
    "samples=1.5", "seed=-1", "seed=99999999999999999999", "max_new_tokens=0", "fit=__proto__", "__proto__=1",
    "toString=1", "x=%E0%A4%A", "%", "<img src=x onerror=alert(1)>",
)  # fmt: skip


def test_wrong_values_are_left_out(visit, address):
    page = opened(visit, address)
    for wrong in WRONG:
        page.evaluate("hash => { location.hash = hash }", f"guidance_scale=2&{wrong}")
        expect(page).to_have_url(f"{address}/#guidance_scale=2")
        expect(page.locator("#set")).to_have_text("guidance 2")


def test_what_is_set_is_in_the_address(visit, address):
    page = opened(visit, address)
    page.get_by_role("button", name="Settings").click()
    field = page.get_by_role("textbox", name="Temperature")
    assert field.get_attribute("placeholder") == "0.7"
    field.fill("1.5")
    page.get_by_role("radio", name="chat").check()
    expect(page).to_have_url(f"{address}/#temperature=1.5&mode=chat")
    field.fill("hot")
    expect(page.get_by_role("alert").filter(has_text="Temperature must be a number of 0 or more")).to_be_visible()
    expect(page).to_have_url(f"{address}/#mode=chat")
    page.get_by_role("button", name="Reset").click()
    expect(page).to_have_url(f"{address}/")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_decimal_comma_and_tiny_numbers(visit, address):
    page = opened(visit, address)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("textbox", name="Temperature").fill("0,7")  # some keyboards have no point
    expect(page).to_have_url(f"{address}/#temperature=0.7")
    page.get_by_role("textbox", name="Temperature").fill("0.00000001")
    expect(page).to_have_url(f"{address}/#temperature=1e-8")
    page.get_by_role("textbox", name="Length").fill("1,000")
    expect(page.get_by_role("alert").filter(has_text="Length must be a whole number from 1 to")).to_be_visible()
    page.reload()
    expect(page.locator("#set")).to_have_text("temperature 1e-8")
