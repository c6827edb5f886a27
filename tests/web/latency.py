"""Measures what somebody waits for, in a browser: from Enter to the first character, and to a whole image.

python tests/web/latency.py [--n 20]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from browser import Visits, launched, running
from server_process import ROOT, ServerProcess
from talk_page import message, wait_for_answer

WORDS = "a big red star on white"
# Milliseconds from the key's own time until the page has shown what is waited for: the frame after it is there.
MEASURE = """(what) => {
  window.waited = new Promise((resolve) => addEventListener("keydown", ({ timeStamp }) => {
    const look = () => {
      const answer = [...document.querySelectorAll(".turn.model")].at(-1);
      const image = answer?.querySelector("img:not([hidden])");
      const done = what === "text"
        ? answer?.querySelector(".segment.words")?.textContent
        : image?.complete && image.naturalWidth && answer.querySelector("progress").hidden;
      if (done) requestAnimationFrame(() => resolve(performance.now() - timeStamp));
      else requestAnimationFrame(look);
    };
    look();
  }, { capture: true, once: true }));
}"""


def milliseconds(page, words: str, what: str) -> float:
    """Send words in a new conversation; what: text (its first character) or image (whole)."""
    page.get_by_role("button", name="New").click()
    message(page).fill(words)
    page.evaluate(MEASURE, what)
    page.keyboard.press("Enter")
    waited = page.evaluate("window.waited")
    wait_for_answer(page)
    return waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20)
    n = parser.parse_args().n
    with (
        tempfile.TemporaryDirectory() as scratch,
        ServerProcess(Path(scratch) / "log", str(ROOT / "models" / "toy")) as server,
        launched() as (browser, loop),
        running(loop),
    ):
        for what, words, mode in (
            ("text", "a big red star on white", "text"),
            ("image", "a big red star on white", "draw"),
        ):
            page = Visits(browser)(f"{server.address}/#mode={mode}&seed=3")
            milliseconds(page, words, what)  # the first of a page loads and compiles
            found = [milliseconds(page, words, what) for _ in range(n)]
            print(f"{what}: median {statistics.median(found):.0f} ms, {min(found):.0f} to {max(found):.0f} of {n}")
            page.close()


if __name__ == "__main__":
    main()
