"""GenEval's six tasks in the shapes world: prompts with GenEval's metadata, and its rules over what the oracle reads.

    world -> cases -> (scene, its caption as the prompt, metadata)        metadata, reading of an image -> judge

GenEval (Ghosh et al., 2310.11513) asks for single objects, two objects, counts, colours, positions and attributed
colours. A network finds the objects. Here the oracle does, and a shape is a class:

    "two big red circles on white"   {"tag": "counting", "include": [{"class": "circle", "count": 2}],
                                      "exclude": [{"class": "circle", "count": 3}], "prompt": ...}

A prompt is a caption, since those are the words that the toy knows. It says more than its task judges: here the size,
the colour and the background do not count. The rules (`judge`) are GenEval's, with one difference. Its detector keeps
the boxes that it is most sure of; the oracle has no such order, so any choice of objects that fits the line will do.
Cells that the oracle cannot read hold no object of any class.
"""

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import numpy as np

from nanochameleon.data.sources.scenes import (
    CELL,
    SIZES,
    Scene,
    World,
    random_cells,
    random_places,
    random_thing,
)
from nanochameleon.evaluate.drawing.summary import TASKS
from nanochameleon.evaluate.oracle import Reading

COMPOSITIONS = ("seen", "held_out")  # of a colour and a shape; no training image shows the second ones
PROMPTS = 100  # of each task and kind of compositions, or as many as the world has
DEAD_ZONE = 0.1  # of the sum of two sizes: offsets below it are no position

# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def cases(world: World, seed: int, n: int = PROMPTS) -> Iterator[tuple[str, str, Scene]]:
    """Yield (task, compositions, scene), in turn from each task and compositions, so that any beginning is balanced."""
    kinds = [(tag, compositions) for tag in TASKS for compositions in COMPOSITIONS]
    for row in zip_longest(*(scenes_of(*kind, world, seed, n) for kind in kinds)):
        yield from ((*kind, scene) for kind, scene in zip(kinds, row, strict=True) if scene is not None)


def scenes_of(tag: str, compositions: str, world: World, seed: int, n: int) -> list[Scene]:
    """Return at most n scenes with different captions. A small world may have fewer."""
    rng = np.random.default_rng((seed, TASKS.index(tag), COMPOSITIONS.index(compositions)))
    found: dict[str, Scene] = {}
    for _ in range(20 * n):
        scene = random_case(tag, compositions, world, rng)
        found.setdefault(scene.caption(), scene)
        if len(found) == n:
            break
    return list(found.values())


def random_case(tag: str, compositions: str, world: World, rng: np.random.Generator) -> Scene:
    """A scene for a task. Held-out compositions: the first object has one, the second has any."""
    background = world.backgrounds[rng.integers(world.n_backgrounds)]
    first = random_thing(world, rng, compositions)
    if tag in ("single_object", "counting", "colors"):
        n = int(rng.integers(2, world.max_count + 1)) if tag == "counting" else 1
        return Scene(background, (first,) * n, random_cells(world, rng, n))
    second = first
    while second.shape == first.shape or second.colour == first.colour:  # else a swap of colours would not be seen
        second = random_thing(world, rng, "any" if compositions == "held_out" else compositions)
    relation, cells = random_places(world, rng)
    return Scene(background, (first, second), cells, relation)


def metadata(tag: str, scene: Scene) -> dict[str, Any]:
    """Return GenEval's line for a scene of a task."""
    first, *_ = scene.things
    prompt = {"prompt": scene.caption()}
    if tag == "counting":
        n = len(scene.things)
        exclude = [{"class": first.shape, "count": n + 1}]
        return {"tag": tag, "include": [{"class": first.shape, "count": n}], "exclude": exclude} | prompt
    coloured = tag in ("colors", "color_attr")
    include = [
        {"class": thing.shape, "count": 1} | ({"color": thing.colour} if coloured else {}) for thing in scene.things
    ]
    if tag == "position":  # the object that is placed comes after the one that it refers to
        include = [include[1], include[0] | {"position": [scene.relation, 0]}]
    return {"tag": tag, "include": include} | prompt


# ---------------------------------------------------------------------------------------------------------------------
# Rules


def judge(line: dict[str, Any], reading: Reading) -> tuple[bool, str]:
    """Return whether an image has all that the metadata includes and nothing that it excludes, and what is wrong."""
    found: list[list[int]] = []  # the objects that fit each entry of "include"; none if it is not met
    reasons = []
    for wanted in line["include"]:
        fitting, why = find(wanted, reading, found)
        found.append([] if why else fitting)
        reasons += [why] if why else []
    for unwanted in line.get("exclude", []):
        n = len(of_class(unwanted["class"], reading))
        if n >= unwanted["count"]:
            reasons.append(f"{n} {unwanted['class']}: fewer than {unwanted['count']} are wanted")
    return not reasons, "; ".join(reasons)


def find(wanted: dict[str, Any], reading: Reading, found: list[list[int]]) -> tuple[list[int], str]:
    """Return the objects that fit one entry of "include", and what is wrong: "" if there are enough of them."""
    name, count = wanted["class"], wanted["count"]
    fitting = of_class(name, reading)
    if len(fitting) < count:
        return [], f"{len(fitting)} {name}: {count} wanted"
    if colour := wanted.get("color"):
        colours = [reading.things[i].colour for i in fitting]
        fitting = [i for i in fitting if reading.things[i].colour == colour]
        if len(fitting) < count:
            return [], f"{name} is {', '.join(colours)}: {count} {colour} wanted"
    if "position" in wanted:
        relation, other = wanted["position"]
        fitting = [i for i in fitting if any(relation in relations(reading, i, j) for j in found[other])]
        if len(fitting) < count:
            return [], f"no {name} {relation} the object that it refers to"
    return fitting, ""


def of_class(name: str, reading: Reading) -> list[int]:
    return [i for i, thing in enumerate(reading.things) if thing.shape == name]


def relations(reading: Reading, first: int, second: int) -> set[str]:
    """Return how the first object is placed to the second, by their centres.

    An offset within the dead zone is none. A relation holds if its axis has more than half of the distance: so a
    diagonal neighbour is both to the left and above.
    """
    sizes = [SIZES[reading.things[i].size] for i in (first, second)]
    down, right = (CELL * (a - b) for a, b in zip(reading.cells[first], reading.cells[second], strict=True))
    distance = math.hypot(down, right) or 1.0
    down, right = (max(abs(d) - DEAD_ZONE * sum(sizes), 0) * np.sign(d) / distance for d in (down, right))
    sides = {"above": -down, "below": down, "left of": -right, "right of": right}
    return {name for name, part in sides.items() if part > 0.5}
