"""A study of 20 pairs in two browsers at once, one of which is killed, and with a server that is killed."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import browser
from playwright.sync_api import expect
from studies import MODELS, WORDS, make_study

from nanochameleon.evaluate.human import Votes, open_study


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


READ = """() => {
    const texts = selector => [...document.querySelectorAll(selector)].map(element => element.textContent);
    return [texts("#prompt p")[0], texts("#answers p"), texts("#labels label")];
}"""


def key_for(page, name: str) -> str:
    """The key by which this person says what they think of the pair on the page; checks are answered as they ask."""
    prompt, sides, labels = page.evaluate(READ)
    if "This item checks" in prompt:
        wanted = prompt.partition("Please choose: ")[2].rstrip(".")
        return str(1 + next(i for i, label in enumerate(labels) if wanted in label))
    better = PLAN[name](int(prompt.split()[-1]))
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
