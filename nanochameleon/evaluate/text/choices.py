"""Candidate scoring, as the paper did it (section 4.1): the model chooses the likeliest of a question's options.

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
from typing import Any

from nanochameleon.errors import UserError
from nanochameleon.evaluate.scoring import context_and_continuation, next_scores
from nanochameleon.evaluate.scoring import score as score_pairs
from nanochameleon.evaluate.statistics import mean_figure
from nanochameleon.evaluate.task import Answer, Figure, Item, Line, Options, Task, digest, item_seed
from nanochameleon.evaluate.text.files import read_split
from nanochameleon.evaluate.text.prompts import QUESTIONS, Question
from nanochameleon.training.run import Run

BETWEEN_SHOTS = "\n\n"


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
    name, k = benchmark.data, number_of_shots(benchmark, options)
    rows = [row for _, row in read_split(name, options.data, benchmark.split)][: options.limit]
    shots = training_shots(name, options) if k else []
    if len(shots) < k:
        raise UserError(f"the training split of {name} has {len(shots)} items for {k} shots: give fewer --shots")
    return [
        item(name, row, draw(shots, k, item_seed(options.seed, "shots", name)))
        for name, row in zip(names(rows), map(QUESTIONS[benchmark.data], rows), strict=True)
    ]


def number_of_shots(benchmark: Benchmark, options: Options) -> int:
    k = benchmark.shots if options.shots is None else options.shots
    if benchmark.name.endswith("shot") and k != benchmark.shots:
        raise UserError(f"{benchmark.name} has {benchmark.shots} shots, not {k}: leave --shots out, or ask for {benchmark.data}")
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
    return sorted((QUESTIONS[name](row).with_answer() for _, row in read_split(name, options.data, "train")), key=digest)


def draw(shots: Sequence[str], k: int, seed: int) -> str:
    return "".join(shot + BETWEEN_SHOTS for shot in random.Random(seed).sample(shots, k))


def item(name: str, question: Question, before: str, group: str = "") -> Item:
    """before: what comes in front of the question, such as shots."""
    return Item(name, {"before": before, **question._asdict()}, group)


def question_of(content: dict) -> Question:
    return Question(*(content[name] for name in Question._fields))


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def answer(benchmark: Benchmark, run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    """Return the log-probability of each option of each item."""
    questions = [question_of(each.content) for each in items]
    asked = [
        [encode(run, each.content["before"] + context, continuation) for context, continuation in question.pairs()]
        for each, question in zip(items, questions, strict=True)
    ]
    scored = log_probs(run, asked)
    outputs: list[dict[str, Any]] = [{"log_probs": [log_prob for log_prob, _ in each]} for each in scored]
    if "acc_answer" in benchmark.metrics:
        plain = [[encode(run, "Answer:", continuation) for _, continuation in q.pairs()] for q in questions]
        for output, found in zip(outputs, log_probs(run, plain), strict=True):
            output["answer_log_probs"] = [log_prob for log_prob, _ in found]
    return [
        Answer([token for pair in pairs for part in pair for token in part], output, any(cut for _, cut in each))
        for pairs, output, each in zip(asked, outputs, scored, strict=True)
    ]


Pair = tuple[list[int], list[int]]


def encode(run: Run, context: str, continuation: str) -> Pair:
    """Return the tokens of both, <s> first."""
    before, after = context_and_continuation(run.tokenizer, context, f" {continuation}")
    return [run.vocab.bos, *before], after


def log_probs(run: Run, asked: Sequence[list[Pair]]) -> list[list[tuple[float, bool]]]:
    """Return (log-probability, was the context cut) of each pair. Single tokens after one context need one pass."""
    found: list[list[tuple[float, bool]]] = [[] for _ in asked]
    scored = iter(score_pairs(run, [pair for pairs in asked for pair in pairs]))
    for i, pairs in enumerate(asked):
        found[i] = [(s.log_prob, s.truncated) for s, _ in zip(scored, pairs)]
    return found
