"""The pages of a study in a browser: one annotator by keys and clicks, and the owner who looks on."""

import sqlite3
from collections import Counter
from contextlib import closing

import browser
import pytest
from playwright.sync_api import expect
from studies import MODELS, WORDS, make_study, serving

from nanochameleon.evaluate.people.make import build
from nanochameleon.evaluate.people.prompts import Prompt
from nanochameleon.web import judge


def begin(page, name="ann"):
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#judging:visible")


def press(page, *keys):
    """Press keys, and wait until another question is shown, or the end."""
    page.evaluate("document.querySelector('#labels').firstChild.dataset.seen = ''")
    for key in keys:
        page.keyboard.press(key)
    page.locator("#labels [data-seen]").wait_for(state="hidden")


# ---------------------------------------------------------------------------------------------------------------------
# One annotator


def test_study_by_keyboard_alone(visit, tmp_path):
    with serving(make_study(tmp_path, 2, questions="relative", duplicates=0.0, attention=0)) as (address, site):
        page = visit(address)
        begin(page)
        assert page.inner_text("#count") == "0 of 2" and page.url.endswith("#annotator=ann")
        page.keyboard.press("Enter")
        assert page.inner_text("#note") == "Choose an answer first." and site.votes.log() == []
        page.keyboard.press("u")
        assert page.inner_text("#note") == "There is nothing to undo."
        press(page, "3", "Enter")
        assert page.inner_text("#count") == "1 of 2"
        page.reload()
        page.wait_for_selector("#judging:visible")
        assert page.inner_text("#count") == "1 of 2" and "resume" in page.inner_text("#note")
        press(page, "Backspace")
        assert page.inner_text("#count") == "0 of 2" and page.inner_text("#note") == judge.UNDONE
        press(page, "1", "Enter")
        press(page, "2", "ArrowRight", "Enter")  # arrows choose, too
        assert page.is_visible("#end") and page.inner_text("#count") == "2 of 2"
        assert sorted(vote.answer for vote in site.votes.current_votes()) == ["first", "second"]
        page.keyboard.press("u")
        page.wait_for_selector("#judging:visible")
        assert len(site.votes.current_votes()) == 1


def test_study_by_clicks_and_sides_are_named_as_the_labels_are(visit, tmp_path):
    with serving(make_study(tmp_path, 1, questions="relative", duplicates=0.0, attention=0)) as (address, site):
        page = visit(address)
        begin(page)
        first, second = (page.get_by_role("article", name=f"{place} answer") for place in ("First", "Second"))
        boxes = first.bounding_box(), second.bounding_box()
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
        words = first.locator("p").inner_text()
        page.get_by_text("The first answer").click()
        page.get_by_role("button", name="Next").click()
        page.wait_for_selector("#end:visible")
        (vote,) = site.votes.current_votes()
        better = site.key.answers[vote.order[vote.answer == "second"]]
        assert WORDS[better] == words and vote.answer == "first"
        page.get_by_role("button", name="Undo").click()
        page.wait_for_selector("#judging:visible")


def test_answers_are_seen_with_the_question(visit, tmp_path):
    with serving(make_study(tmp_path, 1, questions="absolute", duplicates=0.0, attention=0)) as (address, _):
        page = visit(address)
        begin(page)
        prompt = page.locator("#prompt img").bounding_box()
        answer = page.get_by_role("article", name="Answer").locator("p").bounding_box()
        question = page.locator("#question").bounding_box()["y"]
        assert max(box["y"] + box["height"] for box in (prompt, answer)) < question


def test_answers_are_stacked_on_a_narrow_screen(visit, tmp_path):
    with serving(make_study(tmp_path, 1, questions="relative", duplicates=0.0, attention=0)) as (address, _):
        page = visit(address, width=360)
        begin(page)
        boxes = [page.get_by_role("article", name=f"{place} answer").bounding_box() for place in ("First", "Second")]
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"] and boxes[0]["x"] == boxes[1]["x"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_pages_are_accessible(visit, tmp_path, width, theme):
    with serving(make_study(tmp_path, 1, questions="relative", duplicates=0.0, attention=0)) as (address, site):
        page = visit(address, width, theme)
        page.wait_for_selector("#start:visible")
        browser.check_accessible(page)
        begin(page)
        page.keyboard.press("1")
        for image in page.locator("img").all():
            expect(image).to_have_js_property("naturalWidth", 512)
        browser.check_accessible(page)
        press(page, "Enter")
        browser.check_accessible(page)
        owner = visit(f"{address}/owner#key={site.owner_key}", width, theme)
        owner.wait_for_selector("table")
        browser.check_accessible(owner)


def test_questions_of_one_item_follow_each_other_and_have_all_their_keys(visit, tmp_path):
    with serving(make_study(tmp_path, 1, questions="absolute", duplicates=0.0, attention=0)) as (address, site):
        page = visit(address)
        begin(page)
        browser.check_accessible(page)
        asked = []
        while not page.is_visible("#end"):
            asked.append(page.inner_text("#question-text"))
            assert page.evaluate("document.activeElement.id") in ("prompt-title", "question-text")
            press(page, str(page.locator("#labels input").count()), "Enter")
        answers = Counter(vote.answer for vote in site.votes.current_votes())
        assert len(asked) == len(site.votes.log()) == 14 and answers["unclear"] == 2 and answers["none"] == 2


def test_two_pages_with_one_name(visit, tmp_path):
    with serving(make_study(tmp_path, 3, questions="relative", duplicates=0.0, attention=0)) as (address, site):
        one, other = (visit(f"{address}/#annotator=ann") for _ in range(2))
        for page in (one, other):
            page.wait_for_selector("#judging:visible")
        press(one, "1", "Enter")
        press(other, "2", "Enter")
        assert other.inner_text("#note") == judge.ANSWERED and other.inner_text("#count") == "1 of 3"
        assert other.inner_text("#prompt") == one.inner_text("#prompt")
        assert [vote.answer for vote in site.votes.log()] == ["first"]


def test_choice_is_kept_and_sent_again_while_the_votes_are_locked(visit, tmp_path):
    folder = make_study(tmp_path, 2, questions="relative", duplicates=0.0, attention=0)
    with serving(folder, locked=0.05) as (address, site), closing(sqlite3.connect(folder / "votes.sqlite")) as other:
        page = visit(address)
        begin(page)
        other.execute("BEGIN IMMEDIATE")
        page.keyboard.press("3")
        page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_contain_text("Your choice is kept")
        page.keyboard.press("1")  # too late: this vote is on its way
        assert page.locator("#labels input:checked").input_value() == "second"
        other.execute("ROLLBACK")
        expect(page.locator("#count")).to_have_text("1 of 2")
        assert page.inner_text("#problem") == "" and [vote.answer for vote in site.votes.log()] == ["second"]
        visit.expect("503")


def test_answers_are_shown_as_text_whatever_they_hold(visit, tmp_path):
    text = '<img src=x onerror="document.title=1"><script>document.title=2</script>&lt;b&gt; \u202edrow'
    prompts = [Prompt("p", "Kind", [{"text": text}])]
    build(tmp_path / "study", prompts, {model: [[{"text": text}]] for model in MODELS}, questions="relative")
    with serving(tmp_path / "study") as (address, _):
        page = visit(address)
        begin(page)
        while "checks" in page.inner_text("#prompt"):
            press(page, "1", "Enter")
        assert [element.text_content() for element in page.locator(".segments p").all()] == [text] * 3
        assert page.locator(".segments img").count() == 0 and page.title() == "Judge answers"


HIDE = """hidden => {
    const value = hidden ? "hidden" : "visible";
    Object.defineProperty(document, "visibilityState", {value, configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""


def with_a_clock(visit, address, ready):
    """Open a page whose time runs only when the test says so. ready: what it shows when it has loaded."""
    page = visit(address)
    page.wait_for_selector(ready)
    page.wait_for_load_state("networkidle")  # a request that is broken off counts as a problem
    page.clock.install()
    page.reload()
    page.wait_for_selector(ready)
    page.clock.pause_at(page.evaluate("Date.now()") + 1000)
    return page


def until(page, happened):
    """Let the page's time run until something happened. A page that waits longer after a slow answer asks later."""
    while not happened():
        page.clock.run_for(5000)


def test_seconds_do_not_run_while_the_page_is_hidden_and_have_a_bound(visit, tmp_path):
    with serving(make_study(tmp_path, 4, questions="relative", duplicates=0.0, attention=0)) as (address, site):
        page = with_a_clock(visit, f"{address}/#annotator=ann", "#judging:visible")
        press(page, "2", "Enter")
        for hidden in (False, True, False):
            page.evaluate(HIDE, hidden)
            page.clock.run_for(7000)
        press(page, "2", "Enter")
        page.clock.run_for(3_600_000)
        press(page, "2", "Enter")
        assert [vote.seconds for vote in site.votes.log()][1:] == [pytest.approx(14, abs=0.5), 600]


@pytest.mark.parametrize("name", ["../x", "<b>x</b>", "x y", "ä"])
def test_wrong_name_is_one_sentence(visit, tmp_path, name):
    with serving(make_study(tmp_path, 1)) as (address, site):
        page = visit(address)
        page.get_by_label("Your name").fill(name)
        page.get_by_role("button", name="Begin").click()
        page.wait_for_selector("#problem:not(:empty)")
        assert "1 to 32 of the characters" in page.inner_text("#problem") and page.is_visible("#start")
        visit.expect("400")
        begin(page, "right")
        assert site.votes.log() == []


# ---------------------------------------------------------------------------------------------------------------------
# The owner


def test_owner_sees_votes_as_they_come_and_asks_only_while_the_page_is_visible(visit, tmp_path):
    with serving(make_study(tmp_path, 2, questions="relative", duplicates=0.0, attention=0)) as (address, site):
        owner = with_a_clock(visit, f"{address}/owner#key={site.owner_key}", "text=Votes so far: 0")
        screen = judge.screen(site, "ann")["asked"]
        judge.save(site, "ann", screen["item"], "preference", "same", 1.0)
        until(owner, lambda: owner.get_by_text("Votes so far: 1").count())
        assert owner.locator("table").count() >= 4
        asked, ended, answered = [], [], []
        owner.on("request", lambda request: asked.append(request))
        owner.on("requestfinished", lambda request: ended.append(request))
        owner.on("response", lambda response: answered.append(response))
        until(owner, lambda: answered)
        assert answered[0].status == 304
        owner.evaluate(HIDE, True)
        owner.clock.run_for(5000)
        # A request that was under way when the listening began ends, too, and must not be counted for another one
        until(owner, lambda: all(request in ended for request in asked))
        asked.clear()
        owner.clock.run_for(600_000)
        assert not asked
        ended.clear()
        owner.evaluate(HIDE, False)
        until(owner, lambda: ended)  # at once, or at the end of a long pause after a slow answer


@pytest.mark.parametrize(("key", "sentence"), [("wrong", "for the study's owner"), (None, "has no owner/key.json")])
def test_owner_s_page_says_why_it_shows_nothing(visit, tmp_path, key, sentence):
    folder = make_study(tmp_path, 1)
    (folder / "owner" / "key.json").unlink()
    with serving(folder) as (address, site):
        page = visit(f"{address}/owner#key={key or site.owner_key}")
        page.wait_for_selector("#problem:not(:empty)")
        assert sentence in page.inner_text("#problem")
        visit.expect("403" if key else "404")
