"""The page on which people judge answers without knowing whose they are, and the owner's page with the results so far.

    POST /api/study/next  {"annotator"}                                           -> what to ask
    POST /api/study/vote  {"annotator", "item", "question", "answer", "seconds"}  -> what to ask next: the vote is saved
    POST /api/study/undo  {"annotator", "item", "question"}                       -> the question again
    GET  /api/study, /api/study/images/NAME.png; and for the owner: /owner, /api/owner/results

The server keeps nothing between requests but the study and its votes, so it may be killed at any time. Two pages with
one name share one list of questions. A question has one vote of each name: the first page to send it wins, and the
other page gets the next question and a sentence. To undo names the vote, so a repeated request takes back only one.
"""

import hmac
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nanochameleon.errors import UserError, shown, warn
from nanochameleon.evaluate.human import (
    Votes,
    next_question,
    open_key,
    open_questions,
    open_study,
    progress,
    results_so_far,
)
from nanochameleon.evaluate.people.study import IMAGES, KEY, Key, Study
from nanochameleon.evaluate.people.tables import all_tables
from nanochameleon.web.bodies import field as read_field
from nanochameleon.web.bodies import json_body, read_person
from nanochameleon.web.metrics import Metrics
from nanochameleon.web.refusals import Refused
from nanochameleon.web.static_files import page

T = TypeVar("T")
LOCKED, WAIT = 5.0, 10.0  # seconds that a request waits for another program's lock, and for all requests before it
MAX_SECONDS = 600.0  # of one vote; the page stops counting there
MAX_ORDERS = 256  # annotators whose order of items is kept in memory

UNSAVED = "the votes cannot be read or written now (locked, or no room on the disk): try again in a few seconds"
ANSWERED = "Another page with your name answered that question first. Its answer counts; here is the next question."
UNDONE = "Taken back. Please answer again."
NOT_LAST = "Nothing was taken back: another page with your name has voted since."
NO_KEY = "this copy of the study has no owner/key.json, so nobody can see results here: open the owner's copy"


@dataclass(frozen=True)
class StudySite:
    """All that handlers need to run a study, in request.app.state.site."""

    study: Study
    votes: Votes
    key: Key | None  # None: an annotators' copy, without results
    owner_key: str  # opens the owner's page
    turn: anyio.CapacityLimiter = field(default_factory=partial(anyio.CapacityLimiter, 1))  # of requests for votes
    counting: anyio.CapacityLimiter = field(default_factory=partial(anyio.CapacityLimiter, 1))
    counted: dict[str, dict] = field(default_factory=dict)  # {ETag: results}; only the newest
    metrics: Metrics = field(default_factory=Metrics)


def open_site(folder: Path, locked: float = LOCKED) -> StudySite:
    """Open a study to serve it. Raises UserError for a folder without a study, or without some of its images."""
    study = open_study(folder)
    segments = chain.from_iterable([*study.prompts.values(), *study.answers.values()])
    named = {segment["image"] for segment in segments if "image" in segment}
    if missing := sorted(named - {path.name for path in (folder / IMAGES).glob("*")}):
        raise UserError(f"{folder / IMAGES} lacks images of the study, such as {missing[0]}: copy the whole folder")
    key = open_key(folder) if (folder / KEY).is_file() else None
    return StudySite(study, Votes(study, locked), key, secrets.token_urlsafe(16))


async def in_turn(site: StudySite, function: Callable[..., T], *args) -> T:
    """Return function(site, *args), run in a thread, one at a time. What waits for the database waits here."""
    try:
        with anyio.fail_after(WAIT):
            return await anyio.to_thread.run_sync(partial(function, site, *args), limiter=site.turn)
    except (UserError, TimeoutError) as error:
        if isinstance(error, Refused):
            raise
        warn(f"votes: {str(error) or 'other requests took too long'}")  # it names the path, which no client may see
        raise Refused(UNSAVED, 503, code="votes_unavailable", retry_after=2) from None


# ---------------------------------------------------------------------------------------------------------------------
# Annotators


def screen(site: StudySite, annotator: str, note: str | None = None) -> dict:
    """Return all that an annotator sees. Nothing in it says whose the answers are, or which items are checks."""
    if len(site.study.orders) > MAX_ORDERS:
        site.study.orders.clear()
    asked, so_far = next_question(site.study, site.votes, annotator), progress(site.study, site.votes, annotator)
    last = site.votes.last_vote(annotator)
    question = asked and {
        "name": asked.question.name,
        "text": asked.question.text,
        "labels": [{"name": name, "text": text} for name, text in asked.question.labels.items()],
    }
    return {
        "asked": asked and {
            "item": asked.item, "question": question, "prompt": asked.prompt, "answers": asked.answers,
        },
        "progress": asdict(so_far),
        "undo": last and {"item": last.item, "question": last.question},
        "prefetch": images_of_next_item(site, annotator, asked.item) if asked else [],
        "note": note,
    }  # fmt: skip


def images_of_next_item(site: StudySite, annotator: str, now: str) -> list[str]:
    study = site.study
    item = next((item for item, _ in open_questions(study, site.votes, annotator) if item.id != now), None)
    if item is None:
        return []
    shown = [study.prompts[item.prompt], *(study.answers[name] for name in study.sides(annotator, item))]
    return [segment["image"] for segments in shown for segment in segments if "image" in segment]


def save(site: StudySite, annotator: str, item: str, question: str, answer: str, seconds: float) -> dict:
    """Save a vote, unless this annotator has one on the question. The same vote again is a retry, and no mistake."""
    check_vote(site.study, item, question, answer)
    new = site.votes.cast(annotator, item, question, answer, seconds, replace=False)
    own = {(vote.item, vote.question): vote.answer for vote in site.votes.current_votes(annotator)}
    return screen(site, annotator, None if new or own.get((item, question)) == answer else ANSWERED)


def check_vote(study: Study, item: str, question: str, answer: str | None = None) -> None:
    known = study.items.get(item)
    questions = {each.name: each for each in study.questions(known)} if known else {}
    if known is None:
        raise Refused(f"{shown(item)!r} is no item of this study: reload the page", param="item")
    if question not in questions:
        raise Refused(f"{shown(question)!r} is not asked of this item: reload the page", param="question")
    if answer is not None and answer not in questions[question].labels:
        labels = ", ".join(questions[question].labels)
        raise Refused(f"{shown(answer)!r} is no answer to this question: give one of {labels}", param="answer")


def take_back(site: StudySite, annotator: str, item: str, question: str) -> dict:
    """Undo the annotator's last vote if it is this one. Where it was undone already, the request is a retry."""
    check_vote(site.study, item, question)
    undone = site.votes.undo(annotator, only=(item, question))
    has_vote = any((v.item, v.question) == (item, question) for v in site.votes.current_votes(annotator))
    return screen(site, annotator, UNDONE if undone or not has_vote else NOT_LAST)


async def about(request: Request) -> JSONResponse:
    return JSONResponse({"items": len(request.app.state.site.study.items)})


async def ask(request: Request) -> JSONResponse:
    annotator = read_person(await json_body(request), "annotator")
    return JSONResponse(await in_turn(request.app.state.site, screen, annotator))


async def vote(request: Request) -> JSONResponse:
    row = await json_body(request)
    annotator = read_person(row, "annotator")
    item, question, answer = (read_field(row, name, str) for name in ("item", "question", "answer"))
    seconds = read_field(row, "seconds", float)
    if not 0 <= seconds <= MAX_SECONDS:
        raise Refused(f"seconds must be from 0 to {MAX_SECONDS:.0f}", param="seconds")
    return JSONResponse(await in_turn(request.app.state.site, save, annotator, item, question, answer, float(seconds)))


async def undo(request: Request) -> JSONResponse:
    row = await json_body(request)
    annotator = read_person(row, "annotator")
    item, question = (read_field(row, name, str) for name in ("item", "question"))
    return JSONResponse(await in_turn(request.app.state.site, take_back, annotator, item, question))


async def image(request: Request) -> Response:
    """An image by its random name, which is all that a client can give."""
    try:
        path = request.app.state.site.study.image(request.path_params["name"])
        data = await anyio.to_thread.run_sync(path.read_bytes)
    except (UserError, OSError):
        raise Refused("there is no such image in this study", 404, code="not_found") from None
    return Response(data, media_type="image/png", headers={"cache-control": "private, max-age=86400, immutable"})


# ---------------------------------------------------------------------------------------------------------------------
# The owner


async def owner_results(request: Request) -> Response:
    """The results so far, for the holder of the owner's key. 304 where no vote is new."""
    site = request.app.state.site
    given = request.headers.get("x-owner-key", "").encode("utf-8", "replace")
    if not hmac.compare_digest(given, site.owner_key.encode()):
        raise Refused("this page is for the study's owner: open the link that the server printed at its start", 403)
    if site.key is None:
        raise Refused(NO_KEY, 404, code="no_key")
    tag = await in_turn(site, tag_of_votes)
    headers = {"etag": tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return JSONResponse(await anyio.to_thread.run_sync(count, site, tag, limiter=site.counting), headers=headers)


def tag_of_votes(site: StudySite) -> str:
    """An ETag that changes with each record in the log of votes."""
    site.votes.refresh()
    return f'"{site.study.id[:8]}-{site.votes.n_read}"'


def count(site: StudySite, tag: str) -> dict:
    """All tables that the votes can fill so far, as `human report --least 1` has them."""
    if tag not in site.counted:
        found = results_so_far(site.study, site.votes, site.key)
        tables = [asdict(table) for table in all_tables(found)]
        n_votes = sum(each.votes for each in found.quality.values())
        site.counted.clear()
        site.counted[tag] = {"votes": n_votes, "items": len(site.study.items), "tables": tables}
    return site.counted[tag]


ROUTES = [
    Route("/api/study", about),
    Route("/api/study/next", ask, methods=["POST"]),
    Route("/api/study/vote", vote, methods=["POST"]),
    Route("/api/study/undo", undo, methods=["POST"]),
    Route("/api/study/images/{name}", image),
    Route("/owner", page("owner.html")),
    Route("/api/owner/results", owner_results),
]
