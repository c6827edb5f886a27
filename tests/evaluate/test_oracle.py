"""The oracle is correct on every clean image, notices each wrong fact, and calls anything else unreadable."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.data.sources.scenes import BACKGROUNDS, CELL, OPPOSITE, Scene, Thing, World, draw, draw_scene, scenes
from nanochameleon.evaluate.oracle import judge, read

TOY, RICH = World(), World.rich()


@pytest.mark.parametrize("compositions", ["seen", "held_out"])
@pytest.mark.parametrize("world", [TOY, RICH], ids=["toy", "rich"])
def test_clean_images_of_the_test_split_are_read_right(world, compositions):
    drawn = list(scenes(world, 0, 500, compositions, test=True))
    judged = [judge(scene, draw(scene, world), world) for scene in drawn]
    assert np.mean([facts["all_facts"] for facts in judged]) >= 0.999
    for scene, facts in zip(drawn, judged, strict=True):
        assert set(facts) == {"background", "count", "shapes", "colours", "sizes", "all_facts"} | (
            {"relation"} if scene.relation else set()
        )


@st.composite
def wrong_images(draw_from):
    """(the fact that is wrong, the scene asked for, the scene drawn instead, world)"""
    world = draw_from(st.sampled_from([TOY, RICH]))
    scene = draw_scene(world, draw_from(st.integers(0, 100)), draw_from(st.integers(0, 10_000)), "any")
    fact = draw_from(st.sampled_from(["background", "count", "shapes", "colours", "sizes", "relation"]))
    which = draw_from(st.integers(0, len(scene.things) - 1))
    thing = scene.things[which]

    def other(values, than):
        return draw_from(st.sampled_from([v for v in values if v != than]))

    def with_thing(changed):
        return replace(scene, things=(*scene.things[:which], changed, *scene.things[which + 1 :]))

    if fact == "background":
        return fact, scene, replace(scene, background=other(world.backgrounds, scene.background)), world
    if fact == "count":  # one more of it
        free = [(r, c) for r in range(world.side) for c in range(world.side) if (r, c) not in scene.cells]
        if not free:
            return fact, scene, replace(scene, things=scene.things[1:], cells=scene.cells[1:]), world
        return fact, scene, replace(scene, things=(*scene.things, thing), cells=(*scene.cells, free[0])), world
    if fact == "relation":
        if not scene.relation:
            scene = replace(scene, things=(thing, Thing("big", *other_pair(thing))), cells=((0, 0), (0, 1)),
                            relation="left of")  # fmt: skip
        return fact, scene, replace(scene, cells=scene.cells[::-1]), world
    if fact == "shapes":
        return fact, scene, with_thing(replace(thing, shape=other(world.shapes, thing.shape))), world
    if fact == "colours":
        return fact, scene, with_thing(replace(thing, colour=other(world.colours, thing.colour))), world
    return fact, scene, with_thing(replace(thing, size=other(("big", "small"), thing.size))), world


def other_pair(thing):
    return ("red", "circle") if thing.colour != "red" else ("blue", "square")


@given(wrong_images())
def test_one_wrong_fact_is_seen_and_named(case):
    fact, asked, drawn, world = case
    facts = judge(asked, draw(drawn, world), world)
    assert not facts[fact] and not facts["all_facts"]
    unharmed = {"background", "count", "shapes", "colours", "sizes"} - {fact}
    if fact not in ("count", "relation"):
        assert all(facts[name] for name in unharmed)
    if fact == "relation":
        assert all(facts[name] for name in unharmed) and judge(replace(asked, relation=OPPOSITE[asked.relation]),
                                                               draw(drawn, world), world)["all_facts"]  # fmt: skip


def test_facts_bound_to_the_wrong_things_are_wrong_as_a_whole():
    """A red star and a blue circle have the shapes and colours of a red circle and a blue star, and are not them."""
    asked = Scene("white", (Thing("big", "red", "circle"), Thing("big", "blue", "star")), ((0, 0), (0, 1)), "left of")
    drawn = replace(asked, things=(Thing("big", "red", "star"), Thing("big", "blue", "circle")))
    facts = judge(asked, draw(drawn, TOY), TOY)
    assert facts["shapes"] and facts["colours"] and not facts["relation"] and not facts["all_facts"]


@pytest.mark.parametrize("world", [TOY, RICH], ids=["toy", "rich"])
@pytest.mark.parametrize("turned", [0, 1, 2, 3])
def test_half_an_object_is_unreadable(world, turned):
    """Half of its painted pixels, from any of the four sides."""
    for i, background in enumerate(world.backgrounds):
        for thing in [Thing(z, c, s) for z in ("big", "small") for c in world.colours[i::3] for s in world.shapes]:
            scene = Scene(background, (thing,), ((0, 1),))
            image = draw(scene, world)
            cell = np.rot90(image[:CELL, CELL : 2 * CELL], turned)  # a view: rows are taken away from its top
            rows = (cell != BACKGROUNDS[background]).any(-1).sum(1).cumsum()
            cell[: int(np.searchsorted(rows, rows[-1] / 2)) + 1] = BACKGROUNDS[background]
            reading = read(image, world)
            assert (reading.things, reading.unreadable) == ((), 1), thing
            assert not judge(scene, image, world)["all_facts"]


@given(st.integers(0, 1_000), st.sampled_from([TOY, RICH]), st.integers(0, 2), st.integers(0, 4))
def test_a_blob_of_noise_is_unreadable_and_no_background(seed, world, background, margin):
    background = world.backgrounds[background % len(world.backgrounds)]
    scene = Scene(background, (Thing("big", "red", "star"),), ((0, 0),))
    image, (low, high) = draw(scene, world), (CELL + margin, 2 * CELL - margin)
    image[low:high, low:high] = np.random.default_rng(seed).integers(0, 256, (high - low, high - low, 3))
    reading = read(image, world)
    assert reading.unreadable == 1 and reading.things == scene.things
    facts = judge(scene, image, world)
    assert not facts["count"] and not facts["all_facts"]


@given(st.integers(0, 10_000), st.integers(0, 8))
def test_a_little_noise_all_over_changes_no_reading(seed, size):
    scene = draw_scene(RICH, 0, seed)
    noise = np.random.default_rng(seed).integers(-size, size + 1, (RICH.resolution, RICH.resolution, 3))
    image = np.clip(draw(scene, RICH).astype(int) + noise, 0, 255).astype(np.uint8)
    assert judge(scene, image, RICH)["all_facts"]


def test_nothing_is_an_empty_reading():
    image = np.full((32, 32, 3), BACKGROUNDS["black"], np.uint8)
    reading = read(image, TOY)
    assert (reading.background, reading.things, reading.cells, reading.unreadable) == ("black", (), (), 0)
    assert not judge(draw_scene(TOY, 0, 0), image, TOY)["count"]
