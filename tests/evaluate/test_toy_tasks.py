"""Choices of the shapes world: one candidate is true, the others are wrong in the fact that they name."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOKENIZER, VOCAB, tiny_run

from nanochameleon.data.sources.scenes import RELATIONS, World, draw, draw_scene
from nanochameleon.documents import EndOfTurn, Image, Text, parse
from nanochameleon.errors import UserError
from nanochameleon.evaluate import choosing, toy_tasks
from nanochameleon.evaluate.captions import score_caption
from nanochameleon.evaluate.drawing.readings import scene_of
from nanochameleon.evaluate.oracle import judge
from nanochameleon.evaluate.scoring import score
from nanochameleon.evaluate.task import Item, Line, Options
from nanochameleon.evaluate.toy_tasks import TASKS, caption_item, kind_of, relation_item, words_item
from nanochameleon.evaluate.vision.shapes_tasks import true_captions
from nanochameleon.training.run import Run
from nanochameleon.weights.model_folder import open_model

WORLDS = World(), World.rich()
OPTIONS = Options(world=World(), limit=60)
scenes = st.builds(
    lambda world, i: (world, draw_scene(world, 1, i, test=True)), st.sampled_from(WORLDS), st.integers(0)
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return open_model(tiny_run(tmp_path_factory.mktemp("runs") / "tiny"), "cpu")


def candidates(choice: dict) -> dict[str, str]:
    """Return what is wrong -> candidate."""
    return dict(zip(choice["kinds"], choice["candidates"], strict=True))


# --- candidates ------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(scenes, st.integers(0, 1_000))
def test_one_of_four_captions_is_true_and_the_others_have_one_fact_wrong(drawn, seed):
    world, scene = drawn
    choice = caption_item(scene, world, seed)
    assert choice["candidates"][choice["right"]] == scene.caption() == candidates(choice)[""]
    assert len(set(choice["candidates"])) == len(set(choice["kinds"])) == 4
    for kind, caption in candidates(choice).items():
        right, wrong = scene.caption().split(), caption.split()
        assert (caption in true_captions(scene)) == (score_caption(caption, scene, world) == 1.0) == (kind == "")
        if kind not in ("", "count"):  # a count changes the noun's ending, too
            assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1


@settings(max_examples=60)
@given(scenes)
def test_wrong_captions_show_only_things_that_training_has_shown(drawn):
    world, scene = drawn
    for caption in caption_item(scene, world, 0)["candidates"]:
        assert not any(f"{colour} {shape}" in caption for colour, shape in world.held_out)


@settings(max_examples=60)
@given(scenes)
def test_the_image_shows_one_of_the_four_relations(drawn):
    """Judged by the oracle, which reads the image."""
    world, scene = drawn
    choice = relation_item(scene, world, 0)
    if not scene.relation:
        assert choice is None
        return
    image = draw(scene, world)
    shown = [
        replace(scene, relation=name)
        for name in RELATIONS
        if judge(replace(scene, relation=name), image, world)["all_facts"]
    ]
    assert [each.caption() for each in shown] == [choice["candidates"][choice["right"]]]
    assert sorted(choice["kinds"]) == ["", "opposite", "other axis", "other axis"]
    assert sorted(choice["candidates"]) == sorted(replace(scene, relation=name).caption() for name in RELATIONS)


def test_wrong_words_by_example():
    world = World()
    found = {}
    for i in range(200):
        scene = draw_scene(world, 2, i, test=True)
        found.setdefault(kind_of(scene), (scene.caption(), candidates(words_item(scene, world, 0))))
    for kind in ("single", "several", "pair"):
        right, wrong = found[kind]
        first, second, third = right.split()[1:4]
        assert wrong[""] == right
        assert wrong["adjectives"] == right.replace(f"{first} {second}", f"{second} {first}", 1)
        other = third.removesuffix("s").removesuffix("se") if kind == "several" else third
        assert wrong["number"].split()[3].rstrip("es") == other.rstrip("es") and wrong["number"] != right
        assert wrong["order"].split()[:2] == ["on", right.split()[-1]]


# --- items -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_items_are_the_same_in_every_run_and_right_is_anywhere(task, monkeypatch):
    items = task.read(OPTIONS)
    assert task.read(OPTIONS) == items and task.read(replace(OPTIONS, limit=7)) == items[:7]
    assert len({item.id for item in items}) == len(items) == 60
    assert all(scene_of(item.content["scene"]).for_test for item in items)
    assert task.read(replace(OPTIONS, seed=1)) != items
    assert min(Counter(item.content["right"] for item in items).values()) >= 3
    monkeypatch.setattr(toy_tasks, "N_ITEMS", 5)
    assert task.read(Options(world=World())) == items[:5]
    with pytest.raises(UserError, match="shapes world"):
        task.read(Options())


# --- answers ---------------------------------------------------------------------------------------------------------


def test_captions_are_scored_after_the_image_and_the_question_and_without_the_image(run):
    task = TASKS[0]
    items = [Item("a", json.loads(json.dumps(item.content))) for item in task.read(replace(OPTIONS, limit=2))]
    small = replace(run, image_tokenizer=Tokenizer())
    answers = task.answer(small, items, OPTIONS)
    for item, answer in zip(items, answers, strict=True):
        image, question, end = parse(answer.prompt, TOKENIZER, VOCAB)
        assert image == Image((1, 2, 3, 4)) and question == Text("what is in the picture?") and end == EndOfTurn()
        blind = [VOCAB.bos, *TOKENIZER.encode(question.text), VOCAB.eot]
        new = [TOKENIZER.encode(caption) for caption in item.content["candidates"]]
        for name, prompt in (("log_probs", answer.prompt), ("blind", blind)):
            wanted = [each.log_prob for each in score(run, [(prompt, each) for each in new])]
            assert answer.output[name] == pytest.approx(wanted, abs=1e-3)
    assert task.answer(small, items[1:], OPTIONS)[0].output["blind"] == pytest.approx(
        answers[1].output["blind"], abs=1e-3
    )


class Tokenizer:
    """An image tokenizer that gives every image the same codes."""

    def encode(self, images):
        return torch.tensor([[1, 2, 3, 4]] * len(images))


def test_words_are_scored_as_the_start_of_a_document(run):
    items = TASKS[2].read(replace(OPTIONS, limit=1))
    [answer] = TASKS[2].answer(run, items, OPTIONS)
    new = [TOKENIZER.encode(caption) for caption in items[0].content["candidates"]]
    wanted = [each.log_prob for each in score(run, [([VOCAB.bos], each) for each in new])]
    assert answer.output == {"log_probs": pytest.approx(wanted, abs=1e-3)}


# --- scores and figures ----------------------------------------------------------------------------------------------

CHOICE = {"candidates": ["bb", "a", "cccc", "dd"], "kinds": ["size", "", "count", "size"], "right": 1}


def test_scores_by_hand():
    """By characters the third is best, at -5 / 4; the right one beats one of the two of the wrong size."""
    found, metrics = choosing.score(CHOICE, {"log_probs": [-9, -3, -5, -2.9], "blind": [-2, -1, -9, -8]})
    assert found == "dd"
    assert metrics == {
        "acc": 0.0, "acc_norm": 0.0, "size": 0.0, "count": 1.0,
        "acc, blind": 1.0, "acc_norm, blind": 0.0, "size, blind": 1.0, "count, blind": 1.0,
    }  # fmt: skip
    assert choosing.score(CHOICE, {"log_probs": [-9, -1, -5, -4]})[1]["acc_norm"] == 1.0


def test_figures_have_chance_baseline_and_ceiling():
    outputs = [
        {"log_probs": [-9, -1, -5, -4], "blind": [-9, -10, -11, -12]},
        {"log_probs": [-9, -10, -5, -4], "blind": [-9, -1, -5, -4]},
    ]
    lines = [Line(str(i), "", CHOICE, output, *choosing.score(CHOICE, output)) for i, output in enumerate(outputs)]
    figures = {figure.name: figure for figure in choosing.figures(lines)}
    assert set(figures) == {"acc", "acc_norm", "size", "count"}
    assert (figures["acc"].value, figures["acc"].chance, figures["acc"].baseline, figures["acc"].ceiling) == (
        0.5,
        0.25,
        0.5,
        1.0,
    )
    assert (figures["count"].value, figures["count"].chance, figures["count"].baseline) == (0.5, 0.5, 1.0)
    assert figures["size"].chance == 1 / 3  # the likeliest of three: two candidates have the wrong size
    wordless = [replace(line, metrics=choosing.score(CHOICE, {"log_probs": [-1, -2, -3, -4]})[1]) for line in lines]
    assert choosing.figures(wordless)[0].baseline is None
