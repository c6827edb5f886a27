"""Candidate scoring, as in the paper's section 4.1: the model chooses the likeliest of a question's options.

    rows -> questions, with shots -> log-probability of each option -> a choice by each normalisation -> shares of right

The protocol is Llama's (2302.13971, section 3), which the paper follows. Its normalisations are the metrics here:

    acc         log P(option | context)
    acc_norm    log P(option | context) / characters of the option
    acc_answer  log P(option | context) - log P(option | "Answer:")       for OpenBookQA and BoolQ: GPT-3's rule

Shots are drawn from the training split by (seed, item), so they depend neither on the other items nor on --limit. Left
out: normalisation by tokens, which would make a figure depend on the tokenizer.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from statistics import fmean
from typing import Any

from nanochameleon.errors import UserError
from nanochameleon.evaluate.scoring import Scored, context_and_continuation, too_long
from nanochameleon.evaluate.scoring import score as score_pairs
from nanochameleon.evaluate.statistics import mean_figure
from nanochameleon.evaluate.task import Answer, Figure, Item, Line, Options, Task, digest, item_seed
from nanochameleon.evaluate.text.files import read_split
from nanochameleon.evaluate.text.prompts import QUESTIONS, Question
from nanochameleon.training.run import Run

BETWEEN_SHOTS = "\n\n"
NOTES = {"acc": "sum of log P", "acc_norm": "log P by character", "acc_answer": 'log P less that after "Answer:"'}


@dataclass(frozen=True)
class Benchmark:
    """A task of this room."""

    name: str
    title: str
    data: str  # the name of the set in files.py
    split: str
    metrics: tuple[str, ...]  # the paper's first
    paper: str  # what the paper prints for it
    files: str
    source: str
    shots: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(benchmark: Benchmark, options: Options) -> list[Item]:
    """Return the items, each with its shots."""
    k = number_of_shots(benchmark, options)
    rows = [row for _, row in read_split(benchmark.data, options.data, benchmark.split)][: options.limit]
    shots = training_shots(benchmark.data, options) if k else []
    if len(shots) < k:
        which = f"the training split of {benchmark.data} has {len(shots)} items"
        raise UserError(f"{which}, too few for {k} shots: give fewer --shots")
    return [
        item(name, question, draw(shots, k, item_seed(options.seed, "shots", name)))
        for name, question in zip(names(rows), map(QUESTIONS[benchmark.data], rows), strict=True)
    ]


def number_of_shots(benchmark: Benchmark, options: Options) -> int:
    k = benchmark.shots if options.shots is None else options.shots
    if benchmark.name.endswith("shot") and k != benchmark.shots:
        raise UserError(
            f"{benchmark.name} always has {benchmark.shots} shots, not {k}: leave --shots out, or run {benchmark.data}"
        )
    return k


def names(rows: Sequence[dict]) -> list[str]:
    """Return an id for each row: its own, or a hash of it. Equal rows get -2, -3 and so on.

    A hash is the same in the authors' file and in the hub's, and stays when the rows come in another order.
    """
    seen: Counter[str] = Counter()
    found = []
    for row in rows:
        name = row.get("id") or digest(row)
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found


def training_shots(name: str, options: Options) -> list[str]:
    """Return the text of every training item, in an order that is not the file's."""
    rows = [row for _, row in read_split(name, options.data, "train")]
    return sorted((QUESTIONS[name](row).with_answer() for row in rows), key=digest)


def draw(shots: Sequence[str], k: int, seed: int) -> str:
    return "".join(shot + BETWEEN_SHOTS for shot in random.Random(seed).sample(shots, k))


def item(name: str, question: Question, preamble: str, group: str = "") -> Item:
    """preamble: what comes in front of the question, such as shots."""
    return Item(name, {"preamble": preamble, **question._asdict()}, group)


def question_of(content: dict) -> Question:
    return Question(*(content[name] for name in Question._fields))


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def answer(benchmark: Benchmark, run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    """Return the log-probability of each option of each item, or that an option is too long for the model."""
    asked = [encode_item(run, each) for each in items]
    problems = [too_long(run, (continuation for _, continuation in pairs)) for pairs in asked]
    good = [i for i, problem in enumerate(problems) if not problem]
    found = answer_fitting(benchmark, run, [items[i] for i in good], [asked[i] for i in good])
    answers = dict(zip(good, found, strict=True))
    return [answers[i] if i in answers else Answer([], {"problem": problem}) for i, problem in enumerate(problems)]


def answer_fitting(
    benchmark: Benchmark, run: Run, items: Sequence[Item], asked: "Sequence[list[Pair]]"
) -> list[Answer]:
    """Return the log-probabilities of items whose options fit. asked: the pairs of each item."""
    scored = score_each(run, asked)
    outputs: list[dict[str, Any]] = [{"log_probs": log_probs(each)} for each in scored]
    if "acc_answer" in benchmark.metrics:
        plain = [
            [encode(run, "Answer:", continuation) for _, continuation in question_of(each.content).pairs()]
            for each in items
        ]
        for output, each in zip(outputs, score_each(run, plain), strict=True):
            output["answer_log_probs"] = log_probs(each)
    return [
        Answer([*chain(*chain(*pairs))], output, any(one.truncated for one in each))
        for pairs, output, each in zip(asked, outputs, scored, strict=True)
    ]


def log_probs(scored: Sequence[Scored]) -> list[float]:
    return [one.log_prob for one in scored]


Pair = tuple[list[int], list[int]]


def encode_item(run: Run, item: Item) -> list[Pair]:
    """Return the pair of each option, with shots in front of the context."""
    preamble, question = item.content["preamble"], question_of(item.content)
    return [encode(run, preamble + context, continuation) for context, continuation in question.pairs()]


def encode(run: Run, context: str, continuation: str) -> Pair:
    """Return the tokens of both, <s> first."""
    before, after = context_and_continuation(run.tokenizer, context, f" {continuation}")
    return [run.vocab.bos, *before], after


def score_each(run: Run, asked: Sequence[list[Pair]]) -> list[list[Scored]]:
    """Score the pairs of all items at once, and return them by item."""
    scored = iter(score_pairs(run, [pair for pairs in asked for pair in pairs]))
    return [list(islice(scored, len(pairs))) for pairs in asked]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def score(benchmark: Benchmark, content: dict, output: dict) -> tuple[str, dict[str, float]]:
    """Return the option that the paper's metric chooses, and 1.0 for each metric that chooses the right one."""
    question = question_of(content)
    chosen = {metric: likeliest(metric, question, output) for metric in benchmark.metrics}
    metrics = {metric: float(index == question.right) for metric, index in chosen.items()}
    return question.options[chosen[benchmark.metrics[0]]], metrics


def likeliest(metric: str, question: Question, output: dict) -> int:
    """Return the index of the option that a metric chooses; of equal ones, the first."""
    scores = output["log_probs"]
    if metric == "acc_norm":  # an empty option counts as one character
        scores = [s / max(1, len(text)) for s, (_, text) in zip(scores, question.pairs(), strict=True)]
    elif metric == "acc_answer":
        scores = [s - plain for s, plain in zip(scores, output["answer_log_probs"], strict=True)]
    return max(range(len(scores)), key=scores.__getitem__)


def figures(benchmark: Benchmark, lines: Sequence[Line]) -> list[Figure]:
    """Return a figure for each metric: the paper's, with what the paper has, and the others."""
    questions = [question_of(line.content) for line in lines]
    chance = fmean(1 / len(question.options) for question in questions)
    baseline = fmean(longest(question) == question.right for question in questions)
    notes = {metric: NOTES[metric] for metric in benchmark.metrics}
    notes[benchmark.metrics[0]] += f"; the paper has {benchmark.paper}; baseline: the longest option"
    return [
        mean_figure(metric, [line.metrics[metric] for line in lines], chance=chance, baseline=baseline, note=note)
        for metric, note in notes.items()
    ]


def longest(question: Question) -> int:
    """Return the index of the longest option: what one chooses who does not read the question."""
    return max(range(len(question.options)), key=lambda i: len(question.options[i]))


def task(benchmark: Benchmark) -> Task:
    return Task(
        benchmark.name,
        benchmark.title,
        benchmark.files,
        benchmark.source,
        partial(read, benchmark),
        partial(answer, benchmark),
        partial(score, benchmark),
        partial(figures, benchmark),
        takes=("shots",),
    )
