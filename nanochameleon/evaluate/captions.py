"""Parse a caption of the shapes world back into facts, and compare it with the truth fact by fact."""

import re

from nanochameleon.data.sources.scenes import NUMBERS, OPPOSITE, RELATIONS, SIZES, Scene, Thing, World, plural


def parse_caption(text: str, world: World) -> Scene | None:
    """'a big red circle above a small blue star on white' -> a Scene without cells. None for anything else."""
    match = re.fullmatch(r"(.+?)(?: on (\w+))?", text.strip())
    if match is None or match[2] not in (None, *world.backgrounds):
        return None
    body, background = match[1], match[2] or ""
    split = re.split(f" ({'|'.join(RELATIONS)}|and) ", body)
    parts, joints = [parse_things(part, world) for part in split[::2]], split[1::2]
    relation = joints[0] if len(joints) == 1 and joints[0] in RELATIONS else None
    if None in parts or (joints and not relation and joints != ["and", "and"]):
        return None
    things = tuple(thing for part in parts for thing in part)
    scene = Scene(background, things, (), relation)
    return scene if scene.caption(bool(background)) == text.strip() else None


def parse_things(text: str, world: World) -> tuple[Thing, ...] | None:
    """'three big green crosses' -> three Things. None for anything else."""
    match = re.fullmatch(r"(\w+) (\w+) (\w+) (\w+)", text)
    if match is None:
        return None
    number, size, colour, noun = match.groups()
    n = 1 if number == "a" else NUMBERS.index(number) if number in NUMBERS else 0
    shape = {s if n == 1 else s + plural(s): s for s in world.shapes}.get(noun)
    if n < 1 or size not in SIZES or colour not in world.colours or shape is None:
        return None
    return (Thing(size, colour, shape),) * n


def facts(scene: Scene) -> dict[str, object]:
    """Return what a caption states, in a canonical order, so that two captions of one scene are equal."""
    stated = {
        "background": scene.background,
        "count": len(scene.things),
        "sizes": sorted(t.size for t in scene.things),
        "colours": sorted(t.colour for t in scene.things),
        "shapes": sorted(t.shape for t in scene.things),
    }
    if scene.relation:
        first, second = scene.things
        flipped = (second, OPPOSITE[scene.relation], first)
        stated["relation"] = min((first, scene.relation, second), flipped, key=lambda t: t[0])
    return stated


def score_caption(text: str, scene: Scene, world: World) -> float:
    """Return the fraction of the scene's facts that the caption states correctly. 0 for a text that is no caption."""
    said = parse_caption(text, world)
    if said is None:
        return 0.0
    truth, stated = facts(scene), facts(said)
    return sum(stated.get(name) == value for name, value in truth.items()) / len(truth)
