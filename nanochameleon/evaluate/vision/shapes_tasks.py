"""Captions and questions of the shapes world, measured as those of photographs are. models/toy answers them.

    test scene -> its image, a question -> answer -> CIDEr-D among all true captions; VQA accuracy of ten equal answers

The world knows each scene, so two things are exact here that photographs lack: the share of facts that a caption states
correctly, and the score of the truth as a ceiling.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import permutations
from statistics import fmean

import numpy as np

from nanochameleon.data import RawDocument, RawImage, fuse
from nanochameleon.data.sources.questions import ASK_CAPTION
from nanochameleon.data.sources.scenes import OPPOSITE, Scene, World, draw, scenes
from nanochameleon.documents import EndOfTurn, Text, render
from nanochameleon.evaluate import shapes
from nanochameleon.evaluate.captions import score_caption
from nanochameleon.evaluate.cider import cider_d
from nanochameleon.evaluate.drawing.readings import scene_of
from nanochameleon.evaluate.statistics import mean_figure
from nanochameleon.evaluate.task import Answer, Figure, Item, Line, Options, Task, need_world
from nanochameleon.evaluate.vision import captioning, questions
from nanochameleon.evaluate.vision.prompts import write_lines
from nanochameleon.training.run import Run

N_ITEMS = 400  # without --limit
N_PEOPLE = 10  # who answer a question of VQA


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


def unseen_scenes(options: Options, seed: int) -> list[Scene]:
    """Return scenes of the test split. Raises UserError for a model that was not trained on shapes."""
    return list(scenes(need_world(options), seed, options.limit or N_ITEMS, test=True))


def true_captions(scene: Scene) -> list[str]:
    """Return every caption of the scene that the world can say, starting with the scene's own.

    A pair may start with either thing, a trio with any; the background may be left out.
    """
    orders = [replace(scene, things=things) for things in dict.fromkeys(permutations(scene.things))]
    if scene.relation:
        orders = [scene, replace(scene, things=scene.things[::-1], relation=OPPOSITE[scene.relation])]
    return [order.caption(background) for background in (True, False) for order in orders]


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def answer(run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    """Ask each item's question twice: {"text": about its image, "blind": without it}."""
    shown = [[image_of(item), Text(item.content["question"]), EndOfTurn()] for item in items]
    prompts = render_all(run, shown)
    outputs = write_lines(run, dict(enumerate(prompts)), captioning.MAX_NEW_TOKENS, "text")
    blind_prompts = render_all(run, [doc[1:] for doc in shown])
    blind = write_lines(run, dict(enumerate(blind_prompts)), captioning.MAX_NEW_TOKENS, "blind")
    return [Answer(prompts[i], outputs[i] | blind[i]) for i in range(len(items))]


def image_of(item: Item) -> RawImage:
    return RawImage(draw(scene_of(item.content["scene"]), World(**item.content["world"])))


def render_all(run: Run, docs: list[RawDocument]) -> list[list[int]]:
    return [render(doc, run.tokenizer, run.vocab, end=False) for doc in fuse(docs, run.image_tokenizer)]


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def read_captions(options: Options) -> list[Item]:
    """Return the scenes of evaluate/shapes.py's caption_facts."""
    return [
        Item(
            f"scene {i}",
            {
                "question": ASK_CAPTION,
                "references": true_captions(scene),
                "scene": asdict(scene),
                "world": asdict(options.world),
            },
        )
        for i, scene in enumerate(unseen_scenes(options, shapes.SCENE_SEED + 1))
    ]


def score_facts(content: dict, output: dict) -> tuple[str, dict[str, float]]:
    """Return the caption, and the share of the scene's facts that it states correctly, also of the blind one."""
    scene, world = scene_of(content["scene"]), World(**content["world"])
    said, blind = output["text"].strip(), output["blind"].strip()
    return said, {"facts": score_caption(said, scene, world), "facts_blind": score_caption(blind, scene, world)}


def caption_figures(lines: Sequence[Line]) -> list[Figure]:
    references = [line.content["references"] for line in lines]
    truth, _ = cider_d([texts[0] for texts in references], references)
    blind = sum(line.metrics["facts_blind"] for line in lines) / len(lines)
    facts = [line.metrics["facts"] for line in lines]
    return [
        captioning.cider_figure(lines, "the baseline is another image's caption", ceiling=100 * truth),
        mean_figure("facts", facts, "images", baseline=blind, ceiling=1.0, note="the baseline sees no image"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def read_questions(options: Options) -> list[Item]:
    """Return the scenes and questions of evaluate/shapes.py's question_accuracy."""
    rng, items = np.random.default_rng(shapes.SCENE_SEED), []
    for i, scene in enumerate(unseen_scenes(options, shapes.SCENE_SEED + 2)):
        question, truth = shapes.one_question(scene, options.world, rng)
        content = {"question": question, "references": [truth] * N_PEOPLE}
        content |= {"scene": asdict(scene), "world": asdict(options.world)}
        items.append(Item(f"scene {i}", content, answer_type(question, truth)))
    return items


def answer_type(question: str, truth: str) -> str:
    """Return VQA's name for a kind of answer. "no" is a number, too: how many stars are there? no."""
    if question.startswith("how many"):
        return "number"
    return "yes/no" if truth in ("yes", "no") else "other"


def question_figures(lines: Sequence[Line]) -> list[Figure]:
    """Return the figures of VQA, with chance, and what the most common answer to the same words gets."""
    answers = [
        shapes.Answer(scene_of((c := line.content)["scene"]), c["question"], c["references"][0], "") for line in lines
    ]
    given = [(line.group, line.content["references"]) for line in lines]
    words = shapes.question_only(World(**lines[0].content["world"]), answers)
    note = f"the baseline sees no image; the most common answer to the same words gets {words:.1%}"
    known = {kind: {texts[0] for group, texts in given if group == kind} for kind in {group for group, _ in given}}
    chances = {"acc": fmean(1 / len(known[kind]) for kind, _ in given)}
    chances |= {f"acc, {kind}": 1 / len(texts) for kind, texts in known.items()}  # a guess among the answers of a type
    return [replace(each, chance=chances.get(each.name)) for each in questions.figures(lines, note)]


TASKS = (
    Task(
        "shapes_captions",
        "captions of the shapes world: CIDEr-D among all true captions, and the share of facts that are right",
        "",
        "",
        read=read_captions,
        answer=answer,
        score=score_facts,
        figures=caption_figures,
        score_set=captioning.cider,
        export=captioning.export,
    ),
    Task(
        "shapes_questions",
        "questions about the shapes world, by VQA's accuracy",
        "",
        "",
        read=read_questions,
        answer=answer,
        score=questions.score,
        figures=question_figures,
        export=questions.export,
    ),
)
