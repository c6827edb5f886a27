"""The true caption scores 1 in any wording, each wrong fact costs, and no text breaks the parser."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochameleon.data.sources.scenes import OPPOSITE, Scene, Thing, World, draw_scene
from nanochameleon.evaluate.captions import facts, parse_caption, score_caption

WORLDS = {"toy": World(), "rich": World.rich()}
any_scene = st.builds(
    lambda world, index, compositions: (draw_scene(world, 0, index, compositions), world),
    st.sampled_from(list(WORLDS.values())), st.integers(0, 10**6), st.sampled_from(["seen", "held_out", "any"]),
)  # fmt: skip
CIRCLE, STAR = Thing("big", "red", "circle"), Thing("small", "blue", "star")
PAIR = Scene("white", (CIRCLE, STAR), ((0, 0), (1, 0)), "above")


@given(any_scene, st.booleans())
def test_reading_is_the_inverse_of_writing(drawn, with_background):
    scene, world = drawn
    background = scene.background if with_background else ""
    assert parse_caption(scene.caption(with_background), world) == replace(scene, cells=(), background=background)


@given(any_scene)
def test_the_truth_scores_1_in_either_order(drawn):
    scene, world = drawn
    assert score_caption(scene.caption(), scene, world) == 1
    assert score_caption(f" {scene.caption()}\n", scene, world) == 1
    if scene.relation:
        flipped = replace(scene, things=scene.things[::-1], relation=OPPOSITE[scene.relation])
        assert flipped.caption() != scene.caption() and score_caption(flipped.caption(), scene, world) == 1


@given(any_scene, st.data())
def test_every_wrong_fact_costs(drawn, data):
    """Exchange one word of the caption for another of its kind, and count the facts that no longer hold."""
    scene, world = drawn
    i = data.draw(st.integers(0, len(scene.things) - 1))
    field = data.draw(st.sampled_from(["size", "colour", "shape", "background", "relation", "count"]))
    if field == "background":
        other = replace(scene, background=next(b for b in world.backgrounds if b != scene.background))
    elif field == "relation":
        wrong = {"above": "left of", "below": "above", "left of": "right of", "right of": "below"}
        other = replace(scene, relation=wrong[scene.relation]) if scene.relation else None
    elif field == "count":
        alike = len(set(scene.things)) == 1
        other = replace(scene, things=scene.things[:1] * (len(scene.things) % world.max_count + 1)) if alike else None
    else:
        choices = {"size": ("big", "small"), "colour": world.colours, "shape": world.shapes}[field]
        wrong = data.draw(st.sampled_from([word for word in choices if word != getattr(scene.things[i], field)]))
        changed = replace(scene.things[i], **{field: wrong})
        alike = len(set(scene.things)) == 1
        things = (changed,) * len(scene.things) if alike else (*scene.things[:i], changed, *scene.things[i + 1 :])
        other = replace(scene, things=things)
    if other is not None and (scene.relation or len(set(other.things)) in (1, len(other.things))):
        truth, said = facts(scene), facts(other)
        right = sum(said.get(name) == value for name, value in truth.items())
        assert right < len(truth) and score_caption(other.caption(), scene, world) == right / len(truth)


@pytest.mark.parametrize(
    ("caption", "score"),
    [
        ("a big red circle above a small blue star on white", 6 / 6),
        ("a small blue star below a big red circle on white", 6 / 6),
        ("a big red circle above a small blue star on black", 5 / 6),
        ("a big red circle above a small blue star", 5 / 6),
        ("a big red circle below a small blue star on white", 5 / 6),
        ("a big red circle above a big blue star on white", 4 / 6),  # the size, and with it who is above whom
        ("a big blue circle above a small red star on white", 5 / 6),  # the colours are right, of which thing not
        ("a big red circle on white", 1 / 6),
        ("two big red circles on white", 2 / 6),
    ],
)
def test_scores_by_hand(caption, score):
    assert score_caption(caption, PAIR, World()) == pytest.approx(score)


NOT_CAPTIONS = """
    on white | a | red | a big red circle on | a big red circle on green | big red circle | the big red circle
    a red circle | a thing | a big red circle above | a big red circle above above a small blue star
    a big red circle above a small blue star above a big green square | two big red circle | a big red circles
    one big red circle | no big red circles | seven big red circles | two big red circles above a small blue star
    a big red circle and a small blue star on white | a big red circle and a big red circle | a big brown circle
    a big red diamond | A big red circle | what is in the picture? | four | a big red circle on white on white
"""


@pytest.mark.parametrize(
    "text",
    ["", " ", "a big red circle\non white", *(text.strip() for text in re.split(r"[|\n]", NOT_CAPTIONS.strip()))],
)
def test_what_no_scene_would_be_called_is_no_caption(text):
    assert parse_caption(text, World()) is None and score_caption(text, PAIR, World()) == 0


WORDS = (
    "a two six no big small red blue circle circles crosses cross crosss star above below left of right and on white"
)
words = st.sampled_from(WORDS.split())


@given(st.text() | st.lists(words | st.text(max_size=3), max_size=14).map(" ".join), any_scene)
def test_no_text_makes_it_raise_and_what_it_reads_it_would_write(text, drawn):
    scene, world = drawn
    said = parse_caption(text, world)
    assert 0 <= score_caption(text, scene, world) <= 1
    assert said is None or said.caption(bool(said.background)) == text.strip()
