"""Read an image of the shapes world back into a scene: the oracle that judges drawn images.

Each cell of the lattice is compared with every object of the world and with the bare background, by squared distance of
pixels. The nearest object explains the cell if less than `TOLERANCE` of its energy, its squared distance to the
background, is left unexplained. So a blob, half an object or a wrong colour is 'unreadable', not the nearest guess.

The oracle knows the lattice and the palette, and nothing of the model. Every score is reported next to its ceiling, the
oracle's accuracy on clean images.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from nanochameleon.data.sources.scenes import BACKGROUNDS, CELL, COLOURS, SIZES, Scene, Thing, World, coverage

# Largest unexplained fraction of an object's energy. Half an object leaves 0.49 and the luckiest noise 0.28. The two
# most similar objects differ by 0.08.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Reading:
    """What an image shows: things in raster order of their cells, and the number of cells that show no known object."""

    background: str
    things: tuple[Thing, ...]
    cells: tuple[tuple[int, int], ...]
    unreadable: int


@cache
def templates(world: World, background: str) -> tuple[tuple[Thing, ...], np.ndarray]:
    """Return every object on this background: things, and their cells' pixels (n, CELL*CELL*3)."""
    ground = np.array(BACKGROUNDS[background], np.float32)
    things = tuple(Thing(z, c, s) for z in SIZES for c in world.colours for s in world.shapes)
    cells = [ground + coverage(t.shape, t.size)[..., None] * (np.array(COLOURS[t.colour]) - ground) for t in things]
    return things, np.stack(cells).reshape(len(things), -1).astype(np.float32)


def read_background(image: np.ndarray, world: World) -> str:
    """Return the background whose colour is nearest to the median of the cells' borders, where no object reaches."""
    cells = image.reshape(world.side, CELL, world.side, CELL, 3).swapaxes(1, 2)
    rim = np.concatenate([cells[:, :, 0], cells[:, :, -1], cells[:, :, :, 0], cells[:, :, :, -1]])
    seen = np.median(rim.reshape(-1, 3), axis=0)
    return min(world.backgrounds, key=lambda name: float(np.square(seen - BACKGROUNDS[name]).sum()))


def read(image: np.ndarray, world: World) -> Reading:
    """uint8 (R, R, 3) -> Reading."""
    background = read_background(image, world)
    things, templates_flat = templates(world, background)  # (n, CELL*CELL*3)
    ground = np.tile(np.array(BACKGROUNDS[background], np.float32), CELL * CELL)
    energy = np.square(templates_flat - ground).sum(1)  # (n,)
    found, cells, unreadable = [], [], 0
    for row in range(world.side):
        for column in range(world.side):
            cell = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            cell = cell.reshape(-1).astype(np.float32)
            # 1. an empty cell: nearly the background, measured by the faintest object
            if np.square(cell - ground).sum() < TOLERANCE * energy.min():
                continue
            # 2. the object that leaves the smallest fraction of its energy unexplained
            left = np.square(templates_flat - cell).sum(1)
            best = int((left / energy).argmin())
            # 3. no object, if that fraction is still too large
            if left[best] > TOLERANCE * energy[best]:
                unreadable += 1
                continue
            found.append(things[best])
            cells.append((row, column))
    return Reading(background, tuple(found), tuple(cells), unreadable)


def relation_holds(scene: Scene, reading: Reading) -> bool:
    """Are the two things of a pair placed as the scene's relation says?"""
    places = dict(zip(reading.things, reading.cells, strict=True))
    first, second = (places.get(thing) for thing in scene.things)
    if first is None or second is None:
        return False
    (r1, c1), (r2, c2) = first, second
    return {"above": r1 < r2, "below": r1 > r2, "left of": c1 < c2, "right of": c1 > c2}[scene.relation]


def judge(scene: Scene, image: np.ndarray, world: World) -> dict[str, bool]:
    """Return which facts of the scene's caption the image shows: background, count, shapes, colours, sizes, relation.

    'all_facts' is true if every fact is, the things match as wholes and no cell is unreadable.
    """
    return compare(scene, read(image, world))


def compare(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Return the facts of `judge` for an image that was read."""
    facts = {
        "background": reading.background == scene.background,
        "count": len(reading.things) + reading.unreadable == len(scene.things),
        "shapes": sorted(t.shape for t in reading.things) == sorted(t.shape for t in scene.things),
        "colours": sorted(t.colour for t in reading.things) == sorted(t.colour for t in scene.things),
        "sizes": sorted(t.size for t in reading.things) == sorted(t.size for t in scene.things),
    }
    if scene.relation:
        facts["relation"] = relation_holds(scene, reading)
    whole = sorted(reading.things) == sorted(scene.things) and not reading.unreadable
    facts["all_facts"] = whole and all(facts.values())
    return facts
