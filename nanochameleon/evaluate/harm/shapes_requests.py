"""The task shapes_safety: the shapes world's own harmless stand-in for the safety evaluation.

    requests to do harm (align_safety) are to be refused, drawings and questions about words are to be answered

All are of the test split and differ from each other. The refusal that the model learnt is one fixed sentence, so the
exact rule is right here. Next to the rates are those of two fixed behaviours: to refuse everything, and nothing.
"""

import dataclasses
from collections.abc import Sequence
from itertools import count

from nanochameleon.data.sources.alignment import AlignmentSource, drawn
from nanochameleon.data.sources.scenes import Scene
from nanochameleon.evaluate.drawing.shapes_alignment import segments_json, segments_of
from nanochameleon.evaluate.harm.answers import ask
from nanochameleon.evaluate.harm.prompt_set import score
from nanochameleon.evaluate.harm.prompts import ANSWER, REFUSE
from nanochameleon.evaluate.harm.rates import refusal_figures
from nanochameleon.evaluate.harm.refusals import DEFAULT, describe
from nanochameleon.evaluate.shapes import SCENE_SEED
from nanochameleon.evaluate.task import Answer, Figure, Item, Line, Options, Task, digest, need_world
from nanochameleon.training.run import Run

NAME = "shapes_safety"
REQUESTS = {"align_safety": (200, REFUSE), "align_image_generation": (100, ANSWER), "align_text": (100, ANSWER)}
BASELINES = {
    "refused": "refusing everything gets 100%, answering everything 0%",
    "over-refused": "refusing everything gets 100%, answering everything 0%; less is better",
}


def read(options: Options) -> list[Item]:
    """Return the requests; of every four, two are to be refused, so that a limit keeps the balance."""
    columns = {name: requests(name, options) for name in REQUESTS}
    harmful, drawings, words = columns.values()
    mixed = zip(harmful[::2], drawings, harmful[1::2], words, strict=True)
    return [item for four in mixed for item in four][: options.limit]


def requests(category: str, options: Options) -> list[Item]:
    """Return the first so many different requests of a category."""
    n, expected = REQUESTS[category]
    source = AlignmentSource(need_world(options), category, SCENE_SEED, test=True)
    found: dict[str, Item] = {}
    for number in count():
        prompt = source.exchanges(number)[0].prompt
        content = {
            "prompt": segments_json(prompt),
            "intent": "text",  # an image that comes with a request to do harm shows any scene
            "category": f"{category}, with an image" if any(isinstance(s, Scene) for s in prompt) else category,
            "expected": expected,
            "refusals": DEFAULT,
        }
        found.setdefault(digest(content["prompt"]), Item(f"{category}-{len(found):03}", content, category))
        if len(found) == n:
            return list(found.values())


def answer(run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    prompts = [drawn(segments_of(item.content["prompt"]), options.world) for item in items]
    return ask(run, items, prompts, options, NAME)


def figures(lines: Sequence[Line]) -> list[Figure]:
    found = refusal_figures(lines, describe(DEFAULT))
    return [dataclasses.replace(figure, note=BASELINES.get(figure.name, figure.note)) for figure in found]


TASKS = (
    Task(
        NAME,
        "requests of the shapes world to refuse and to answer: refusals and over-refusals",
        "",
        "",
        read,
        answer,
        score,
        figures=figures,
    ),
)
