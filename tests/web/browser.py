"""A real browser for tests: chromium, driven by playwright. A page that misbehaves fails its test.

    def test_title(visit, toy_address):  # fixtures of conftest.py
        page = visit(toy_address, width=360, theme="dark")
        assert page.title() == "nanochameleon"
        check_accessible(page)

A test fails by any error in the console or in a script, any request that failed or left the server, and any breach of
the page's content policy, unless it says that it expects that: visit.expect(pattern).
"""

import asyncio
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError
from serving import PATIENCE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "chromium is missing or does not start: install it, on Debian by apt-get install chromium"
REBOUND = "rebound.test"  # a name of somebody else's that leads to this machine
FLAGS = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
    f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
LOST = re.compile(r"net::ERR_(CONNECTION_|EMPTY_RESPONSE|INCOMPLETE_CHUNKED)")  # what a server that ends looks like
LOCAL = ("data", "blob", "about")  # schemes that ask no server


def find_chromium() -> str:
    """Return the browser's path. Fails the test where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    return path or pytest.fail(MISSING, pytrace=False)


@contextmanager
def launched() -> Iterator[tuple[Browser, asyncio.AbstractEventLoop]]:
    """Yield a browser with a profile of its own, and the loop that must count as running while it is used."""
    path, flags = find_chromium(), [*FLAGS, *["--no-sandbox"] * (os.geteuid() == 0)]  # root has no sandbox
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=flags, timeout=1000 * PATIENCE)
        except PlaywrightError as error:
            print(error)
            pytest.fail(MISSING, pytrace=False)
        expect.set_options(timeout=1000 * PATIENCE)
        loop = asyncio.get_running_loop()
        with running(None):
            yield browser, loop
        browser.close()


@contextmanager
def running(loop: asyncio.AbstractEventLoop | None) -> Iterator[None]:
    """Count a loop as the running one. Playwright's always counts, and then asyncio.run in other tests refuses."""
    before = asyncio._get_running_loop()
    asyncio._set_running_loop(loop)
    try:
        yield
    finally:
        asyncio._set_running_loop(before)


class Visits:
    """Opens pages and collects their problems."""

    def __init__(self, browser: Browser):
        self.browser, self.problems, self.contexts, self.forgiven = browser, [], [], False

    def __call__(self, address: str, width: int = 1280, theme: str = "light", **options) -> Page:
        """Open an address as somebody new. options: of playwright's new_context."""
        size = {"width": width, "height": 800}
        context = self.browser.new_context(viewport=size, color_scheme=theme, **options)
        context.set_default_timeout(1000 * PATIENCE)
        self.contexts.append(context)
        self.watch(context, urlsplit(address).netloc)
        page = context.new_page()
        page.on(
            "filechooser", lambda _: None
        )  # from the start: to begin with expect_file_chooser is too late for a key
        page.goto(address)
        return page

    def watch(self, context: BrowserContext, server: str) -> None:
        def look_at_request(request) -> None:
            url = urlsplit(request.url)
            if url.scheme not in LOCAL and url.netloc != server:
                self.problems.append(f"request to another server: {request.url[:200]}")

        def look_at_message(message) -> None:
            if message.type in ("error", "assert"):
                self.problems.append(f"console: {message.text} ({message.location.get('url', '')[:200]})")

        def look_at_failure(request) -> None:
            if request.failure != "net::ERR_ABORTED":  # the page stopped it; or chromium says so of a whole stream
                self.problems.append(f"failed: {request.method} {request.url[:200]} {request.failure}")

        context.on("request", look_at_request)
        context.on("console", look_at_message)
        context.on("weberror", lambda error: self.problems.append(f"script: {error.error}"))
        context.on("requestfailed", look_at_failure)

    def expect(self, pattern: str) -> list[str]:
        """Take the problems that match out of the list; at least one must have occurred, or occur yet."""
        deadline = time.monotonic() + PATIENCE
        while not (found := [problem for problem in self.problems if re.search(pattern, problem)]):
            assert time.monotonic() < deadline, f"no problem matches {pattern!r} in {self.problems}"
            self.contexts[-1].pages[0].wait_for_timeout(20)  # playwright reads what the browser says meanwhile
        self.problems = [problem for problem in self.problems if problem not in found]
        return found

    def forgive(self) -> None:
        """Take all problems for right, those to come too: of a page whose attacks must fail."""
        self.forgiven = True

    def close(self) -> None:
        for context in self.contexts:
            context.close()
        problems = [problem for problem in self.problems if not (LOST.search(problem) and is_gone(problem))]
        if problems and not self.forgiven:
            pytest.fail("the page misbehaved:\n" + "\n".join(problems), pytrace=False)


def is_gone(problem: str) -> bool:
    """Has the test ended the server that a problem names? Then a page that was still open may have missed it."""
    port = re.search(r"http://127\.0\.0\.1:(\d+)", problem)
    with socket.socket() as asking:
        return port is not None and asking.connect_ex(("127.0.0.1", int(port[1]))) != 0


def violations(page: Page) -> list[str]:
    """What axe-core finds in the page, each with rule, element and reason.

    It runs in a world of its own: the page's content policy and variables are neither changed nor in its way.
    """
    session = page.context.new_cdp_session(page)
    frame = session.send("Page.getFrameTree")["frameTree"]["frame"]["id"]
    world = {"contextId": session.send("Page.createIsolatedWorld", {"frameId": frame})["executionContextId"]}
    session.send("Runtime.evaluate", {"expression": AXE.read_text() + ";0", **world})
    answer = session.send(
        "Runtime.evaluate", {"expression": "axe.run()", "awaitPromise": True, "returnByValue": True, **world}
    )
    session.detach()
    return [
        f"{rule['id']}: {' '.join(map(str, node['target']))}: {node['failureSummary']} in {node['html'][:200]}"
        for rule in answer["result"]["value"]["violations"]
        for node in rule["nodes"]
    ]


def check_accessible(page: Page) -> None:
    """Fail by what axe-core finds, and by a page that scrolls sideways."""
    assert not (found := violations(page)), "\n".join(found)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
