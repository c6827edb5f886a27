"""The study in real browsers: two people at once, a browser killed, the server killed, and the owner who looks on."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import browser
import numpy as np
import pytest
from playwright.sync_api import expect
from serving import served

from nanochameleon.evaluate.human import Votes, open_study
from nanochameleon.evaluate.people.make import build
from nanochameleon.evaluate.people.prompts import Prompt
from nanochameleon.images.terminal import png
from nanochameleon.web import judge
from nanochameleon.web.app import application

MODELS = ("secretive", "Hidden-7B")
WORDS = {"secretive": "a brief answer", "Hidden-7B": "a much longer answer"}  # by which these tests know the models


def make_study(folder: Path, n: int, **more) -> Path:
    """n prompts with an image each. Each answer is a text; that of the second model has an image, too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grey.png").write_bytes(png(np.full((8, 8, 3), 100, np.uint8)))
    image = {"image": str(folder / "grey.png")}
    prompts = [Prompt(f"prompt-{i}", f"Kind-{i % 2}", [{"text": f"prompt number {i}"}, image]) for i in range(n)]
    answers = {model: [[{"text": words}, *[image] * place] for _ in range(n)]
               for place, (model, words) in enumerate(WORDS.items())}  # fmt: skip
    build(folder / "study", prompts, answers, **more)
    return folder / "study"


@contextmanager
def serving(folder: Path):
    """Yield the address and the site of a study."""
    site = judge.open_site(folder)
    with served(application(site)) as address:
        yield address, site


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
        owner = with_a_clock(visit, f"{address}/owner#key={site.owner_key}", "text=No votes so far")
        screen = judge.screen(site, "ann")["asked"]
        judge.save(site, "ann", screen["item"], "preference", "same", 1.0)
        owner.clock.run_for(5000)
        owner.wait_for_selector("text=1 votes so far")
        assert owner.locator("table").count() >= 4
        with owner.expect_request_finished() as unchanged:
            owner.clock.run_for(5000)
        assert unchanged.value.response().status == 304
        asked = []
        owner.on("request", lambda request: asked.append(request))
        owner.evaluate(HIDE, True)
        owner.clock.run_for(60_000)
        assert not asked
        with owner.expect_request_finished():
            owner.evaluate(HIDE, False)


@pytest.mark.parametrize(("key", "sentence"), [("wrong", "for the study's owner"), (None, "has no owner/key.json")])
def test_owner_s_page_says_why_it_shows_nothing(visit, tmp_path, key, sentence):
    folder = make_study(tmp_path, 1)
    (folder / "owner" / "key.json").unlink()
    with serving(folder) as (address, site):
        page = visit(f"{address}/owner#key={key or site.owner_key}")
        page.wait_for_selector("#problem:not(:empty)")
        assert sentence in page.inner_text("#problem")
        visit.expect("403" if key else "404")


# ---------------------------------------------------------------------------------------------------------------------
# Two annotators at once, one of whose browsers is killed, and a server that is killed


class Server:
    """python -m nanochameleon.web --study, which can be killed and started again at the same port."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.command = [sys.executable, "-m", "nanochameleon.web", "--study", str(folder), "--port", str(port)]
        self.address = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        said = ""
        while not (link := re.search(r"http://\S+/owner#key=\S+", said)) or "Ctrl-C" not in said:
            line = self.process.stdout.readline()
            assert line, f"the server ended: {said}"
            said += line
        self.owner_link = link[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def pid_of(started) -> int:
    processes = started.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    return next(process["id"] for process in processes if process["type"] == "browser")


PLAN = {"ann": lambda i: (MODELS[0], "tie", MODELS[1])[i % 3], "bob": lambda i: (MODELS[0], MODELS[1])[i // 10]}


def key_for(page, name: str) -> str:
    """The key by which this person says what they think of the pair on the page; checks are answered as they ask."""
    prompt = page.inner_text("#prompt")
    labels = page.locator("#labels label").all_inner_texts()
    if "This item checks" in prompt:
        wanted = prompt.partition("Please choose: ")[2].rstrip(".")
        return str(1 + next(i for i, label in enumerate(labels) if wanted in label))
    better = PLAN[name](int(prompt.split()[-1]))
    sides = [panel.locator("p").inner_text() for panel in page.locator("#answers article").all()]
    return "2" if better == "tie" else "1" if sides[0] == WORDS[better] else "3"


def by_hand(n: int) -> tuple[int, int, int]:
    """Wins, ties and losses of the first model: two people agree, or the pair is a tie."""
    said = [{PLAN["ann"](i), PLAN["bob"](i)} for i in range(n)]
    wins, losses = said.count({MODELS[0]}), said.count({MODELS[1]})
    return wins, n - wins - losses, losses


def test_twenty_pairs_by_two_people_with_a_killed_browser_and_a_killed_server(chromium, tmp_path):
    folder = make_study(tmp_path, 20, questions="relative", votes_per_item=2, duplicates=0.1, attention=1)
    server = Server(folder)
    playwright, loop = chromium
    path, flags = browser.find_chromium(), [*browser.FLAGS, *["--no-sandbox"] * (os.geteuid() == 0)]
    with browser.running(loop):
        browsers = {name: playwright.browser_type.launch(executable_path=path, args=flags) for name in PLAN}
        visits = {name: browser.Visits(started) for name, started in browsers.items()}
        pages = {name: visits[name](f"{server.address}/#annotator={name}") for name in PLAN}
        for step in range(100):
            for page in pages.values():
                page.wait_for_selector("#judging:visible, #end:visible")
            asking = {name: page for name, page in pages.items() if page.is_visible("#judging")}
            if not asking:
                break
            before = {name: page.inner_text("#count") for name, page in asking.items()}
            for name, page in asking.items():  # nobody waits for the other's vote
                page.keyboard.press(key_for(page, name))
                page.keyboard.press("Enter")
            if step == 7:
                os.kill(pid_of(browsers["bob"]), signal.SIGKILL)
                browsers["bob"] = playwright.browser_type.launch(executable_path=path, args=flags)
                visits["bob"] = browser.Visits(browsers["bob"])
                pages["bob"] = visits["bob"](f"{server.address}/#annotator=bob")
                del before["bob"]
            if step == 14:
                server.kill()
                server.start()
            for name, count in before.items():
                expect(pages[name].locator("#count")).not_to_have_text(count)
        owner = visits["ann"](server.owner_link)
        owner.wait_for_selector("table")
        tables = {
            table.locator("h2").inner_text().split(" (")[0]: [
                row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()
            ]
            for table in owner.locator("#results section").all()
        }
        for visit in visits.values():  # a killed server is what these may complain about, and nothing else
            visit.problems = [p for p in visit.problems if "net::ERR_" not in p]
            visit.close()
        for started in browsers.values():
            started.close()
    server.kill()

    votes = Votes(open_study(folder))
    log = Counter((vote.annotator, vote.item) for vote in votes.log())
    assert len(log) == 2 * 23 and {*log.values()} == {1}  # 20 pairs, 2 duplicates and a check: each once by each
    wins, ties, losses = by_hand(20)
    assert tables["Win rates"][0][:5] == [*MODELS, str(wins), str(ties), str(losses)]
    assert tables["Win rates"][0][5].startswith(f"{100 * (wins + ties / 2) / 20:.1f} (")
    agreed = wins + losses + sum(PLAN["ann"](i) == PLAN["bob"](i) == "tie" for i in range(20))
    assert tables["How many prompts have votes that agree"][0][1:] == [str(agreed), "0", str(20 - agreed)]
    assert [[row[0], row[1], *row[3:]] for row in tables["Annotators"]] == [
        [name, "23", "2 of 2", "0 of 1"] for name in ("ann", "bob")
    ]
