"""Word problems: GSM8K and MATH. The model writes a solution, and its answer is read from it (answers.py).

    files -> shots + question -> write: greedy, or k samples -> an answer from each -> majority -> right or wrong

Paper: section 4.1, 8 and 4 shots, maj@1 greedy, maj@k a majority vote over k samples. It prints neither its prompts nor
how it samples. Here shots come from the training split that the user brings, chosen by the seed, the same ones for
all items; samples are drawn at temperature 0.6 and top-p 0.95, as for Minerva (2206.14858). A sample without an answer
does not vote. Next to our own reading of an answer there is a published strict one.
"""

import random
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from nanochameleon.errors import UserError
from nanochameleon.evaluate.statistics import default_figures
from nanochameleon.evaluate.task import Answer, Figure, Item, Line, Options, Task, digest, item_seed
from nanochameleon.evaluate.text import answers
from nanochameleon.evaluate.text.candidates import BETWEEN_SHOTS, names
from nanochameleon.evaluate.text.files import read_split
from nanochameleon.evaluate.writing import write
from nanochameleon.training.run import Run

Row = dict[str, Any]
TEMPERATURE, TOP_P = 0.6, 0.95  # of several samples


@dataclass(frozen=True)
class Reading:
    """How an answer is read, and what it must equal."""

    text: Callable[[str], Hashable | None]  # a solution -> its answer, None without one
    target: Callable[[str], Hashable | None]  # the right answer in the same form


@dataclass(frozen=True)
class Benchmark:
    name: str
    title: str
    shots: int
    new_tokens: int  # at most
    question: Callable[[Row], str]  # row -> the end of a prompt
    solution: Callable[[Row], str]  # row -> what follows it in a shot
    target: Callable[[Row], str | None]  # row -> the right answer; None: the row has none
    next_question: str  # where a model that has answered goes to: the stop string
    readings: dict[str, Reading]  # our own, "", and a published one
    paper: str
    files: str
    source: str


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(benchmark: Benchmark, options: Options) -> list[Item]:
    """Return the test items, each with the shots before it."""
    found = read_split(benchmark.name, options.data, "test")[: options.limit]
    rows = [row for _, row in found]
    preamble = "".join(shot + BETWEEN_SHOTS for shot in shots(benchmark, options))
    return [item(benchmark, name, row, place, preamble) for name, (place, row) in zip(names(rows), found, strict=True)]


def item(benchmark: Benchmark, name: str, row: Row, place: str, preamble: str) -> Item:
    """Raises UserError for a row without an answer."""
    target = benchmark.target(row)
    if target is None or any(reading.target(target) is None for reading in benchmark.readings.values()):
        raise UserError(f"{place} has no answer that can be read: mend its solution, or remove it")
    content = {"preamble": preamble, "question": benchmark.question(row), "target": target}
    return Item(name, content | {"level": row.get("level", "")}, row.get("type", ""))


def shots(benchmark: Benchmark, options: Options) -> list[str]:
    """Return solved items of the training split: which ones depends on the seed and on what is there, not its order."""
    k = benchmark.shots if options.shots is None else options.shots
    rows = [row for _, row in read_split(benchmark.name, options.data, "train")] if k else []
    # A drawing in source code ([asy]) is long, and says nothing to a model of text.
    usable = {
        benchmark.question(row) + benchmark.solution(row)
        for row in rows if benchmark.target(row) is not None and "[asy]" not in str(row)
    }  # fmt: skip
    if len(usable) < k:
        raise UserError(
            f"the training split of {benchmark.name} has {len(usable)} usable items for {k} shots: give fewer --shots"
        )
    return random.Random(item_seed(options.seed, benchmark.name, "shots")).sample(sorted(usable, key=digest), k)


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def answer(benchmark: Benchmark, run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    """Return options.samples solutions of each item; a single one is greedy."""
    k = options.samples
    prompts = [
        [run.vocab.bos, *run.tokenizer.encode(item.content["preamble"] + item.content["question"])] for item in items
    ]
    written = write(
        run,
        [prompt for prompt in prompts for _ in range(k)],
        min(benchmark.new_tokens, run.cfg.model.max_seq_len // 2),  # so that a small model sees half a prompt at least
        stop_strings=[benchmark.next_question],
        temperature=TEMPERATURE if k > 1 else 0.0,
        top_p=TOP_P if k > 1 else 1.0,
        seeds=[item_seed(options.seed, item.id, sample) for item in items for sample in range(k)],
    )
    samples = [written[start : start + k] for start in range(0, len(written), k)]
    return [
        Answer(
            prompt,
            {"texts": [each.text for each in some], "stopped": [each.stopped for each in some]},
            some[0].truncated,
        )
        for prompt, some in zip(prompts, samples, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def score(benchmark: Benchmark, content: dict, output: dict) -> tuple[str | None, dict[str, float]]:
    """Return the answer that most samples gave, and {"maj@k": 1.0, ...}."""
    texts, winners, metrics = output["texts"], {}, {}
    for name, reading in benchmark.readings.items():
        found, target = [reading.text(text) for text in texts], reading.target(content["target"])
        winners[name] = answers.majority(found)
        metrics[f"{name} maj@{len(texts)}".strip()] = float(winners[name] == target)
        if not name and len(texts) > 1:
            metrics["one sample"] = fmean(each == target for each in found)
    return None if winners[""] is None else str(winners[""]), metrics


def figures(benchmark: Benchmark, lines: Sequence[Line]) -> list[Figure]:
    """Return the means of all metrics, and of each by subject and by level."""
    found = default_figures(lines)
    by_level = default_figures([replace(line, group=line.content["level"]) for line in lines])
    found += [figure for figure in by_level if ", Level" in figure.name]
    note = (
        f"Paper: {benchmark.paper}, with shots that it does not disclose. Shots here: from the training split, the "
        "same ones for all items. Samples without an answer do not vote."
    )
    return [replace(figure, note=note if is_main(figure.name) else "") for figure in found]


def is_main(name: str) -> bool:
    return name.startswith("maj@") and "," not in name


def task(benchmark: Benchmark) -> Task:
    functions = (partial(function, benchmark) for function in (read, answer, score, figures))
    texts = benchmark.name, benchmark.title, benchmark.files, benchmark.source
    return Task(*texts, *functions, takes=("shots", "samples"))


# ---------------------------------------------------------------------------------------------------------------------
# The benchmarks

CALCULATOR = re.compile(r"<<[^>]*>>")  # <<48/2=24>>, for a calculator that no model here has


def gsm8k_target(row: Row) -> str:
    return row["answer"].split("####")[-1].strip()


def math_target(row: Row) -> str | None:
    r"""What the solution boxes; a few of MATH's own solutions use \fbox."""
    return answers.boxed(row["solution"]) or answers.boxed(row["solution"].replace(r"\fbox", r"\boxed"))


def math_solution(row: Row) -> str:
    """The solution, and Minerva's sentence, from which its rule reads the answer."""
    return f" {row['solution']}\n{answers.BEFORE}${math_target(row)}${answers.AFTER}"


def math_answer(text: str) -> str | None:
    """Our own reading: what the last box holds, else Minerva's sentence."""
    found = answers.boxed(text) or answers.final_answer(text)
    return None if found is None else answers.spelling(found.strip("$"))


def math_minerva(text: str) -> str | None:
    found = answers.final_answer(text)
    return None if found is None else answers.minerva_spelling(found)


GSM8K = Benchmark(
    "gsm8k", "GSM8K: word problems of grade school; 8 shots, --samples for maj@k", 8, 256,
    lambda row: f"Question: {row['question']}\nAnswer:",
    lambda row: " " + CALCULATOR.sub("", row["answer"]),
    gsm8k_target, "Question:",
    {
        "": Reading(answers.number, answers.number),
        "strict": Reading(answers.strict, lambda target: answers.strict(f"#### {target}")),
    },
    "7B 41.6, 34B 61.4 (maj@1); 7B 50.9 (maj@8), 34B 77.0 (maj@32)",
    "grade_school_math/data/test.jsonl and train.jsonl, or gsm8k/main/test-*.parquet and train-*.parquet",
    "github.com/openai/grade-school-math, or openai/gsm8k on the hub",
)  # fmt: skip
MATH = Benchmark(
    "math", "MATH: problems of competitions; 4 shots, --samples for maj@k", 4, 512,
    lambda row: f"Problem:\n{row['problem']}\n\nSolution:",
    math_solution, math_target, "Problem:",
    {"": Reading(math_answer, answers.spelling), "minerva": Reading(math_minerva, answers.minerva_spelling)},
    "7B 11.5, 34B 22.5 (maj@1); 7B 12.9, 34B 24.7 (maj@4)",
    "MATH/test/SUBJECT/N.json and train/SUBJECT/N.json, or hendrycks_math/SUBJECT/test-*.parquet and train-*.parquet",
    "github.com/hendrycks/math, or EleutherAI/hendrycks_math on the hub",
)  # fmt: skip
TASKS = (task(GSM8K), task(MATH))
