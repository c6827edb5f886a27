"""Questions about images: VQAv2, OK-VQA, VizWiz, by VQA's official accuracy.

    image, "Question: ... Short answer: ...", newline, ..., image, "Question: ... Short answer:" -> a line -> accuracy

The form of the question is Flamingo's (arXiv 2204.14198), as OpenFlamingo publishes it. The paper used "other models'
prompts" and does not say which. Each question is asked twice, the second time without any image: what is right then is
no sight. The answer is the first line, without its final full stop, which the official rule does not always drop.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from nanochameleon.errors import warn
from nanochameleon.evaluate.statistics import mean_figure
from nanochameleon.evaluate.task import Answer, Figure, Item, Line, Options, Task
from nanochameleon.evaluate.vision import files
from nanochameleon.evaluate.vision.files import Asked, official_id
from nanochameleon.evaluate.vision.prompts import SHOTS, ask, check_pool, draw_shots, make_content, one_line, parts_of
from nanochameleon.evaluate.vqa import accuracy
from nanochameleon.files import write_file
from nanochameleon.training.run import Run

MAX_NEW_TOKENS = 10
FORM = "Question: {} Short answer:"

Read = Callable[[Path | None, bool], tuple[list[Asked], list[Asked]]]


def read(options: Options, reader: Read) -> list[Item]:
    """Return the questions, each with its examples. Raises UserError."""
    n = SHOTS if options.shots is None else options.shots
    asked, training = reader(options.data, n > 0)
    check_pool(training, n, options.data)
    return [
        Item(each.id, content(each, training, n, options.seed), each.answer_type) for each in asked[: options.limit]
    ]


def content(asked: Asked, training: Sequence[Asked], n: int, seed: int) -> dict:
    drawn = draw_shots(training, asked, n, seed)
    shots = [[shot.image, f"{form(shot)} {one_line(most_common(shot.references))}\n"] for shot in drawn]
    return make_content(shots, asked.image, form(asked), asked.references)


def form(asked: Asked) -> str:
    return FORM.format(one_line(asked.question))


def most_common(texts: Sequence[str]) -> str:
    """Return the most frequent text; of several, the one that comes first."""
    return Counter(texts).most_common(1)[0][0]


def answer(run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    known = any(item.content["references"] for item in items)  # test questions get no figure to compare with
    return ask(run, [parts_of(item.content) for item in items], options.data, MAX_NEW_TOKENS, blind=known)


def score(content: dict, output: dict) -> tuple[str, dict[str, float]]:
    """Return the answer and its accuracy, with that of the answer without images. Test questions have no accuracy."""
    said, references = short(output["text"]), content["references"]
    if not references:
        return said, {}
    return said, {"acc": accuracy(said, references), "acc_blind": accuracy(short(output["blind"]), references)}


def short(text: str) -> str:
    """Return the first line without a final full stop."""
    return (text.strip().splitlines() or [""])[0].strip().removesuffix(".").rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# The whole set


def figures(lines: Sequence[Line], note: str = "") -> list[Figure]:
    """Return the accuracy, also by type of answer, and that of the most common answer alone."""
    kinds = sorted({line.group for line in lines})
    parts = [(f"acc, {kind}", [line for line in lines if line.group == kind]) for kind in kinds]
    common = most_common([most_common(line.content["references"]) for line in lines])
    always = [accuracy(common, line.content["references"]) for line in lines]
    return [
        accuracy_figure("acc", lines, note),
        *(accuracy_figure(name, part) for name, part in parts),
        mean_figure(f"always {common!r}", always, "questions", note="the most common answer of this set"),
    ]


def answered_figures(lines: Sequence[Line]) -> list[Figure]:
    """Return how many test questions have an answer: whether it is right, EvalAI knows."""
    answered = [float(line.extracted != "") for line in lines]
    return [mean_figure("answered", answered, "questions", note="accuracy is EvalAI's, from results.json")]


def accuracy_figure(name: str, lines: Sequence[Line], note: str = "") -> Figure:
    """The baseline is the same model without images; the ceiling is the most common of people's answers."""
    blind = [line.metrics["acc_blind"] for line in lines]
    best = [accuracy(most_common(texts), texts) for texts in (line.content["references"] for line in lines)]
    values, levels = [line.metrics["acc"] for line in lines], {"baseline": fmean(blind), "ceiling": fmean(best)}
    return mean_figure(name, values, "questions", note=note, **levels)


def export(lines: Sequence[Line], options: Options, folder: Path, key: str = "question_id") -> None:
    """Write results.json for the official scorer: [{"question_id": ..., "answer": ...}]; VizWiz has "image"."""
    kept = [line for line in lines if "problem" not in line.output]
    results = [{key: official_id(line.id), "answer": line.extracted} for line in kept]
    write_file(folder / "results.json", json.dumps(results).encode())


def export_vizwiz(lines: Sequence[Line], options: Options, folder: Path) -> None:
    export(lines, options, folder, "image")


def export_test(lines: Sequence[Line], options: Options, folder: Path) -> None:
    """Write results.json for EvalAI, which takes the answers to all questions alone."""
    if options.limit is None and not any("problem" in line.output for line in lines):
        export(lines, options, folder)
    else:
        warn(f"{folder / 'results.json'} is not written: EvalAI wants the answers to all questions")


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def question_task(name: str, title: str, wanted: str, source: str, reader: Read, note: str = "") -> Task:
    return Task(
        name,
        title,
        wanted,
        source,
        read=lambda options: read(options, reader),
        answer=answer,
        score=score,
        figures=lambda lines: figures(lines, f"asked as {FORM.format('...')!r}; {note}"),
        export=export,
        takes=("shots",),
        chunk=128,
    )


def coco_files(version: str, split: str) -> str:
    return f"{version}OpenEnded_mscoco_{split}_questions.json, {version}mscoco_{split}_annotations.json"


TRAINING = "the same of train2014; train2014/"
TASKS = (
    question_task(
        "vqav2",
        "VQAv2 validation, VQA accuracy, 2 examples",
        f"{coco_files('v2_', 'val2014')}; val2014/; for examples {TRAINING}",
        "https://visualqa.org/download.html",
        files.vqav2,
        "validation; on test-dev Chameleon-34B has 66.0, aligned to many tasks 69.6 (paper, Table 7)",
    ),
    replace(
        question_task(
            "vqav2_test",
            "VQAv2 test, 2 examples: no accuracy, but the file that EvalAI scores",
            "v2_OpenEnded_mscoco_test2015_questions.json; test2015/; for examples "
            f"{coco_files('v2_', 'train2014')}; train2014/",
            "https://visualqa.org/download.html; scored at https://eval.ai",
            files.vqav2_test,
        ),
        figures=answered_figures,
        export=export_test,
    ),
    question_task(
        "okvqa",
        "OK-VQA validation, VQA accuracy, 2 examples",
        f"{coco_files('', 'val2014')} of OK-VQA; val2014/; for examples {TRAINING}",
        "https://okvqa.allenai.org/download.html",
        files.okvqa,
        "the paper has no figure; references of version 1.1 are stemmed, and answers are not",
    ),
    replace(
        question_task(
            "vizwiz",
            "VizWiz validation, VQA accuracy, 2 examples",
            "val.json; val/; for examples train.json; train/",
            "https://vizwiz.org/tasks-and-datasets/vqa/",
            files.vizwiz,
            "the paper has no figure; 'unanswerable' is often right",
        ),
        export=export_vizwiz,
    ),
)
