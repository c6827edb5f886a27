"""The Talk page in a real browser: what a person can do there, by mouse, keyboard, clipboard and files."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from server_process import ServerProcess
from talk_page import images, last_answer, message, say, wait_for_answer, wait_for_metric, words_of

DRAW = "please draw a big red star on white"


def star() -> bytes:
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


def test_image_appears_code_by_code(visit, paced_toy):
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


def test_text_is_streamed(visit, paced_toy):
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
    assert lengths[1] < lengths[3]


@pytest.mark.parametrize("how", ["click", "Escape"])
def test_stop_frees_the_slot(visit, paced_toy, how):
    address, pace = paced_toy
    page = visit(address)
    pace.hold()
    say(page, DRAW)
    pace.allow(20)
    expect(last_answer(page).get_by_role("progressbar")).to_be_visible()
    wait_for_metric(page, address, "slots_in_use", 1)
    page.get_by_role("button", name="Stop").click() if how == "click" else page.keyboard.press("Escape")
    expect(last_answer(page)).to_contain_text("stopped")
    visit.expect("failed: POST .*/api/generate net::ERR_ABORTED")
    wait_for_metric(page, address, "slots_in_use", 0)
    pace.allow()
    say(page, DRAW)
    assert len(images(wait_for_answer(page))) == 1


def test_client_that_leaves_frees_its_slot(visit, paced_toy):
    address, pace = paced_toy
    page, other = visit(address), visit(address)
    pace.hold()
    say(page, DRAW)
    pace.allow(5)
    wait_for_metric(other, address, "slots_in_use", 1)
    page.close()
    wait_for_metric(other, address, "slots_in_use", 0)
    visit.problems.clear()


def test_two_tabs_at_once(visit, paced_toy):
    """Both answers come at the same time, through one engine."""
    address, pace = paced_toy
    page = visit(f"{address}/#seed=1")
    tab = page.context.new_page()
    tab.goto(f"{address}/#seed=2")
    pace.hold()
    say(page, DRAW)
    say(tab, DRAW)
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
    chooser.value.set_files({"name": "star.png", "mimeType": "image/png", "buffer": content})


@pytest.mark.parametrize("how", ["drop", "paste", "choose"])
def test_own_image(visit, toy_address, how):
    """It is shown as the model sees it, and the model answers about it."""
    page = visit(f"{toy_address}/#seed=3")
    if how == "drop":
        drop_files(page, page.locator("body"), [("star.png", "image/png", star())])
    elif how == "paste":
        paste_image(page, star())
    else:
        choose_file(page, star())
    shown = page.get_by_role("img", name="image in your message")
    expect(shown).to_be_visible()
    [url] = images(page.get_by_role("form", name="Message"))
    assert colours(url)[16, 16, 2] > 150 > 120 > colours(url)[16, 16, 0]
    say(page, "how many squares are there?")
    assert words_of(wait_for_answer(page)) == "one"
    assert images(page.locator(".turn.user")) == [url]


def test_file_that_is_no_image(visit, toy_address):
    page = visit(toy_address)
    page.keyboard.type("words that must stay")
    drop_files(page, page.locator("body"), [("notes.png", "image/png", b"no image at all")])
    expect(page.get_by_role("alert").filter(has_text="notes.png")).to_be_visible()
    expect(message(page)).to_have_value("words that must stay")
    visit.expect("status of 4")


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


def test_save_reload_open(visit, toy_address):
    page = visit(f"{toy_address}/#seed=3")
    say(page, DRAW)
    drawn = images(wait_for_answer(page))
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    saved = download.value.path().read_bytes()
    assert json.loads(saved) and download.value.suggested_filename.endswith(".json")
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Open").click()
    chooser.value.set_files({"name": "saved.json", "mimeType": "application/json", "buffer": saved})
    expect(page.locator(".turn")).to_have_count(2)
    assert images(last_answer(page)) == drawn
    say(page, "how many stars are there?")
    assert words_of(wait_for_answer(page)) == "one"


def test_server_that_restarts(visit, tmp_path):
    """Nothing that was written is lost, and the page works again once the server does."""
    with ServerProcess(tmp_path / "log", "models/toy") as server:
        page = visit(f"{server.address}/#seed=3")
        say(page, DRAW)
        drawn = images(wait_for_answer(page))
        server.kill()
        say(page, "how many stars are there?")
        expect(page.get_by_role("alert").filter(has_text="the server does not answer")).to_be_visible()
        visit.expect("ERR_CONNECTION_REFUSED")
        server.start()
        page.get_by_role("button", name="Send again").click()
        assert words_of(wait_for_answer(page)) == "one"
        assert images(page.locator(".turn.model").first) == drawn
