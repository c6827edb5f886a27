"""Bugs in the pages of a study."""

from mutants.mutant import Mutant

JUDGE, OWNER, PAGE = (f"web/test_judge{name}.py" for name in ("", "_owner", "_page"))
MUTANTS = [
    Mutant(
        "a page that is out of date replaces a vote",
        "evaluate/people/votes.py",
        "not replace and before.answer != UNDONE",
        "False",
        f"{JUDGE} evaluate/test_people_votes.py",
    ),
    Mutant(
        "an undo that arrives twice takes back two votes",
        "evaluate/people/votes.py",
        "only not in (None, (last.item, last.question))",
        "False",
        f"{JUDGE} evaluate/test_people_votes.py",
    ),
    Mutant(
        "annotators see results",
        "web/judge.py",
        "if not hmac.compare_digest(given, site.owner_key.encode()):",
        "if False:",
        OWNER,
    ),
    Mutant(
        "a vote that waits for the database stops the server",
        "web/judge.py",
        "return await anyio.to_thread.run_sync(partial(function, site, *args), limiter=site.turn)",
        "return function(site, *args)",
        OWNER,
    ),
    Mutant(
        "a locked database is the client's mistake",
        "web/judge.py",
        "raise Refused(UNSAVED, 503,",
        "raise Refused(UNSAVED, 400,",
        OWNER,
    ),
    Mutant(
        "the owner sees old results",
        "web/judge.py",
        "    site.votes.refresh()\n",
        "",
        OWNER,
    ),
    Mutant(
        "a choice is lost where the server does not answer",
        "web/static/study.js",
        "if (error.status && error.status !== 429 && error.status < 500) throw error;",
        "throw error;",
        PAGE,
    ),
    Mutant(
        "seconds run while the page is hidden",
        "web/static/stopwatch.js",
        'document.visibilityState === "visible" ? performance.now() : null',
        "performance.now()",
        PAGE,
    ),
]
