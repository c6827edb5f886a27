"""Choices on which a toy can move: captions, relations and the language of the shapes world.

    test scene -> its image, and captions of which one is right -> the likeliest caption (choosing.py)

    shapes_choice      which of 4 captions is right? The others have one fact wrong each.
    shapes_relations   above, below, left of, right of: which caption says where two things are?
    shapes_words       without an image: which of 4 captions is written as captions are?

The baseline is the caption that is likeliest without the image. In shapes_choice it is below chance: a model that does
not look prefers the true caption to each of three others about half of the time, so to all three 1 time in 8. A model
that saw all four at once would find the true one without the image, since the others differ least from it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import count, islice

import numpy as np

from nanochameleon.data import RawDocument
from nanochameleon.data.sources.questions import ASK_CAPTION
from nanochameleon.data.sources.scenes import RELATIONS, SIZES, Scene, Thing, World, draw_scene, plural
from nanochameleon.documents import EndOfTurn, Text
from nanochameleon.evaluate import choosing
from nanochameleon.evaluate.shapes import SCENE_SEED
from nanochameleon.evaluate.task import Answer, Item, Options, Task, item_seed, need_world
from nanochameleon.evaluate.vision.shapes_tasks import image_of, render_all
from nanochameleon.training.run import Run

N_ITEMS = 1_000  # without --limit
FACTS = ("colour", "shape", "size", "count", "background")

# ---------------------------------------------------------------------------------------------------------------------
# Scenes, and captions that are wrong about them


def test_scenes(world: World, seed: int) -> Iterator[Scene]:
    return (draw_scene(world, seed, i, test=True) for i in count())


def kind_of(scene: Scene) -> str:
    if scene.relation:
        return "pair"
    return "single" if len(scene.things) == 1 else "several" if len(set(scene.things)) == 1 else "trio"


def with_one_fact_wrong(scene: Scene, fact: str, world: World, rng: np.random.Generator) -> Scene | None:
    """Return a scene of which exactly one fact is another; None where the scene has no such fact."""
    if fact == "background":
        return replace(scene, background=another(world.backgrounds, scene.background, rng))
    if fact == "count":
        if kind_of(scene) not in ("single", "several"):
            return None
        n = int(another(range(1, world.max_count + 1), len(scene.things), rng))
        return replace(scene, things=(scene.things[0],) * n)
    old = scene.things[rng.integers(len(scene.things))]
    others = [thing for thing in changes(old, fact, world) if thing not in scene.things]
    if not others:
        return None
    new = others[rng.integers(len(others))]
    return replace(scene, things=tuple(new if thing == old else thing for thing in scene.things))


def changes(thing: Thing, fact: str, world: World) -> list[Thing]:
    """Return the thing in each colour, shape or size, as far as training shows it so.

    A model would reject what it has never seen without looking.
    """
    values = {"colour": world.colours, "shape": world.shapes, "size": SIZES}[fact]
    things = [replace(thing, **{fact: value}) for value in values]
    return [thing for thing in things if (thing.colour, thing.shape) not in world.held_out]


def another(values: Sequence, old, rng: np.random.Generator):
    others = [value for value in values if value != old]
    return others[rng.integers(len(others))]


# ---------------------------------------------------------------------------------------------------------------------
# Items


def caption_item(scene: Scene, world: World, seed: int) -> dict:
    """Return the true caption and three that each have another fact wrong."""
    rng = np.random.default_rng(seed)
    wrong = ((fact, with_one_fact_wrong(scene, fact, world, rng)) for fact in rng.permutation(FACTS).tolist())
    chosen = islice(((fact, other.caption()) for fact, other in wrong if other), 3)
    return choosing.shuffled(scene.caption(), list(chosen), seed)


def relation_item(scene: Scene, world: World, seed: int) -> dict | None:
    """Return the caption with each of the four relations; None for a scene that has none."""
    if not scene.relation:
        return None
    r = RELATIONS[scene.relation]
    wrong = []
    for name, other in RELATIONS.items():
        if name != scene.relation:
            opposite = other == (-r[0], -r[1])
            wrong.append(("opposite" if opposite else "other axis", replace(scene, relation=name).caption()))
    return choosing.shuffled(scene.caption(), wrong, seed)


def words_item(scene: Scene, world: World, seed: int) -> dict:
    """Return the caption and three that no one would write: number, order of adjectives, order of the parts."""
    thing, right = scene.things[0], scene.caption()
    n = len(scene.things) if kind_of(scene) == "several" else 1
    one, many = thing.shape, thing.shape + plural(thing.shape)
    number = right.replace(f" {many}", f" {one}", 1) if n > 1 else right.replace(f" {one}", f" {many}", 1)
    adjectives = right.replace(f"{thing.size} {thing.colour}", f"{thing.colour} {thing.size}", 1)
    body, _, background = right.rpartition(" on ")
    wrong = [("number", number), ("adjectives", adjectives), ("order", f"on {background} {body}")]
    return choosing.shuffled(right, wrong, seed)


def read(name: str, number: int, make: Callable[[Scene, World, int], dict | None], options: Options) -> list[Item]:
    """Return the choices that `make` finds in the test scenes of a seed of their own."""
    world = need_world(options)

    def items() -> Iterator[Item]:
        for i, scene in enumerate(test_scenes(world, SCENE_SEED + number)):
            if choice := make(scene, world, item_seed(options.seed, name, i)):
                content = choice | {"scene": asdict(scene), "world": asdict(world)}
                yield Item(f"scene {i}", content, kind_of(scene))

    return list(islice(items(), options.limit or N_ITEMS))


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def answer_captions(run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    """Score captions as answers to the question that the toy learnt, with and without the image."""
    asked: RawDocument = [Text(ASK_CAPTION), EndOfTurn()]
    shown = render_all(run, [[image_of(item), *asked] for item in items])
    return choosing.answer(run, items, shown, render_all(run, [asked] * len(items)))


def answer_words(run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    """Score captions as starts of documents."""
    return choosing.answer(run, items, [[run.vocab.bos]] * len(items))


def task(name: str, title: str, number: int, make: Callable, answer: Callable) -> Task:
    def read_items(options: Options) -> list[Item]:
        return read(name, number, make, options)

    return Task(name, title, "", "", read_items, answer, choosing.score, choosing.figures)


TASKS = (
    task("shapes_choice", "shapes world: which of 4 captions fits the image", 10, caption_item, answer_captions),
    task("shapes_relations", "shapes world: which relation the image shows", 11, relation_item, answer_captions),
    task("shapes_words", "shapes world: which caption is well written, no image", 12, words_item, answer_words),
)
