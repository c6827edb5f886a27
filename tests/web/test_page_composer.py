"""The message that is written: words and images in the order in which they stand, by keyboard alone."""

import io

import pytest
from PIL import Image
from playwright.sync_api import expect
from serving import served
from tiny_site import tiny_site

from nanochameleon.web.app import application


@pytest.fixture(scope="module")
def address():
    with served(application(tiny_site())) as started:
        yield started


def png(colour: str) -> dict:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return {"name": f"{colour}.png", "mimeType": "image/png", "buffer": file.getvalue()}


def parts(page) -> list[str]:
    """The words of each part, or "image"."""
    return page.locator("#parts > li").evaluate_all(
        "all => all.map(li => li.querySelector('textarea')?.value ?? 'image')"
    )


def with_image(visit, address):
    """A page whose message is "first", an image, "last"."""
    page = visit(address)
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    page.keyboard.type("first last")
    for _ in "last":
        page.keyboard.press("ArrowLeft")
    page.locator("#image-file").set_input_files([png("red")])
    expect(page.get_by_role("button", name="Remove image")).to_be_visible()
    return page


def test_image_goes_where_the_caret_is(visit, address):
    page = with_image(visit, address)
    assert parts(page) == ["first", "image", "last"]
    with page.expect_request("**/api/generate") as request:
        page.keyboard.press("Enter")  # the focus stayed in the words
    [turn] = request.value.post_data_json["turns"]
    assert [segment.get("text", len(segment.get("codes", []))) for segment in turn["segments"]] == ["first", 4, "last"]
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_parts_are_moved_and_removed_by_keyboard(visit, address):
    page = with_image(visit, address)
    page.get_by_role("button", name="Move image earlier").focus()
    page.keyboard.press("Enter")
    assert parts(page) == ["image", "first last"]
    expect(page.get_by_role("button", name="Move image later")).to_be_focused()  # it cannot go further
    page.keyboard.press("Enter")
    assert parts(page) == ["first last", "image", ""]
    page.get_by_role("button", name="Remove image").focus()
    page.keyboard.press("Space")
    assert parts(page) == ["first last"]
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    page.keyboard.press("End")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    assert parts(page) == ["first last\nsecond line"]


def test_message_waits_for_its_images(visit, address):
    page = visit(address)
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    held = []
    page.route("**/api/images?*", lambda route: held.append(route))
    page.locator("#image-file").set_input_files([png("blue")])
    page.get_by_role("textbox").last.fill("what is this?")
    page.keyboard.press("Enter")
    expect(page.locator("#parts")).to_contain_text("reading")
    assert page.locator("li.turn").count() == 0
    with page.expect_request("**/api/generate") as request:
        held[0].continue_()
    assert len(request.value.post_data_json["turns"][0]["segments"]) == 2
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def drop(page, *paths) -> None:
    """Drop files from outside the browser."""
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for step in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": step, "x": 400, "y": 300, "data": data})


def test_dropped_files_that_are_no_images(visit, toy_address, tmp_path):
    page = visit(toy_address)
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    folder, large, words, image = (tmp_path / name for name in ("folder", "large.png", "a.txt", "red.png"))
    folder.mkdir()
    large.write_bytes(bytes(2**23 + 1))
    words.write_text("hello")
    image.write_bytes(png("red")["buffer"])
    drop(page, folder, large, words, image)
    expect(page.get_by_role("button", name="Remove image")).to_have_count(1)
    error = page.locator("#composer-error")
    for sentence in ("choose the files in it (folder)", "8 MiB: use a smaller one (large.png)", "(a.txt)"):
        expect(error).to_contain_text(sentence)
    expect(page.locator("#banner")).to_be_empty()  # the server answers
    visit.expect("400")  # a.txt alone was sent
