"""The Talk page in a real browser: what a person can do there, by mouse, keyboard, clipboard and files."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from talk_page import images, last_answer, message, say, wait_for_answer, wait_for_metric, words_of

DRAW = "please draw a big red star on white"


def square() -> bytes:
    """A PNG of a blue square on white."""
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:48, 16:48] = 40, 70, 220
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def colours(url: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)


def test_draws_then_answers_about_it(visit, toy_address):
    page = visit(f"{toy_address}/#seed=3")
    say(page, DRAW)
    [image] = images(wait_for_answer(page))
    pixels = colours(image)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 100)
    assert pixels.shape == (32, 32, 3) and red.mean() > 0.02 and (pixels.min(-1) > 200).mean() > 0.5
    assert DRAW in last_answer(page).locator("img").get_attribute("alt")
    say(page, "how many stars are there?")
    assert words_of(wait_for_answer(page)) == "one"


def test_image_appears_code_by_code(paced_toy, visit):
    address, pace = paced_toy
    page = visit(f"{address}/#seed=3")
    pace.hold()
    say(page, DRAW)
    bar, seen = last_answer(page).get_by_role("progressbar"), []
    for _ in range(4):
        pace.allow(15)
        expect(bar).to_be_visible()
        page.wait_for_function("n => document.querySelector('progress').value > n", arg=seen[-1] if seen else 0)
        seen.append(bar.evaluate("bar => bar.value"))
    assert 0 < seen[0] < seen[-1] < 64 and len(images(last_answer(page))) == 1
    pace.allow()
    wait_for_answer(page)
    expect(bar).to_be_hidden()


def test_text_is_streamed(paced_toy, visit):
    address, pace = paced_toy
    page = visit(f"{address}/#mode=text&seed=1")
    pace.hold()
    say(page, "a big red")
    lengths = [0]
    for _ in range(3):
        pace.allow(6)
        page.wait_for_function(
            "n => (document.querySelector('.turn.model .segment')?.textContent ?? '').length > n", arg=lengths[-1]
        )
        lengths.append(len(words_of(last_answer(page))))
    pace.allow()
    wait_for_answer(page)
    assert lengths[1] < lengths[3]


@pytest.mark.parametrize("how", ["click", "Escape"])
def test_stop_frees_the_slot(paced_toy, visit, how):
    address, pace = paced_toy
    page = visit(address)
    pace.hold()
    say(page, DRAW)
    pace.allow(20)
    expect(last_answer(page).get_by_role("progressbar")).to_be_visible()
    wait_for_metric(page, address, "slots_in_use", 1)
    page.get_by_role("button", name="Stop").click() if how == "click" else page.keyboard.press("Escape")
    expect(last_answer(page)).to_contain_text("stopped")
    wait_for_metric(page, address, "slots_in_use", 0)
    pace.allow()
    say(page, DRAW)
    assert len(images(wait_for_answer(page))) == 1


def test_client_that_leaves_frees_its_slot(paced_toy, visit):
    address, pace = paced_toy
    page, other = visit(address), visit(address)
    pace.hold()
    say(page, DRAW)
    pace.allow(5)
    wait_for_metric(other, address, "slots_in_use", 1)
    page.close()
    wait_for_metric(other, address, "slots_in_use", 0)


def test_two_tabs_at_once(paced_toy, visit):
    """Both answers come at the same time, through one engine."""
    address, pace = paced_toy
    page = visit(address)
    tab = page.context.new_page()
    tab.goto(address)
    pace.hold()
    say(page, DRAW)
    say(tab, "please draw a small blue circle on black")
    pace.allow(20)
    wait_for_metric(page, address, "slots_in_use", 2)
    assert page.get_by_role("button", name="Stop").is_visible() and tab.get_by_role("button", name="Stop").is_visible()
    pace.allow()
    [one], [two] = images(wait_for_answer(page)), images(wait_for_answer(tab))
    assert one != two


def drop_files(page, place, files: list[tuple[str, str, bytes]]) -> None:
    """Drop files (name, type, content) as from a file manager."""
    data = page.evaluate_handle(
        """files => {
          const data = new DataTransfer();
          for (const [name, type, content] of files) {
            const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
            data.items.add(new File([bytes], name, {type}));
          }
          return data;
        }""",
        [[name, kind, base64.b64encode(content).decode()] for name, kind, content in files],
    )
    for event in ("dragenter", "dragover", "drop"):
        place.dispatch_event(event, {"dataTransfer": data})


def paste_image(page, content: bytes) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async content => {
          const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
          await navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]);
        }""",
        base64.b64encode(content).decode(),
    )
    message(page).click()
    page.keyboard.press("Control+V")


def choose_file(page, content: bytes) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add image").click()
    chooser.value.set_files({"name": "square.png", "mimeType": "image/png", "buffer": content})


@pytest.mark.parametrize("how", ["drop", "paste", "choose"])
def test_own_image(visit, toy_address, how):
    """It is shown as the model sees it, and the model answers about it."""
    page = visit(f"{toy_address}/#seed=3")
    expect(message(page)).to_be_focused()  # the page listens
    if how == "drop":
        drop_files(page, page.locator("body"), [("square.png", "image/png", square())])
    elif how == "paste":
        paste_image(page, square())
    else:
        choose_file(page, square())
    shown = page.get_by_role("img", name="image in your message")
    expect(shown).to_be_visible()
    [url] = images(page.get_by_role("form", name="Message"))
    assert colours(url)[16, 16, 2] > 150 > 120 > colours(url)[16, 16, 0]
    say(page, "how many squares are there?")
    assert words_of(wait_for_answer(page)) == "one"
    assert images(page.locator(".turn.user")) == [url]


def test_file_that_is_no_image(visit, toy_address):
    page = visit(toy_address)
    message(page).fill("words that must stay")
    drop_files(page, page.locator("body"), [("notes.png", "image/png", b"no image at all")])
    expect(page.get_by_role("alert").filter(has_text="notes.png")).to_be_visible()
    expect(message(page)).to_have_value("words that must stay")
    visit.expect("status of 400")


def test_several_samples(visit, toy_address):
    """One is chosen to continue with."""
    page = visit(f"{toy_address}/#samples=3&seed=5&temperature=1")
    say(page, "please draw a blue circle on black")
    answer = wait_for_answer(page)
    drawn = images(answer)
    assert len(drawn) == 3 and len(set(drawn)) > 1
    answer.get_by_role("radio").nth(1).check()
    say(page, "what is in the image?")
    wait_for_answer(page)
    assert images(page.locator(".turn.model").first) == [drawn[1]]


def test_same_settings_same_image(visit, toy_address):
    """The address of the page keeps the settings: sent to somebody else, it gives the same answers."""
    page = visit(toy_address)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("textbox", name="Seed").fill("11")
    page.get_by_role("textbox", name="Temperature").fill("0.9")
    page.get_by_role("textbox", name="Guidance").fill("2")
    page.keyboard.press("Escape")
    say(page, DRAW)
    [first] = images(wait_for_answer(page))
    other = visit(page.url)
    other.get_by_role("button", name="Settings").click()
    expect(other.get_by_role("textbox", name="Guidance")).to_have_value("2")
    other.keyboard.press("Escape")
    say(other, DRAW)
    assert images(wait_for_answer(other)) == [first]


def test_reload_keeps_conversation_and_draft(visit, toy_address):
    page = visit(f"{toy_address}/#seed=3")
    say(page, DRAW)
    drawn = images(wait_for_answer(page))
    page.keyboard.type("how many sta")
    page.reload()
    expect(message(page)).to_have_value("how many sta")
    assert images(last_answer(page)) == drawn
    page.keyboard.type("rs are there?")
    page.keyboard.press("Enter")
    assert words_of(wait_for_answer(page)) == "one"


def save(page) -> bytes:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    assert download.value.suggested_filename.endswith(".json")
    return download.value.path().read_bytes()


def open_saved(page, content: bytes, name: str = "saved.json") -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Open").click()
    chooser.value.set_files({"name": name, "mimeType": "application/json", "buffer": content})


def test_saved_conversation_is_opened_by_somebody_else(visit, toy_address):
    page = visit(f"{toy_address}/#seed=3&temperature=0.6")
    choose_file(page, square())
    say(page, "how many squares are there?")
    wait_for_answer(page)
    say(page, DRAW)
    wait_for_answer(page)
    saved, shown = save(page), images(page.locator("#thread"))
    assert json.loads(saved)["turns"][0]["segments"][1] == {"text": "how many squares are there?"}
    other = visit(toy_address)
    open_saved(other, saved)
    expect(other.locator(".turn")).to_have_count(4)
    assert images(other.locator("#thread")) == shown and len(shown) == 2
    assert save(other) == saved
    say(other, "how many stars are there?")
    assert words_of(wait_for_answer(other)) == "one"


def test_server_that_restarts(restarting_toy, visit):
    """Nothing that was written is lost, and the page works again once the server does."""
    with restarting_toy() as address:
        page = visit(f"{address}/#seed=3")
        say(page, DRAW)
        drawn = images(wait_for_answer(page))
    say(page, "how many stars are there?")
    expect(last_answer(page).get_by_role("alert")).to_contain_text("the server does not answer")
    with restarting_toy():
        expect(page.get_by_role("status")).to_contain_text("The server is back.")
        visit.expect("ERR_CONNECTION_REFUSED")
        page.get_by_role("button", name="Send again").click()
        assert words_of(wait_for_answer(page)) == "one"
        assert images(page.locator(".turn.model").first) == drawn


def test_token_view(visit, toy_address):
    """The sequence as the model sees it: 64 codes an image, specials by name, the details of a token on focus."""
    page = visit(f"{toy_address}/#seed=3")
    say(page, DRAW)
    wait_for_answer(page)
    page.get_by_role("button", name="Tokens").click()
    tokens = page.get_by_role("list", name="Tokens of the conversation")
    expect(tokens.locator(".image-token")).to_have_count(64)
    names = tokens.locator(".special-token").all_inner_texts()
    assert names[0] == "<s>" and names.count("<boi>") == names.count("<eoi>") == 1
    tokens.locator(".image-token").nth(10).hover()
    expect(page.locator("#token-details")).to_contain_text("row 2, column 3")
    tokens.locator(".text-token").first.click()
    before = page.locator("#token-details").inner_text()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token-details")).not_to_have_text(before)
    say(page, "how many stars are there?")  # the view follows the conversation
    wait_for_answer(page)
    expect(tokens.locator(".text-token").last).to_have_text("one")


def focused(page) -> str:
    return page.evaluate("document.activeElement.innerText || document.activeElement.getAttribute('aria-label')")


def tab_to(page, name: str, key: str = "Tab") -> None:
    """Press Tab until a control has the focus."""
    for _ in range(40):
        page.keyboard.press(key)
        if (focused(page) or "").startswith(name):
            return
    raise AssertionError(f"Tab does not reach {name}")


def test_keyboard_alone(paced_toy, visit):
    """Without a mouse: settings, an image from a file, words, stop, again, move and remove a part, save, tokens."""
    address, pace = paced_toy
    page = visit(address)
    expect(message(page)).to_be_focused()
    tab_to(page, "Settings")
    page.keyboard.press("Enter")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "set-seed":
            break
    page.keyboard.type("3")
    page.keyboard.press("Escape")
    assert "seed=3" in page.url and focused(page).startswith("Settings")
    tab_to(page, "Add image", "Shift+Tab")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "square.png", "mimeType": "image/png", "buffer": square()})
    expect(page.get_by_role("img", name="image in your message")).to_be_visible()
    tab_to(page, "Message", "Shift+Tab")
    page.keyboard.type("how many squares are there?")
    pace.hold()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(last_answer(page)).to_contain_text("stopped")
    pace.allow()
    tab_to(page, "Again", "Shift+Tab")
    page.keyboard.press("Enter")
    assert words_of(wait_for_answer(page).locator(".answer").last) == "one"
    tab_to(page, "Tokens", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("list", name="Tokens of the conversation").locator(".image-token")).to_have_count(64)
    tab_to(page, "<s>")
    page.keyboard.press("ArrowRight")
    assert focused(page).startswith("<boi>")
