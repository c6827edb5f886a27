"""Red teaming on the page: people label a conversation's answers; the log is that of evaluate/red_team.py.

    GET  /api/red-team           -> {"conversations": how many the log has, "categories", "strategies": used so far}
    POST /api/red-team           {"id", "attacker", "category", "strategy", "notes", "turns", "labels": {"2": "safe"}}
                                 -> {"id", "conversations"}
    POST /api/red-team/labels    {"id", "annotator", "turn", "label"}: given after logging -> {}

The id is a random UUID that the page makes: a conversation that is sent again, since an answer was lost, is one line.
Turns are those of conversation.py; an answer may also have "refused", "seed", "sample", "mode" and "options". The log's
seed is that of the first answer, its options are those of all answers, by turn. Images are decoded from their codes, so
they are what the model saw; their files are on the disk before the line that names them.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from nanochameleon.documents import Text
from nanochameleon.errors import UserError, warn
from nanochameleon.evaluate import red_team
from nanochameleon.evaluate.harm.labels import check_label
from nanochameleon.evaluate.records import load
from nanochameleon.evaluate.red_team import Conversation
from nanochameleon.files import fsync, write_file
from nanochameleon.web.bodies import field, json_body, read_person
from nanochameleon.web.conversation import ASSISTANT, Turn, read_mode, read_turns
from nanochameleon.web.images import pngs_of
from nanochameleon.web.limits import DECODED
from nanochameleon.web.refusals import Refused
from nanochameleon.web.site import Site
from nanochameleon.web.talk import MAX_SEED, OPTIONS, check_fields, read_options, sampling_params

T = TypeVar("T")
MAX_WORDS, MAX_NOTES = 100, 20_000  # characters of a category or a strategy, and of the notes
SUGGESTED = 50  # categories, and as many strategies


# ---------------------------------------------------------------------------------------------------------------------
# Bodies


def read_conversation(body: dict, turns: Sequence[Turn], site: Site) -> Conversation:
    """Return the checked conversation of a body."""
    rows = {n: row for n, row in enumerate(body["turns"], 1) if turns[n - 1].role == ASSISTANT}
    if not rows:
        raise Refused("the conversation has no answer: log it after the model's first", param="turns")
    name, attacker, labels = read_id(body), read_person(body, "attacker"), field(body, "labels", dict, {})
    options = {str(n): read_sampling(row, site, f"turns[{n - 1}].") for n, row in rows.items()}
    refused = {n: field(row, "refused", bool, None, f"turns[{n - 1}].") for n, row in rows.items()}
    conversation = Conversation(
        id=name,
        attacker=attacker,
        model=site.name,
        seed=next((each["seed"] for each in options.values() if "seed" in each), 0),
        turns=logged_turns(turns, refused, f"{site.red_team.stem}-{name}"),
        options={n: each for n, each in options.items() if each},
        category=read_words(body, "category"),
        strategy=read_words(body, "strategy"),
        labels={attacker: labels} if labels else {},
        notes=read_words(body, "notes", MAX_NOTES),
    )
    red_team.check_labels(conversation, "the conversation")
    return conversation


def logged_turns(turns: Sequence[Turn], refused: dict[int, bool | None], stem: str) -> tuple[red_team.Turn, ...]:
    """The turns as the log has them: images are files STEM-1.png, STEM-2.png, ..."""
    names = (f"{stem}-{number}.png" for number in count(1))
    segments = [[{"text": s.text} if isinstance(s, Text) else {"image": next(names)} for s in turn.segments]
                for turn in turns]  # fmt: skip
    return tuple(
        red_team.Turn(turn.role, said, refused.get(n))
        for n, (turn, said) in enumerate(zip(turns, segments, strict=True), 1)
    )


def read_sampling(row: dict, site: Site, place: str) -> dict[str, Any]:
    """Return how an answer was sampled, as far as the page says so."""
    options = field(row, "options", dict, {}, place)
    check_fields(options, tuple(OPTIONS), f"{place}options.")
    found = read_options(options, f"{place}options.")
    sampling_params(site.run.cfg.sample, found, f"{place}options.")
    numbers = {name: field(row, name, int, None, place) for name in ("seed", "sample")}
    if wrong := [name for name, value in numbers.items() if value is not None and not 0 <= value <= MAX_SEED]:
        raise Refused(f"{place}{wrong[0]} must be 0 to {MAX_SEED}", param=f"{place}{wrong[0]}")
    mode = read_mode(row, place)
    return {name: value for name, value in {**numbers, "mode": mode, **found}.items() if value is not None}


def read_id(body: dict) -> str:
    """Return the id, in the one form of a UUID that is safe in names of files."""
    text = field(body, "id", str)
    try:
        if str(uuid.UUID(text)) == text:
            return text
    except ValueError:
        pass
    raise Refused("id must be a UUID, such as 123e4567-e89b-42d3-a456-426614174000", param="id")


def read_words(body: dict, name: str, most: int = MAX_WORDS) -> str:
    text = field(body, name, str, "").strip()
    if len(text) > most:
        raise Refused(f"{name} has {len(text):,} characters: at most {most:,} are logged", param=name)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The log. All of this runs in a thread, and one call at a time (site.red_team_lock).


async def on_log(site: Site, function: Callable[[Path], T]) -> T:
    """Return function(log). A sentence on the disk or the log may name a path: it stays here."""
    async with site.red_team_lock:
        try:
            return await anyio.to_thread.run_sync(function, site.red_team)
        except Refused:
            raise
        except (UserError, OSError) as error:
            warn(f"red teaming: {error}")
    raise Refused("the log could not be read or written: nothing was lost, and the server's terminal says why", 503)


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n") if path.exists() else []


def find(path: Path, name: str) -> dict | None:
    """Return the log's line with this id."""
    return red_team.find(lines_of(path), name, "the log")


def add(path: Path, conversation: Conversation, images: Sequence[bytes]) -> int:
    """Write the images, then the line; -> how many conversations the log has. Nothing stays where that fails."""
    segments = [segment for turn in conversation.turns for segment in turn.segments]
    files = [path.parent / segment["image"] for segment in segments if "image" in segment]
    if (logged := find(path, conversation.id)) is not None:
        same = logged == red_team.row_of(conversation)
        if same and all(file.read_bytes() == data for file, data in zip(files, images, strict=True)):
            return summary(path)["conversations"]
        raise Refused("this conversation is in the log already, and differs", 409, "id", "logged_already")
    try:
        for file, data in zip(files, images, strict=True):
            write_file(file, data)
        fsync(path.parent)
        return red_team.write(path, conversation)
    except BaseException:
        if find(path, conversation.id) is None:  # else its line names them
            for file in files:
                file.unlink(missing_ok=True)
        raise


def add_label(path: Path, name: str, annotator: str, turn: int, label: str) -> None:
    if (row := find(path, name)) is None:
        raise Refused("the log has no conversation with this id", 404, "id")
    conversation = red_team.conversation_of(row, path.parent, "the log")
    if str(turn) not in conversation.answers:
        raise Refused(f"turn {turn} is no answer: the answers are {', '.join(conversation.answers)}", param="turn")
    red_team.label(red_team.labels_of(path), conversation, annotator, turn, label)


def summary(path: Path) -> dict[str, Any]:
    rows = [load(line, "the log") for line in lines_of(path) if line.strip()]
    used = {key: Counter(row[key] for row in rows if row.get(key)) for key in ("category", "strategy")}
    categories, strategies = ([name for name, _ in used[key].most_common(SUGGESTED)] for key in used)
    return {"conversations": len(rows), "categories": categories, "strategies": strategies}


# ---------------------------------------------------------------------------------------------------------------------
# Routes


def site_of(request: Request) -> Site:
    site = request.app.state.site
    if site.red_team is None:
        raise Refused("red teaming is off: start the server with --red-team LOG.jsonl", 404)
    return site


async def state(request: Request) -> JSONResponse:
    return JSONResponse(await on_log(site_of(request), summary))


async def log(request: Request) -> JSONResponse:
    site = site_of(request)
    body = await json_body(request)
    turns = read_turns(body, site.run)
    conversation = read_conversation(body, turns, site)
    codes = [segment.codes for turn in turns for segment in turn.segments if not isinstance(segment, Text)]
    if len(codes) > DECODED:
        raise Refused(f"the conversation has {len(codes)} images: at most {DECODED} are logged", param="turns")
    if codes and not site.run.image_tokenizer.can_draw:
        raise Refused("this model has no image decoder, so a conversation with images cannot be logged", param="turns")
    images = await pngs_of(codes, site)
    n = await on_log(site, lambda path: add(path, conversation, images))
    return JSONResponse({"id": conversation.id, "conversations": n})


async def label(request: Request) -> JSONResponse:
    site = site_of(request)
    body = await json_body(request)
    name, annotator = read_id(body), read_person(body, "annotator")
    turn, said = field(body, "turn", int), check_label(field(body, "label", str), "the body")
    await on_log(site, lambda path: add_label(path, name, annotator, turn, said))
    return JSONResponse({})


ROUTES = [
    Route("/api/red-team", state, methods=["GET"]),
    Route("/api/red-team", log, methods=["POST"]),
    Route("/api/red-team/labels", label, methods=["POST"]),
]
