"""MMLU (2009.03300): 57 subjects, 4 options, 5 shots; the model names a letter.

    subject, its first five dev items, the question -> one forward pass -> log-probability of each letter -> acc

The figure that the paper prints is the mean over all questions, as the authors' own script has it, so large subjects
count more. Each subject has its figure, too. The wording is that of lm-evaluation-harness; the authors' own differs by
one space. Items of all subjects take turns, so that --limit asks about all of them. A chunk has 8 of each, whose shots
the model reads once (scoring.py), and one pass gives all four letters.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from nanochameleon.errors import UserError
from nanochameleon.evaluate.statistics import default_figures
from nanochameleon.evaluate.task import Figure, Item, Line, Options
from nanochameleon.evaluate.text import candidates
from nanochameleon.evaluate.text.candidates import BETWEEN_SHOTS, Benchmark
from nanochameleon.evaluate.text.files import read_split
from nanochameleon.evaluate.text.prompts import mmlu as question_of

MMLU = Benchmark(
    "mmlu", "MMLU: 57 subjects from school to profession, 4 options, 5 shots", "mmlu", "test", ("acc",),
    "7B 52.1, 34B 65.8, Llama-2-7B 45.3, 34B 62.6",
    "mmlu/data/test/*_test.csv and dev/*_dev.csv, or mmlu/all/test-*.parquet and dev-*.parquet",
    "github.com/hendrycks/test (data.tar), or cais/mmlu on the hub",
    shots=5,
)  # fmt: skip


def read(options: Options) -> list[Item]:
    """Return the items, the first one of each subject, then the second one, and so on."""
    k = MMLU.shots if options.shots is None else options.shots
    dev = by_subject("dev", options) if k else {}
    found = []
    for subject, rows in by_subject("test", options).items():
        shots = [question_of(row).with_answer() for row in dev.get(subject, [])[:k]]
        if len(shots) < k:
            raise UserError(f"mmlu has {len(shots)} dev items of {subject}, too few for {k} shots: give fewer --shots")
        preamble = BETWEEN_SHOTS.join([description(subject), *shots, ""])
        named = zip(candidates.names(rows), rows, strict=True)
        found.append([candidates.item(name, question_of(row), preamble, subject) for name, row in named])
    turns = [item for n in range(max(map(len, found))) for items in found for item in items[n : n + 1]]
    return turns[: options.limit]


def by_subject(split: str, options: Options) -> dict[str, list[dict]]:
    rows = defaultdict(list)
    for _, row in read_split("mmlu", options.data, split):
        rows[row["subject"]].append(row)
    return dict(sorted(rows.items()))


def description(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."


def figures(lines: Sequence[Line]) -> list[Figure]:
    """Return the figure over all questions, with what the paper has, and one for each subject."""
    return [*candidates.figures(MMLU, lines), *default_figures(lines, chance=lambda line: 0.25)[1:]]


TASKS = (replace(candidates.task(MMLU), read=read, figures=figures, chunk=57 * 8),)
