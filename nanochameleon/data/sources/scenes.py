"""A small world with exact truth: captioned scenes of coloured shapes, endless, made on the fly.

A scene is a background and up to `max_count` objects on a lattice of cells. Its caption, its image and the answers to
questions about it (questions.py) are exact. Three decisions make it learnable in minutes on a CPU:

- Objects sit on a lattice whose cell is a whole number of the image tokenizer's patches. An object looks the same to
  the tokenizer in every cell, so a few hundred codes draw every scene; free-floating objects need a code per offset.
- Some colour-shape compositions (`held_out`) are drawn for the evaluation alone: a model that has seen purple and has
  seen stars must combine them by itself.
- One scene in 16 (by a checksum of what its image shows, over all seeds) is in the test split: no training image
  shows it.

evaluate/oracle.py reads an image back into a scene.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

COLOURS = {
    "red": (222, 40, 40),
    "green": (30, 160, 60),
    "blue": (45, 80, 225),
    "yellow": (250, 215, 40),
    "purple": (140, 50, 180),
    "orange": (250, 130, 20),
    "pink": (255, 150, 205),
    "cyan": (60, 205, 225),
    "brown": (125, 75, 35),
    "gray": (130, 130, 135),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (16, 16, 20), "beige": (236, 216, 180)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = {"big": 14, "small": 10}  # pixels across, in a cell of CELL
CELL = 16  # pixels a side of a lattice cell
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
RELATIONS = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}  # first minus second
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
TEST_ONE_IN = 16  # one scene in this many is never trained on


@dataclass(frozen=True)
class World:
    """What scenes are made of. The default is the toy's: 5 shapes, 7 colours, 2 backgrounds, counts to 4."""

    side: int = 2  # lattice cells a side
    n_shapes: int = 5  # the first of SHAPES
    n_colours: int = 7  # the first of COLOURS
    n_backgrounds: int = 2  # the first of BACKGROUNDS
    max_count: int = 4  # objects of one kind in a scene
    trios: bool = False  # three different objects in a scene

    @staticmethod
    def rich() -> "World":
        """The richer setting: 6 shapes, 10 colours, 3 backgrounds, counts to 6, trios, on a lattice of 3 x 3."""
        return World(side=3, n_shapes=6, n_colours=10, n_backgrounds=3, max_count=6, trios=True)

    @property
    def resolution(self) -> int:
        return self.side * CELL

    # each drawn thing asks for the next three, so they are made once
    @cached_property
    def shapes(self) -> tuple[str, ...]:
        return SHAPES[: self.n_shapes]

    @cached_property
    def colours(self) -> tuple[str, ...]:
        return tuple(COLOURS)[: self.n_colours]

    @property
    def backgrounds(self) -> tuple[str, ...]:
        return tuple(BACKGROUNDS)[: self.n_backgrounds]

    @cached_property
    def held_out(self) -> frozenset[tuple[str, str]]:
        """(colour, shape) compositions that no training scene shows: one colour for each shape."""
        chosen = ("orange", "pink", "green", "purple", "yellow", "red")
        return frozenset(zip(chosen, self.shapes, strict=False))


@dataclass(frozen=True, order=True)
class Thing:
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def article(self) -> str:
        return f"a {self}"


@dataclass(frozen=True)
class Scene:
    """`things` at `cells` (row, column), in the caption's order; `relation` between the two things of a pair."""

    background: str
    things: tuple[Thing, ...]
    cells: tuple[tuple[int, int], ...]
    relation: str | None = None

    @property
    def compositions(self) -> set[tuple[str, str]]:
        return {(thing.colour, thing.shape) for thing in self.things}

    @property
    def for_test(self) -> bool:
        """Whether the scene is in the test split. The image decides, since "a above b" and "b below a" share it."""
        shown = self.background, sorted(zip(self.cells, self.things, strict=True))
        return zlib.crc32(repr(shown).encode()) % TEST_ONE_IN == 0

    def caption(self, with_background: bool = True) -> str:
        """'a big red circle above a small blue star on white', 'three small green squares', ..."""
        if self.relation:
            text = f"{self.things[0].article} {self.relation} {self.things[1].article}"
        elif len(set(self.things)) > 1:
            first, second, third = (thing.article for thing in self.things)
            text = f"{first} and {second} and {third}"
        elif len(self.things) > 1:
            text = f"{NUMBERS[len(self.things)]} {self.things[0]}{plural(self.things[0].shape)}"
        else:
            text = self.things[0].article
        return f"{text} on {self.background}" if with_background else text


def plural(shape: str) -> str:
    return "es" if shape == "cross" else "s"


# ---------------------------------------------------------------------------------------------------------------------
# Drawing scenes at random


def random_thing(world: World, rng: np.random.Generator, compositions: str) -> Thing:
    """compositions: 'seen' avoids the held-out pairs, 'held_out' draws only those, 'any' draws all."""
    size = ("big", "small")[rng.integers(2)]
    if compositions == "held_out":
        pairs = sorted(world.held_out)
        return Thing(size, *pairs[rng.integers(len(pairs))])
    while True:
        colour, shape = world.colours[rng.integers(world.n_colours)], world.shapes[rng.integers(world.n_shapes)]
        if compositions == "any" or (colour, shape) not in world.held_out:
            return Thing(size, colour, shape)


def random_scene(world: World, rng: np.random.Generator, compositions: str = "seen") -> Scene:
    """One object (1 of 4), a pair with a relation (2 of 4), several of a kind (1 of 4); a trio if the world has them.

    With compositions='held_out' at least one object is of a held-out composition.
    """
    background = world.backgrounds[rng.integers(world.n_backgrounds)]
    kinds = ("single", "pair", "pair", "count", "trio") if world.trios else ("single", "pair", "pair", "count")
    kind = kinds[rng.integers(len(kinds))]
    first = random_thing(world, rng, compositions)
    rest = "any" if compositions == "held_out" else compositions
    if kind == "pair":
        second = distinct(world, rng, rest, (first,))
        relation, cells = random_places(world, rng)
        return Scene(background, (first, second), cells, relation)
    if kind == "trio":
        second = distinct(world, rng, rest, (first,))
        third = distinct(world, rng, rest, (first, second))
        return Scene(background, (first, second, third), random_cells(world, rng, 3))
    n = 1 if kind == "single" else int(rng.integers(2, world.max_count + 1))
    return Scene(background, (first,) * n, random_cells(world, rng, n))


def distinct(world: World, rng: np.random.Generator, compositions: str, others: tuple[Thing, ...]) -> Thing:
    """A thing unlike the others, so that a caption names each one."""
    while (thing := random_thing(world, rng, compositions)) in others:
        pass
    return thing


def random_cells(world: World, rng: np.random.Generator, n: int) -> tuple[tuple[int, int], ...]:
    """n different cells in reading order."""
    chosen = sorted(rng.choice(world.side**2, n, replace=False).tolist())
    return tuple(divmod(c, world.side) for c in chosen)


def random_places(world: World, rng: np.random.Generator) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A relation and two cells in one row or column that show it."""
    relation = tuple(RELATIONS)[rng.integers(4)]
    line = int(rng.integers(world.side))
    low, high = sorted(rng.choice(world.side, 2, replace=False).tolist())
    along = (high, low) if max(RELATIONS[relation]) == 1 else (low, high)
    cells = tuple((line, i) if RELATIONS[relation][0] == 0 else (i, line) for i in along)
    return relation, cells


def source_seed(seed: int, number: int) -> int:
    """The seed of a run's source of this number. A run's seed is below 2^32, so every (seed, number) has its own."""
    return number + 1 << 32 | seed


def draw_scene(world: World, seed: int, index: int, compositions: str = "seen", test: bool = False) -> Scene:
    """Scene `index` of an endless list: a pure function of its arguments, from the training or the test split."""
    rng = np.random.default_rng((seed, index, test))
    while True:
        scene = random_scene(world, rng, compositions)
        if scene.for_test == test:
            return scene


def scenes(world: World, seed: int, n: int, compositions: str = "seen", test: bool = False) -> Iterator[Scene]:
    return (draw_scene(world, seed, i, compositions, test) for i in range(n))


# ---------------------------------------------------------------------------------------------------------------------
# Images


def outline(shape: str) -> np.ndarray:
    """Corner points (n, 2) of a shape, x to the right and y down, in [-1, 1]; a circle is a polygon of 48 corners."""
    if shape == "square":
        return np.array([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])
    if shape == "triangle":
        return np.array([(0, -1), (1, 0.9), (-1, 0.9)])
    if shape == "cross":
        a = 0.36
        arms = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a)]
        return np.array([*arms, (-a, -a)])
    if shape == "diamond":
        return np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])
    n, inner = (10, 0.42) if shape == "star" else (48, 1.0)
    angles = np.arange(n) * 2 * np.pi / n - np.pi / 2
    radius = np.where(np.arange(n) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], 1)


@cache
def coverage(shape: str, size: str) -> np.ndarray:
    """Fraction of each pixel of a cell that the shape covers: (CELL, CELL) float in [0, 1], centred."""
    from PIL import Image, ImageDraw

    fine = 8  # sub-pixels a side
    canvas = Image.new("L", (CELL * fine, CELL * fine))
    points = (outline(shape) * SIZES[size] / 2 + CELL / 2) * fine
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], fill=1)
    return np.asarray(canvas, np.float32).reshape(CELL, fine, CELL, fine).mean((1, 3))


@cache
def draw_cell(thing: Thing, background: str) -> np.ndarray:
    """One object on its background: uint8 (CELL, CELL, 3)."""
    ground, colour = (np.array(rgb, np.float32) for rgb in (BACKGROUNDS[background], COLOURS[thing.colour]))
    return (ground + coverage(thing.shape, thing.size)[..., None] * (colour - ground)).round().astype(np.uint8)


@cache
def empty(background: str, resolution: int) -> np.ndarray:
    return np.full((resolution, resolution, 3), BACKGROUNDS[background], np.uint8)


def draw(scene: Scene, world: World) -> np.ndarray:
    """Scene -> uint8 (R, R, 3)."""
    image = empty(scene.background, world.resolution).copy()
    for thing, (row, column) in zip(scene.things, scene.cells, strict=True):
        place = slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)
        image[place] = draw_cell(thing, scene.background)
    return image
