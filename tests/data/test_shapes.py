"""The shapes world: every scene, caption, image and answer is checked against the scene itself, by other means."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.data import FORMS, RawImage
from nanochameleon.data.sources.questions import ASK_CAPTION, questions
from nanochameleon.data.sources.scenes import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    NUMBERS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    World,
    draw,
    draw_scene,
    random_scene,
    scenes,
    source_seed,
)
from nanochameleon.data.sources.shapes import ShapesSource, caption
from nanochameleon.documents import EndOfTurn, Text
from nanochameleon.evaluate.oracle import read

TOY, RICH = World(), World.rich()
worlds = st.sampled_from([TOY, RICH])
kinds = st.sampled_from(["seen", "held_out", "any"])
some_scenes = st.builds(
    lambda world, *rest: (world, draw_scene(world, *rest)),
    worlds, st.integers(0, 1_000), st.integers(0, 10_000), kinds, st.booleans(),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The world and its splits


def test_the_worlds_are_as_rich_as_they_must_be():
    assert len(TOY.shapes) >= 5 and len(TOY.colours) >= 7 and len(TOY.backgrounds) >= 2 and TOY.max_count == 4
    assert (len(RICH.shapes), len(RICH.colours), len(RICH.backgrounds), RICH.max_count) == (6, 10, 3, 6) and RICH.trios
    assert len(SIZES) == 2
    for world in (TOY, RICH):
        assert world.max_count <= world.side**2 and world.max_count < len(NUMBERS)
        assert len(world.held_out) == len(world.shapes)
        assert {c for c, _ in world.held_out} <= set(world.colours) and {s for _, s in world.held_out} == set(
            world.shapes
        )


@pytest.mark.parametrize("world", [TOY, RICH], ids=["toy", "rich"])
def test_every_kind_of_scene_is_drawn_in_its_share(world):
    drawn = list(scenes(world, 0, 3_000))
    kind = Counter(
        "pair" if s.relation else "trio" if len(set(s.things)) > 1 else "single" if len(s.things) == 1 else "count"
        for s in drawn
    )
    shares = dict(single=1, pair=2, count=1, trio=1) if world.trios else dict(single=1, pair=2, count=1)
    for name, share in shares.items():
        assert kind[name] / 3_000 == pytest.approx(share / sum(shares.values()), abs=0.04)
    counts = {len(s.things) for s in drawn if len(set(s.things)) == 1}
    assert counts == set(range(1, world.max_count + 1))
    things = {t for s in drawn for t in s.things}
    n_seen = len(world.colours) * len(world.shapes) - len(world.held_out)
    assert len(things) == len(SIZES) * n_seen
    assert {s.background for s in drawn} == set(world.backgrounds)
    assert {cell for s in drawn for cell in s.cells} == {(r, c) for r in range(world.side) for c in range(world.side)}


@given(worlds, st.integers(0, 1_000), st.integers(0, 10_000), kinds, st.booleans())
def test_a_scene_is_a_pure_function_of_seed_and_index(world, seed, index, compositions, test):
    scene = draw_scene(world, seed, index, compositions, test)
    assert scene == draw_scene(world, seed, index, compositions, test)
    place = index % 5
    assert list(scenes(world, seed, 5, compositions, test))[place] == draw_scene(world, seed, place, compositions, test)


def test_scenes_differ_between_indices_seeds_and_splits():
    lists = [[draw_scene(TOY, seed, i, test=test) for i in range(40)] for seed in (0, 1) for test in (False, True)]
    assert all(a != b for i, a in enumerate(lists) for b in lists[:i])
    assert len(set(lists[0])) > 30


@given(some_scenes)
def test_things_stand_in_cells_of_their_own_inside_the_image(case):
    world, scene = case
    assert len(scene.cells) == len(scene.things) == len(set(scene.cells)) >= 1
    assert all(0 <= row < world.side and 0 <= column < world.side for row, column in scene.cells)


@given(worlds, st.integers(0, 1_000), st.integers(0, 10_000), st.booleans())
def test_held_out_compositions_are_in_no_seen_scene_and_in_every_held_out_one(world, seed, index, test):
    assert not draw_scene(world, seed, index, "seen", test).compositions & world.held_out
    assert draw_scene(world, seed, index, "held_out", test).compositions & world.held_out


def test_no_image_of_the_test_split_is_in_training():
    """By the images: 'a above b' and 'b below a' are two scenes and one image."""
    small = World(n_shapes=2, n_colours=3, n_backgrounds=1, max_count=2)
    train, test = ({draw(s, small).tobytes() for s in scenes(small, 0, 2_000, test=split)} for split in (False, True))
    assert len(test) > 10 and len(train) > 100 and not train & test


def test_the_test_split_is_one_scene_in_sixteen():
    rng = np.random.default_rng(0)
    share = np.mean([random_scene(RICH, rng).for_test for _ in range(4_000)])
    assert share == pytest.approx(1 / 16, abs=0.012)


# ---------------------------------------------------------------------------------------------------------------------
# Captions, read back by a grammar of their own

THING = rf"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
CAPTION = re.compile(
    rf"(?:a {THING} (?P<relation>above|below|left of|right of) a {THING}"
    rf"|a {THING} and a {THING} and a {THING}"
    rf"|(?P<number>{'|'.join(NUMBERS)}) {THING}(?:es|s)"
    rf"|a {THING})(?: on (?P<background>{'|'.join(BACKGROUNDS)}))?"
)

NAMED = ("relation", "number", "background")


def read_caption(text: str) -> tuple[list[Thing], str | None, str | None]:
    """-> things, relation, background."""
    match = CAPTION.fullmatch(text)
    assert match, text
    words = [w for i, w in enumerate(match.groups()) if w and i + 1 not in {CAPTION.groupindex[n] for n in NAMED}]
    things = [Thing(*words[i : i + 3]) for i in range(0, len(words), 3)]
    if match["number"]:
        things *= NUMBERS.index(match["number"])
    return things, match["relation"], match["background"]


@given(some_scenes, st.booleans())
def test_a_caption_states_the_truth(case, with_background):
    _, scene = case
    things, relation, background = read_caption(scene.caption(with_background))
    assert tuple(things) == scene.things and relation == scene.relation
    assert background == (scene.background if with_background else None)


def test_captions_read_well():
    red, blue, cross = Thing("big", "red", "circle"), Thing("small", "blue", "star"), Thing("big", "green", "cross")
    pair = Scene("white", (red, blue), ((0, 0), (1, 0)), "above")
    assert pair.caption() == "a big red circle above a small blue star on white"
    assert Scene("black", (cross,) * 3, ((0, 0), (0, 1), (1, 1))).caption(False) == "three big green crosses"
    assert Scene("white", (red, blue, cross), ((0, 0), (0, 1), (1, 1))).caption(False) == (
        "a big red circle and a small blue star and a big green cross"
    )


def test_two_captions_in_three_name_the_background():
    scene, rng = draw_scene(TOY, 0, 0), np.random.default_rng(0)
    named = np.mean([" on " in caption(scene, rng) for _ in range(2_000)])
    assert named == pytest.approx(2 / 3, abs=0.05)


@given(some_scenes)
def test_a_relation_is_drawn_as_it_is_said(case):
    _, scene = case
    if scene.relation is None:
        return
    (r1, c1), (r2, c2) = scene.cells
    if scene.relation in ("above", "below"):
        assert c1 == c2 and (r1 < r2) == (scene.relation == "above")
    else:
        assert r1 == r2 and (c1 < c2) == (scene.relation == "left of")


# ---------------------------------------------------------------------------------------------------------------------
# Questions, answered again by brute force


PLURALS = {"crosses": "cross"} | {f"{shape}s": shape for shape in SHAPES if shape != "cross"}


def answer(question: str, scene: Scene, cells: dict) -> str:
    """The answer from a list of (size, colour, shape, row, column) alone."""
    seen = [(*vars(thing).values(), *cell) for cell, thing in cells.items()]

    def match(pattern):
        return re.fullmatch(pattern, question)

    if match(r"how many things are there\?"):
        return NUMBERS[len(seen)]
    if m := match(r"how many (\w+) are there\?"):
        return NUMBERS[sum(s[2] == PLURALS[m[1]] for s in seen)]
    if match(r"what is the background\?"):
        return scene.background
    if m := match(r"is there a (\w+) (\w+)\?"):
        return "yes" if any(s[1:3] == (m[1], m[2]) for s in seen) else "no"
    if m := match(r"what (colour|size) is the (\w+)\?"):
        (one,) = [s for s in seen if s[2] == m[2]]
        return one[1] if m[1] == "colour" else one[0]
    if m := match(r"what shape is the (\w+) thing\?"):
        (one,) = [s for s in seen if s[1] == m[1]]
        return one[2]
    if m := match(rf"is the {THING} (above|below|left of|right of) the {THING}\?"):
        words = m.groups()
        (r1, c1), (r2, c2) = (next(s[3:] for s in seen if s[:3] == words[i : i + 3]) for i in (0, 4))
        return (
            "yes" if {"above": r1 < r2, "below": r1 > r2, "left of": c1 < c2, "right of": c1 > c2}[words[3]] else "no"
        )
    raise AssertionError(f"unknown question: {question}")


@given(some_scenes, st.integers(0, 10_000))
def test_answers_are_right(case, seed):
    world, scene = case
    cells = dict(zip(scene.cells, scene.things, strict=True))
    asked = questions(scene, world, np.random.default_rng(seed))
    assert len(asked) >= 4 and len({q for q, _ in asked}) == len(asked)
    for question, said in asked:
        assert said == answer(question, scene, cells), question


@pytest.mark.parametrize("world", [TOY, RICH], ids=["toy", "rich"])
def test_yes_and_no_are_equally_likely_and_every_kind_is_asked(world):
    answers = {"is there": Counter(), "is the ": Counter()}
    kinds_asked = Counter()
    for i, scene in enumerate(scenes(world, 0, 2_000)):
        for question, said in questions(scene, world, np.random.default_rng((1, i))):
            kinds_asked[" ".join(question.split()[:2])] += 1
            for start, counter in answers.items():
                if question.startswith(start):
                    counter[said] += 1
    for counter in answers.values():
        assert set(counter) == {"yes", "no"}
        assert counter["yes"] / counter.total() == pytest.approx(0.5, abs=4 * 0.5 / counter.total() ** 0.5)
    assert (
        min(kinds_asked[k] for k in ("how many", "what is", "what colour", "what size", "what shape", "is the")) > 300
    )


# ---------------------------------------------------------------------------------------------------------------------
# Images


@given(some_scenes)
def test_every_cell_shows_its_thing_as_any_other_cell_would(case):
    """So the tokenizer's patches, of 4 or 8 or 16 pixels, see one object always in the same way."""
    world, scene = case
    image = draw(scene, world)
    assert image.shape == (world.resolution, world.resolution, 3) and image.dtype == np.uint8
    shown = dict(zip(scene.cells, scene.things, strict=True))
    one = World(side=1)
    for row in range(world.side):
        for column in range(world.side):
            cell = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            if thing := shown.get((row, column)):
                assert np.array_equal(cell, draw(Scene(scene.background, (thing,), ((0, 0),)), one))
            else:
                assert (cell == BACKGROUNDS[scene.background]).all()


def test_objects_look_different_and_show_their_colour():
    one = World(side=1)
    for background, ground in BACKGROUNDS.items():
        images = {
            Thing(z, c, s): draw(Scene(background, (Thing(z, c, s),), ((0, 0),)), one).astype(int)
            for z in SIZES for c in COLOURS for s in SHAPES
        }  # fmt: skip
        flat = np.stack([p.ravel() for p in images.values()]).astype(float)
        apart = ((flat[:, None] - flat[None]) ** 2).sum(-1) + 1e12 * np.eye(len(flat))
        assert apart.min() > 1_000
        for thing, image in images.items():
            assert (image == COLOURS[thing.colour]).all(-1).sum() >= 10
            corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
            assert (corners == ground).all()
        big, small = ((flat_of(images, z) != ground).any(-1).sum() for z in ("big", "small"))
        assert big > 1.5 * small


def flat_of(images, size):
    return np.stack([p for thing, p in images.items() if thing.size == size])


# ---------------------------------------------------------------------------------------------------------------------
# Documents


@pytest.mark.parametrize("form", FORMS)
@given(st.integers(0, 1_000), st.integers(0, 10_000), st.booleans())
def test_documents_tell_the_truth_about_their_images(form, seed, index, test):
    source = ShapesSource(TOY, form, seed, test)
    doc, again = source.document(index), source.document(index)
    scenes = [source.scene(i)[0] for i in ((2 * index, 2 * index + 1) if form == "interleaved" else (index,))]
    scene = scenes[0]
    texts, images = [s.text for s in doc if isinstance(s, Text)], [s.pixels for s in doc if isinstance(s, RawImage)]
    assert texts == [s.text for s in again if isinstance(s, Text)]
    assert all(s.for_test == test for s in scenes) and not any(s.compositions & TOY.held_out for s in scenes)
    assert all(np.array_equal(p, draw(s, TOY)) for p, s in zip(images, scenes, strict=form != "text"))
    if form == "questions":
        assert len(images) == 1 and 8 <= len(texts) <= 12
        assert [type(s) for s in doc] == [RawImage, *[Text, EndOfTurn] * len(texts)][:-1]
        cells = dict(zip(scene.cells, scene.things, strict=True))
        for question, said in zip(texts[::2], texts[1::2], strict=True):
            assert said == (scene.caption() if question == ASK_CAPTION else answer(question, scene, cells))
        return
    orders = {"interleaved": [Text, RawImage] * 2, "drawings": [Text, RawImage], "text": [Text]}
    if form == "pairs":
        assert len(texts) == len(images) == 1
    else:
        assert [type(s) for s in doc] == orders[form]
    for text, image in zip(texts, images, strict=form != "text"):
        reading, (things, _, background) = read(image, TOY), read_caption(text)
        assert sorted(reading.things) == sorted(things) and background in (None, reading.background)
    assert tuple(read_caption(texts[0])[0]) == scene.things


def test_the_forms_show_different_scenes():
    first = [[ShapesSource(TOY, form, 0).scene(i)[0] for i in range(20)] for form in FORMS]
    assert first[0] != first[1] != first[2] != first[0]


@given(*[st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 20))] * 2)
def test_no_two_seeds_or_sources_share_their_scenes(one, other):
    assert (source_seed(*one) == source_seed(*other)) == (one == other)
