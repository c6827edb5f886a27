"""Questions about scenes of shapes, each with its exact answer: counts, colours, sizes, relations."""

import numpy as np

from nanochameleon.data.sources.scenes import NUMBERS, OPPOSITE, Scene, Thing, World, plural, random_thing

ASK_CAPTION = "what is in the picture?"  # part of the data, so the word stays; the caption answers it


def questions(scene: Scene, world: World, rng: np.random.Generator) -> list[tuple[str, str]]:
    """One question of each kind that the scene allows, with its exact answer. Yes and no are equally likely."""
    thing = scene.things[rng.integers(len(scene.things))]
    shape = thing.shape if rng.random() < 0.6 else world.shapes[rng.integers(world.n_shapes)]
    n_shape = sum(t.shape == shape for t in scene.things)
    asked = [
        (f"how many {shape}{plural(shape)} are there?", NUMBERS[n_shape]),
        ("how many things are there?", NUMBERS[len(scene.things)]),
        ("what is the background?", scene.background),
        existence(scene, world, rng),
    ]
    if only(scene, "shape", thing):
        asked += [
            (f"what colour is the {thing.shape}?", thing.colour),
            (f"what size is the {thing.shape}?", thing.size),
        ]
    if only(scene, "colour", thing):
        asked.append((f"what shape is the {thing.colour} thing?", thing.shape))
    if scene.relation:
        asked.append(relation_question(scene, rng))
    return asked


def only(scene: Scene, field: str, thing: Thing) -> bool:
    """Is this the only thing of its shape (or colour) in the scene?"""
    return sum(getattr(t, field) == getattr(thing, field) for t in scene.things) == 1


def existence(scene: Scene, world: World, rng: np.random.Generator) -> tuple[str, str]:
    """'is there a red star?', about a thing that is in the scene or one that is not."""
    if rng.random() < 0.5:
        thing = scene.things[rng.integers(len(scene.things))]
        return f"is there a {thing.colour} {thing.shape}?", "yes"
    while True:
        other = random_thing(world, rng, "seen")
        if (other.colour, other.shape) not in scene.compositions:
            return f"is there a {other.colour} {other.shape}?", "no"


def relation_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """'is the big red circle above the small blue star?', with the relation or its opposite."""
    first, second = scene.things
    holds = rng.random() < 0.5
    relation = scene.relation if holds else OPPOSITE[scene.relation]
    return f"is the {first} {relation} the {second}?", "yes" if holds else "no"
