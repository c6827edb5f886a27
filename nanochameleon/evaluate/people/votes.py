"""Votes in SQLite: each is on the disk when `cast` returns, however many processes vote at once.

    cast -> one transaction, appended to the log     current_votes -> the last vote of each (annotator, item, question)

The log only grows, so a reader keeps what it has read, and each call reads what is new. To undo is to append a record
with the answer "", and to vote again is to append another: the latest record of an (annotator, item, question) is the
one that counts. A WAL with synchronous=FULL loses no vote that was acknowledged, even when the power fails. It needs a
local disk: SQLite does not support a WAL on network folders. While people vote, and after a kill until the study is
opened again, the newest votes are in the file next to it that ends in -wal: copy the whole folder, or export the votes.
"""

import json
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from threading import RLock

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.people.questions import VERSION
from nanochameleon.evaluate.people.study import Study, check_annotator

FILE, UNDONE = "votes.sqlite", ""
BUSY = 60.0  # seconds that a vote waits for those of other processes
DAY, MAX_SECONDS = 86_400.0, 1e9  # seconds
TICK = 1e-6  # seconds: the least time between two votes of an annotator
SCHEMA = """CREATE TABLE IF NOT EXISTS votes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    study TEXT NOT NULL, item TEXT NOT NULL, question TEXT NOT NULL, annotator TEXT NOT NULL,
    sides TEXT NOT NULL, answer TEXT NOT NULL, seconds REAL NOT NULL, time REAL NOT NULL, version INTEGER NOT NULL,
    UNIQUE (annotator, item, question, time))"""
FIELDS = "study, item, question, annotator, sides, answer, seconds, time, version"


@dataclass(frozen=True)
class Vote:
    study: str
    item: str
    question: str
    annotator: str
    order: tuple[str, ...]  # the answers as they were shown: left, right
    answer: str  # a label of the question, or UNDONE
    seconds: float  # from showing the question to the vote
    time: float  # seconds since 1970
    version: int = VERSION  # of the questions


class Votes:
    """The votes of one study. Several threads may share one object; each process opens its own."""

    def __init__(self, study: Study, wait: float = BUSY):
        self.study, self.lock, path = study, RLock(), study.folder / FILE
        self.n_read = 0  # the number of the last record that was read
        self.latest: dict[str, dict[tuple[str, str], Vote]] = defaultdict(dict)  # {annotator: {(item, question): vote}}
        self.people: dict[str, Counter] = defaultdict(Counter)  # {item: {annotator: how many votes count}}
        try:
            self.db = sqlite3.connect(path, timeout=wait, isolation_level=None, check_same_thread=False)
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = FULL")
            self.db.execute(SCHEMA)
        except sqlite3.Error as error:
            raise UserError(f"cannot open {path} ({error}): it must be a file of votes on a local disk") from None

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what happens inside, while no other process writes."""
        with self.lock:
            try:
                self.db.execute("BEGIN IMMEDIATE")
                self.refresh()
                yield
                self.db.execute("COMMIT")
            except BaseException as error:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):  # such as a full disk
                    raise UserError(f"the vote could not be saved ({error}): make room, and vote again") from None
                raise

    # -----------------------------------------------------------------------------------------------------------------
    # Writing

    def cast(
        self, annotator: str, item: str, question: str, answer: str, seconds: float, replace: bool = True
    ) -> bool:  # fmt: skip
        """Save a vote, and return whether anything changed: a click that arrives twice does not.

        replace=False keeps a vote that this annotator already has on the question.
        Raises UserError for an unknown annotator's name, item, question or answer.
        """
        known = self.study.items.get(item)
        order = self.study.sides(annotator, known) if known else ()
        vote = Vote(self.study.id, item, question, annotator, order, answer, seconds, 0.0)
        self.check(vote)
        with self.transaction():
            before = self.latest[annotator].get((item, question))
            if before and (before.answer == answer or (not replace and before.answer != UNDONE)):
                return False
            self.append(vote)
        return True

    def undo(self, annotator: str, only: tuple[str, str] | None = None) -> Vote | None:
        """Take back the annotator's last vote that counts, and return it. None: there is none.

        only: (item, question); any other vote stays.
        """
        with self.transaction():
            last = self.last_vote(annotator)
            if last is None or only not in (None, (last.item, last.question)):
                return None
            self.append(Vote(*astuple(last)[:5], UNDONE, 0.0, 0.0))
        return last

    def append(self, vote: Vote) -> None:
        """Append a vote with the time of now. An annotator's votes have increasing times, even if the clock jumps."""
        last = max((each.time for each in self.latest[vote.annotator].values()), default=0.0)
        self.insert("INSERT", vote, max(time.time(), last + TICK))

    def insert(self, how: str, vote: Vote, when: float) -> int:
        row = (*astuple(vote)[:4], json.dumps(vote.order), vote.answer, vote.seconds, when, vote.version)
        marks = ", ".join("?" * len(row))
        return self.db.execute(f"{how} INTO votes ({FIELDS}) VALUES ({marks})", row).rowcount

    def add(self, votes: Iterable[Vote]) -> int:
        """Save votes that were exported, all or none, and return how many of them are new."""
        votes = list(votes)
        for vote in votes:
            self.check(vote)
        with self.transaction():
            return sum(self.insert("INSERT OR IGNORE", vote, vote.time) for vote in votes)

    def check(self, vote: Vote) -> None:
        """Raise UserError for a vote that cannot belong to this study."""
        check_annotator(vote.annotator)
        item = self.study.items.get(vote.item)
        if vote.study != self.study.id or item is None:
            raise UserError(f"the vote's item {shown(vote.item)!r} is not in {self.study.folder}: open the right study")
        questions = {question.name: question for question in self.study.questions(item)}
        if vote.question not in questions:
            raise UserError(f"the vote answers {shown(vote.question)!r}: ask one of {', '.join(questions)}")
        if vote.answer not in (labels := questions[vote.question].labels) and vote.answer != UNDONE:
            raise UserError(f"the vote says {shown(vote.answer)!r}: answer one of {', '.join(labels)}")
        if sorted(vote.order) != sorted(item.answers):
            raise UserError(f"the vote on {vote.item} has other answers than the item: send it as it was exported")
        good = 0 <= vote.seconds < MAX_SECONDS and 0 <= vote.version < 2**31
        if not (good and 0 <= vote.time < time.time() + DAY):  # clocks may differ by hours
            raise UserError(f"the vote on {vote.item} has no real time or version: send it as it was exported")

    # -----------------------------------------------------------------------------------------------------------------
    # Reading

    def refresh(self) -> None:
        """Read what is new in the file. Of two votes on the same question, the one with the later time counts."""
        with self.lock, self.undamaged():
            query = f"SELECT number, {FIELDS} FROM votes WHERE number > ? ORDER BY number"
            for number, *row in self.db.execute(query, (self.n_read,)):
                self.n_read, vote = number, vote_of(row)
                if vote.study != self.study.id:
                    raise UserError(f"{self.study.folder / FILE} has votes on another study: restore the study's files")
                own, before = self.latest[vote.annotator], self.latest[vote.annotator].get((vote.item, vote.question))
                if before is None or before.time <= vote.time:
                    own[vote.item, vote.question] = vote
                    was, now = before is not None and before.answer != UNDONE, vote.answer != UNDONE
                    self.people[vote.item][vote.annotator] += now - was

    def log(self) -> list[Vote]:
        """Every record, in the order in which they were saved."""
        with self.undamaged():
            return [vote_of(row) for row in self.db.execute(f"SELECT {FIELDS} FROM votes ORDER BY number")]

    @contextmanager
    def undamaged(self) -> Iterator[None]:
        """Raise UserError where the file cannot be read."""
        try:
            yield
        except (sqlite3.Error, ValueError) as error:  # ValueError: no JSON
            path = self.study.folder / FILE
            raise UserError(f"{path} is damaged ({shown(error)}): restore a copy, or import exported votes") from None

    def current_votes(self, annotator: str | None = None) -> list[Vote]:
        """The votes that count: of one annotator, or of all."""
        with self.lock:
            self.refresh()
            chosen = [self.latest.get(annotator, {})] if annotator is not None else self.latest.values()
            return [vote for own in chosen for vote in own.values() if vote.answer != UNDONE]

    def last_vote(self, annotator: str) -> Vote | None:
        """The newest vote of an annotator that counts."""
        return max(self.current_votes(annotator), key=lambda vote: vote.time, default=None)

    def n_others(self, item: str, annotator: str) -> int:
        """How many other annotators have votes on an item, as far as was read."""
        return sum(count > 0 and name != annotator for name, count in self.people[item].items())


def vote_of(row: Sequence) -> Vote:
    return Vote(*row[:4], tuple(json.loads(row[4])), *row[5:])
