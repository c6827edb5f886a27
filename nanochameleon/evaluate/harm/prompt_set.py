"""The task safety: the user's prompts, and how many of each kind the model refuses.

    safety.jsonl -> items -> answers -> refused, or not (refusals.py) -> rates, over-refusal, and both in one (rates.py)

Whether answers are safe, people say: `safety label` and `safety report` read what this task writes.
"""

from collections.abc import Sequence
from typing import Any

from nanochameleon.data import RawDocument, RawImage
from nanochameleon.documents import Text
from nanochameleon.errors import UserError
from nanochameleon.evaluate.harm.answers import ask
from nanochameleon.evaluate.harm.prompts import REFUSE, read_prompts
from nanochameleon.evaluate.harm.rates import refusal_figures
from nanochameleon.evaluate.harm.refusals import DEFAULT, describe, is_refusal, read_rule
from nanochameleon.evaluate.records import find_file, image_path
from nanochameleon.evaluate.task import Answer, Figure, Item, Line, Options, Task
from nanochameleon.images.tokenizer import load_square
from nanochameleon.training.run import Run

NAME = "safety"
FILES = ("safety.jsonl", "safety.csv", "xstest_prompts.csv")
RULE = "refusals.txt"


def read(options: Options) -> list[Item]:
    path = find_file(options.data, *FILES)
    rule = read_rule(path.parent / RULE) if (path.parent / RULE).is_file() else DEFAULT
    prompts = read_prompts(path)[: options.limit]
    return [Item(name, content | {"refusals": rule}, content["category"]) for name, content in prompts]


def answer(run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    return ask(run, items, [prompt_of(run, item, options) for item in items], options, NAME)


def prompt_of(run: Run, item: Item, options: Options) -> RawDocument | str:
    """Return the images and the text of a prompt, or one sentence on why an image cannot be read."""
    fit = "pad" if run.cfg.train.assistant_only_loss else "crop"  # as the model learnt to see them
    try:
        paths = [image_path(options.data, name, f"item {item.id}") for name in item.content["images"]]
        images = [RawImage(load_square(path, run.cfg.vqgan.resolution, fit)) for path in paths]
    except UserError as error:
        return str(error)
    return [*images, Text(item.content["text"])] if item.content["text"] else images


def score(content: dict[str, Any], output: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Return the answer, an image as <image>, and whether it is a refusal."""
    metric = "refused" if content["expected"] == REFUSE else "over_refused"
    text = "".join(segment.get("text", "<image>") for segment in output["said"])
    return text, {metric: float(is_refusal(output["said"], content["refusals"]))}


def figures(lines: Sequence[Line]) -> list[Figure]:
    return refusal_figures(lines, describe(lines[0].content["refusals"]))


TASKS = (
    Task(
        NAME,
        "prompts to refuse and prompts to answer: refusals, over-refusals, and both in one figure",
        f"{FILES[0]} with its images, or a table as {' or '.join(FILES[1:])}; {RULE}: starts of refusals, one "
        "per line, else the shapes world's sentence counts alone",
        "your own prompts; github.com/paul-rottger/xstest, mlcommons.org/ailuminate, "
        "github.com/centerforaisafety/HarmBench",
        read,
        answer,
        score,
        figures=figures,
    ),
)
