"""Writes a PNG of every page in every state, light and dark, 360 and 1,280 pixels wide: to be looked at.

python tests/web/screenshots.py FOLDER [--only talk|study|red-team]
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from browser import Visits, launched, running
from conftest import TOY, served_toy
from paced import Pace, paced_engine
from playwright.sync_api import Page, expect
from serving import served
from studies import make_study
from talk_page import last_answer, say, wait_for_answer
from test_accessibility import STATES, THEMES, WIDTHS
from test_page_browser import DRAW

from nanochameleon.web import batch, judge
from nanochameleon.web.app import application
from nanochameleon.weights.model_folder import open_model


class Shots:
    def __init__(self, browser, folder: Path):
        self.visits, self.folder = Visits(browser), folder

    def take(self, name: str, address: str, bring: Callable[[Page], None]) -> None:
        """Photograph the window in each width and theme. bring: brings a page into the state."""
        for width in WIDTHS:
            page = self.visits(address, width, reduced_motion="reduce")
            bring(page)
            for theme in THEMES:
                page.emulate_media(color_scheme=theme)
                page.screenshot(path=self.folder / f"{name}-{width}-{theme}.png", animations="disabled")
            page.close()


@contextmanager
def photographed(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    with launched() as (browser, loop), running(loop):
        yield Shots(browser, folder)


def talk(shots: Shots, run) -> None:
    with served_toy(run) as address:
        for state in STATES:
            shots.take(f"talk-{state.__name__}", f"{address}/#seed=3", state)
    pace = Pace()
    batch.Engine = paced_engine(pace)

    def answering(page: Page) -> None:
        pace.hold()
        say(page, DRAW)
        pace.allow(40)
        expect(last_answer(page).get_by_role("progressbar")).to_be_visible()

    with served_toy(run) as address:
        shots.take("talk-answering", address, answering)
        pace.allow()


def red_team(shots: Shots, run, scratch: Path) -> None:
    def labelled(page: Page) -> None:
        say(page, DRAW)
        wait_for_answer(page)
        page.get_by_role("radio", name="unsafe").first.check()

    with served_toy(run, red_team=scratch / "log.jsonl") as address:
        shots.take("red-team", f"{address}/#seed=3", labelled)


def study(shots: Shots, scratch: Path) -> None:
    def begun(page: Page) -> None:
        page.get_by_label("Your name").fill("ann")
        page.keyboard.press("Enter")
        page.locator("#judging").wait_for()
        page.keyboard.press("2")

    site = judge.open_site(make_study(scratch, 4, duplicates=0.5, attention=1))
    with served(application(site)) as address:
        shots.take("study-name", address, lambda page: page.get_by_label("Your name").wait_for())
        shots.take("study-question", address, begun)
        owner = f"{address}/owner#key={site.owner_key}"
        shots.take("owner", owner, lambda page: page.wait_for_load_state("networkidle"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=["talk", "study", "red-team"])
    arguments = parser.parse_args()
    run = open_model(TOY, "cpu", "auto", None)
    with photographed(arguments.folder) as shots, tempfile.TemporaryDirectory() as scratch:
        if arguments.only in (None, "study"):
            study(shots, Path(scratch))
        if arguments.only in (None, "red-team"):
            red_team(shots, run, Path(scratch))
        if arguments.only in (None, "talk"):
            talk(shots, run)


if __name__ == "__main__":
    main()
