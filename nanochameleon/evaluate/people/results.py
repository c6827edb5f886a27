"""What the votes of a study say, with the names of the models.

    votes -> the majority of each item -> counts by model or pair, question and kind of prompt

Three people who all differ have no majority: of a pair this counts as a tie, as in the paper, and of a single answer it
is a result of its own. Items that check the annotators count in `quality` alone.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from statistics import median

import numpy as np

from nanochameleon.evaluate.agreement import (
    TIE,
    alpha_interval,
    krippendorff_alpha,
    majority,
    win_rate,
    win_rate_interval,
)
from nanochameleon.evaluate.people import bradley_terry
from nanochameleon.evaluate.people.questions import FIRST, SECOND
from nanochameleon.evaluate.people.study import Asked, Item, Key, Study
from nanochameleon.evaluate.people.votes import Vote

NO_MAJORITY = "no majority"
ALL, MIXED, TEXT_ONLY = "all prompts", "mixed-modal", "text-only"
Pair = tuple[str, str]  # two models, in the order of the study


@dataclass(frozen=True)
class Judged:
    """An item, a question, and what people said: labels, or in a pair the better model or TIE."""

    prompt: Asked
    subject: Pair | str  # the models that are compared, or the one whose answer this is
    question: str
    said: dict[str, str]  # by annotator

    @cached_property
    def result(self) -> str:
        return majority(list(self.said.values()), TIE if isinstance(self.subject, tuple) else NO_MAJORITY)

    @property
    def kinds(self) -> set[str]:
        """The rows of a table in which it counts."""
        own = {self.prompt.task_type} - {ALL, MIXED, TEXT_ONLY}  # a kind of task may have such a name
        return {ALL, MIXED if self.prompt.has_images else TEXT_ONLY} | own


@dataclass(frozen=True)
class Quality:
    """How carefully one annotator voted."""

    votes: int
    median_seconds: float
    repeated: int  # questions of duplicates whose original was answered, too
    same_again: int  # of these
    checks: int  # of attention
    failed: int  # of these


@dataclass(frozen=True)
class Results:
    models: tuple[str, ...]
    judged: list[Judged] = field(default_factory=list)  # items with enough votes
    incomplete: int = 0  # items and questions with some votes, and not enough
    quality: dict[str, Quality] = field(default_factory=dict)  # by annotator

    @property
    def pairs(self) -> list[Pair]:
        seen = {each.subject for each in self.judged}
        return [pair for pair in combinations(self.models, 2) if pair in seen]

    def about(self, subject: Pair | str, question: str | None = None) -> list[Judged]:
        return [e for e in self.judged if e.subject == subject and question in (None, e.question)]

    def counts(self, subject: Pair | str, question: str | None = None) -> dict[str, Counter]:
        """{kind of prompts: how many items have each result}."""
        counts: dict[str, Counter] = defaultdict(Counter)
        for each in self.about(subject, question):
            for kind in each.kinds:
                counts[kind][each.result] += 1
        return counts

    def outcomes(self, pair: Pair) -> dict[str, tuple[int, int, int]]:
        """{kind of prompts: wins, ties and losses of the pair's first model}."""
        counts = self.counts(pair)
        return {kind: (count[pair[0]], count[TIE], count[pair[1]]) for kind, count in counts.items()}

    def win_rates(self) -> dict[Pair, tuple[float, float, float, int]]:
        """{pair: win rate of its first model, 95% interval, number of prompts}. A tie is half a win."""
        rates = {}
        for pair in self.pairs:
            counts = self.outcomes(pair)[ALL]
            rates[pair] = win_rate(*counts)[0], *win_rate_interval(*counts), sum(counts)
        return rates

    def alphas(self, n_resamples: int = 1_000) -> dict[str, tuple[float, float, float, int] | str]:
        """{question, or "A against B": Krippendorff's alpha, its 95% interval, number of items; or why it has none}."""
        groups = defaultdict(list)
        for each in self.judged:
            name = " against ".join(each.subject) if isinstance(each.subject, tuple) else each.question
            groups[name].append(each.said)
        return {name: alpha_of(groups[name], n_resamples) for name in sorted(groups)}

    def agreement(self, pair: Pair) -> tuple[int, int, int]:
        """How many items have votes that are all equal, only a majority, no majority."""
        levels = [level(list(each.said.values())) for each in self.about(pair)]
        return levels.count("all"), levels.count("majority"), levels.count("none")

    def ratings(self, n_resamples: int = 1_000) -> dict[str, tuple[float, float, float]]:
        """{model: Bradley-Terry rating and its 95% interval}. Nothing for fewer than three models."""
        models = [model for model in self.models if any(model in pair for pair in self.pairs)]
        if len(models) < 3:
            return {}
        place = {model: i for i, model in enumerate(models)}
        wins: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((len(models), len(models))))
        for each in self.judged:
            if isinstance(each.subject, tuple):
                one, other = (place[model] for model in each.subject)
                share = {each.subject[0]: 1.0, each.subject[1]: 0.0}.get(each.result, 0.5)
                wins[each.prompt.id][one, other] += share
                wins[each.prompt.id][other, one] += 1 - share
        rows = bradley_terry.ratings(np.stack(list(wins.values())), n_resamples)
        return {model: tuple(map(float, row)) for model, row in zip(models, rows, strict=True)}


def results(study: Study, key: Key, votes: Iterable[Vote], least: int | None = None) -> Results:
    """Judge each item that has `least` votes; None: as many as the study wants."""
    votes, least = list(votes), study.votes_per_item if least is None else least
    said: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for vote in votes:
        if key.counts(study.items[vote.item]):
            said[vote.item, vote.question][vote.annotator] = meaning(vote, key)
    judged = []
    for (name, question), answers in sorted(said.items()):
        if len(answers) >= least:
            item = study.items[name]
            judged.append(Judged(key.prompts[item.prompt], subject(item, key), question, answers))
    return Results(key.models, judged, len(said) - len(judged), quality(study, key, votes))


def subject(item: Item, key: Key) -> Pair | str:
    models = sorted((key.answers[name] for name in item.answers), key=key.models.index)
    return models[0] if len(models) == 1 else (models[0], models[1])


def meaning(vote: Vote, key: Key) -> str:
    """The label, or in a pair the better model: sides differ between annotators, so labels of pairs mean nothing."""
    if len(vote.order) == 1:
        return vote.answer
    left, right = (key.answers[name] for name in vote.order)
    return {FIRST: left, SECOND: right}.get(vote.answer, TIE)


def level(said: Sequence[str]) -> str:
    if len(set(said)) == 1:
        return "all"
    return "none" if majority(said, otherwise=None) is None else "majority"


def alpha_of(said: list[dict[str, str]], n_resamples: int) -> tuple[float, float, float, int] | str:
    people = sorted({name for each in said for name in each})
    ratings = [[each.get(name) for each in said] for name in people]
    try:
        low, high, _ = alpha_interval(ratings, n_resamples=n_resamples)
        return krippendorff_alpha(ratings), low, high, sum(len(each) >= 2 for each in said)
    except ValueError as error:
        return str(error)


def quality(study: Study, key: Key, votes: Sequence[Vote]) -> dict[str, Quality]:
    """By annotator: pace, the same answer to the same item again, and checks of attention."""
    by_person: dict[str, dict[tuple[str, str], Vote]] = defaultdict(dict)
    for vote in votes:
        by_person[vote.annotator][vote.item, vote.question] = vote
    return {name: quality_of(own, key) for name, own in sorted(by_person.items())}


def quality_of(own: dict[tuple[str, str], Vote], key: Key) -> Quality:
    again = [
        (vote, own[key.duplicates[item], question])
        for (item, question), vote in own.items()
        if item in key.duplicates and (key.duplicates[item], question) in own
    ]
    checks = [vote for (item, _), vote in own.items() if item in key.attention]
    return Quality(
        len(own),
        median(vote.seconds for vote in own.values()),
        len(again),
        sum(meaning(one, key) == meaning(other, key) for one, other in again),
        len(checks),
        sum(vote.answer != key.attention[vote.item][vote.question] for vote in checks),
    )
