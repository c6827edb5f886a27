"""GenEval's rules in the shapes world: each of them right and wrong, for every kind of mistake; prompts; figures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanochameleon.data.sources.scenes import CELL, OPPOSITE, Scene, Thing, World, draw
from nanochameleon.errors import UserError
from nanochameleon.evaluate.captions import facts, parse_caption
from nanochameleon.evaluate.drawing import shapes_alignment, shapes_geneval
from nanochameleon.evaluate.drawing.geneval import COMPOSITIONS, cases, judge, metadata, scenes_of
from nanochameleon.evaluate.drawing.readings import reading_of, scene_of, to_json
from nanochameleon.evaluate.drawing.summary import TASKS, figures, summarise, table
from nanochameleon.evaluate.intervals import wilson
from nanochameleon.evaluate.log import parse, to_bytes
from nanochameleon.evaluate.oracle import read
from nanochameleon.evaluate.task import Line, Options

TOY, RICH = World(), World.rich()
WORLDS = st.sampled_from([TOY, RICH])

RED_CIRCLE, BLUE_STAR = Thing("big", "red", "circle"), Thing("small", "blue", "star")
GREEN_SQUARE, RED_STAR = Thing("big", "green", "square"), Thing("small", "red", "star")
PAIR = Scene("white", (RED_CIRCLE, BLUE_STAR), ((0, 0), (0, 1)), "left of")


def verdict(tag: str, asked: Scene, shown: Scene, world: World = TOY) -> tuple[bool, str]:
    """Judge the drawing of one scene by the prompt of another."""
    return judge(metadata(tag, asked), read(draw(shown, world), world))


def of(*things: Thing, cells=None) -> Scene:
    """These things in the first cells of the lattice, or in given ones."""
    return Scene("white", things, cells or tuple((i // 2, i % 2) for i in range(len(things))))


# ---------------------------------------------------------------------------------------------------------------------
# The six tasks: right, and wrong in each way


@pytest.mark.parametrize(
    ("tag", "asked", "shown", "why"),
    [
        # single object: the class, whatever its size, colour, place and number
        ("single_object", of(RED_CIRCLE), of(RED_CIRCLE), ""),
        ("single_object", of(RED_CIRCLE), of(Thing("small", "blue", "circle"), cells=((1, 1),)), ""),
        ("single_object", of(RED_CIRCLE), of(RED_CIRCLE, RED_CIRCLE), ""),
        ("single_object", of(RED_CIRCLE), of(GREEN_SQUARE, RED_CIRCLE), ""),
        ("single_object", of(RED_CIRCLE), of(GREEN_SQUARE), "0 circle: 1 wanted"),
        ("single_object", of(RED_CIRCLE), of(), "0 circle: 1 wanted"),
        # two objects: both classes, in any relation and any colours
        ("two_object", PAIR, PAIR, ""),
        ("two_object", PAIR, replace(PAIR, cells=((1, 1), (0, 0))), ""),
        ("two_object", PAIR, of(Thing("big", "blue", "circle"), RED_STAR), ""),
        ("two_object", PAIR, of(RED_CIRCLE), "0 star: 1 wanted"),
        ("two_object", PAIR, of(BLUE_STAR, BLUE_STAR), "0 circle: 1 wanted"),
        ("two_object", PAIR, of(GREEN_SQUARE), "0 circle: 1 wanted; 0 star: 1 wanted"),
        # counting: exactly so many of the class, in any colours
        ("counting", of(RED_STAR, RED_STAR), of(RED_STAR, RED_STAR), ""),
        ("counting", of(RED_STAR, RED_STAR), of(RED_STAR, BLUE_STAR, GREEN_SQUARE), ""),
        ("counting", of(RED_STAR, RED_STAR), of(RED_STAR), "1 star: 2 wanted"),
        ("counting", of(RED_STAR, RED_STAR), of(*[RED_STAR] * 3), "3 star: fewer than 3 are wanted"),
        ("counting", of(*[RED_STAR] * 3), of(*[RED_STAR] * 4), "4 star: fewer than 4 are wanted"),
        ("counting", of(RED_STAR, RED_STAR), of(RED_CIRCLE, RED_CIRCLE), "0 star: 2 wanted"),
        # colours: the class in that colour, in any size
        ("colors", of(RED_CIRCLE), of(RED_CIRCLE), ""),
        ("colors", of(RED_CIRCLE), of(Thing("small", "red", "circle")), ""),
        ("colors", of(RED_CIRCLE), of(Thing("big", "blue", "circle"), RED_CIRCLE), ""),
        ("colors", of(RED_CIRCLE), of(Thing("big", "blue", "circle")), "circle is blue: 1 red wanted"),
        ("colors", of(RED_CIRCLE), of(RED_STAR), "0 circle: 1 wanted"),
        ("colors", of(RED_CIRCLE), of(Thing("big", "blue", "circle"), RED_STAR), "circle is blue: 1 red wanted"),
        # position: the first object is placed so to the second, by their centres
        ("position", PAIR, PAIR, ""),
        ("position", PAIR, replace(PAIR, cells=((1, 0), (1, 1))), ""),
        ("position", PAIR, replace(PAIR, cells=((0, 0), (1, 1))), ""),  # a diagonal is left of, and above
        ("position", replace(PAIR, relation="above"), replace(PAIR, cells=((0, 0), (1, 1))), ""),
        ("position", PAIR, replace(PAIR, cells=((0, 1), (0, 0))), "no circle left of the object that it refers to"),
        ("position", PAIR, replace(PAIR, cells=((0, 0), (1, 0))), "no circle left of the object that it refers to"),
        ("position", PAIR, of(Thing("small", "green", "circle"), RED_STAR), ""),
        ("position", PAIR, of(RED_CIRCLE, BLUE_STAR, BLUE_STAR), ""),  # left of one of the stars, above the other
        ("position", PAIR, of(RED_CIRCLE), "0 star: 1 wanted; no circle left of the object that it refers to"),
        ("position", PAIR, of(BLUE_STAR), "0 circle: 1 wanted"),
        # attributed colours: each class in its own colour
        ("color_attr", PAIR, PAIR, ""),
        ("color_attr", PAIR, replace(PAIR, cells=((1, 1), (0, 0))), ""),
        ("color_attr", PAIR, of(Thing("big", "blue", "circle"), RED_STAR),
         "circle is blue: 1 red wanted; star is red: 1 blue wanted"),
        ("color_attr", PAIR, of(RED_CIRCLE, RED_STAR), "star is red: 1 blue wanted"),
        ("color_attr", PAIR, of(RED_CIRCLE), "0 star: 1 wanted"),
    ],
)  # fmt: skip
def test_a_rule(tag, asked, shown, why):
    assert verdict(tag, asked, shown) == (not why, why)


def test_what_the_oracle_cannot_read_is_no_object():
    image = draw(PAIR, TOY)
    image[:CELL, CELL:] = np.random.default_rng(0).integers(0, 256, (CELL, CELL, 3))  # where the star was
    correct, why = judge(metadata("two_object", PAIR), read(image, TOY))
    assert (correct, why) == (False, "0 star: 1 wanted")
    assert judge(metadata("single_object", PAIR), read(image, TOY))[0] is False  # its line names both objects
    assert judge(metadata("single_object", of(RED_CIRCLE)), read(image, TOY))[0]


@given(st.sampled_from(TASKS), st.sampled_from(COMPOSITIONS), WORLDS, st.integers(0, 30), st.data())
def test_a_true_drawing_is_correct_and_each_judged_fact_matters(tag, compositions, world, seed, data):
    scene = data.draw(st.sampled_from(scenes_of(tag, compositions, world, seed, 5)))
    assert verdict(tag, scene, scene, world) == (True, "")
    which = data.draw(st.integers(0, len(scene.things) - 1))
    thing = scene.things[which]

    def with_thing(**changes) -> Scene:
        return replace(scene, things=(*scene.things[:which], replace(thing, **changes), *scene.things[which + 1 :]))

    shapes = {t.shape for t in scene.things}
    shape = data.draw(st.sampled_from([s for s in world.shapes if s not in shapes]))
    assert not verdict(tag, scene, with_thing(shape=shape), world)[0]  # every task judges the class
    colour = data.draw(st.sampled_from([c for c in world.colours if c != thing.colour]))
    assert verdict(tag, scene, with_thing(colour=colour), world)[0] == (tag not in ("colors", "color_attr"))
    size = {"big": "small", "small": "big"}[thing.size]
    assert verdict(tag, scene, with_thing(size=size), world)[0]  # no task judges the size
    ground = data.draw(st.sampled_from(world.backgrounds))
    assert verdict(tag, scene, replace(scene, background=ground), world)[0]  # nor the background
    if scene.relation:
        swapped = replace(scene, cells=scene.cells[::-1])
        assert verdict(tag, scene, swapped, world)[0] == (tag != "position")
    fewer = replace(scene, things=scene.things[1:], cells=scene.cells[1:])
    assert not verdict(tag, scene, fewer, world)[0]


@given(WORLDS, st.data())
def test_one_of_opposite_relations_holds_at_most_and_they_are_mirrored(world, data):
    cell = st.tuples(st.integers(0, world.side - 1), st.integers(0, world.side - 1))
    cells = data.draw(st.tuples(cell, cell))
    assume(cells[0] != cells[1])
    holding = {
        relation
        for relation in OPPOSITE
        if verdict("position", replace(PAIR, relation=relation), replace(PAIR, cells=cells), world)[0]
    }
    assert 1 <= len(holding) <= 2 and not any(OPPOSITE[relation] in holding for relation in holding)
    mirrored = {
        relation
        for relation in OPPOSITE
        if verdict("position", replace(PAIR, relation=relation), replace(PAIR, cells=cells[::-1]), world)[0]
    }
    assert mirrored == {OPPOSITE[relation] for relation in holding}
    (r1, c1), (r2, c2) = cells
    if r1 == r2:
        assert holding == {"left of" if c1 < c2 else "right of"}
    if abs(r1 - r2) == 2 * abs(c1 - c2):  # two down, one aside: the axis aside has less than half of the distance
        assert holding == {"above" if r1 < r2 else "below"}


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def test_the_metadata_are_genevals():
    def line(tag, scene):
        return json.dumps(metadata(tag, scene))

    assert line("single_object", of(RED_CIRCLE)) == (
        '{"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a big red circle on white"}'
    )
    assert line("counting", of(RED_STAR, RED_STAR)) == (
        '{"tag": "counting", "include": [{"class": "star", "count": 2}], '
        '"exclude": [{"class": "star", "count": 3}], "prompt": "two small red stars on white"}'
    )
    assert line("colors", of(RED_CIRCLE)) == (
        '{"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], '
        '"prompt": "a big red circle on white"}'
    )
    caption = '"prompt": "a big red circle left of a small blue star on white"}'
    assert line("two_object", PAIR) == (
        '{"tag": "two_object", "include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1}], ' + caption
    )
    assert line("position", PAIR) == (
        '{"tag": "position", "include": [{"class": "star", "count": 1}, '
        '{"class": "circle", "count": 1, "position": ["left of", 0]}], ' + caption
    )
    assert line("color_attr", PAIR) == (
        '{"tag": "color_attr", "include": [{"class": "circle", "count": 1, "color": "red"}, '
        '{"class": "star", "count": 1, "color": "blue"}], ' + caption
    )


@pytest.mark.parametrize("world", [TOY, RICH], ids=["toy", "rich"])
def test_prompts_are_different_captions_with_the_compositions_that_they_claim(world):
    found: dict[tuple[str, str], list[Scene]] = {}
    for tag, compositions, scene in cases(world, 0, 40):
        found.setdefault((tag, compositions), []).append(scene)
    assert set(found) == {(tag, compositions) for tag in TASKS for compositions in COMPOSITIONS}
    for (tag, compositions), scenes in found.items():
        captions = [scene.caption() for scene in scenes]
        held_out_singles = 4 * len(world.held_out)  # 2 sizes and 2 or 3 backgrounds
        most = (
            held_out_singles if (compositions, tag) in {("held_out", "single_object"), ("held_out", "colors")} else 40
        )
        assert len(set(captions)) == len(captions) >= min(most, 40)
        for scene in scenes:
            assert facts(parse_caption(scene.caption(), world)) == facts(scene)  # the toy's own words
            assert bool(scene.compositions & world.held_out) == (compositions == "held_out")
            assert len({t.shape for t in scene.things}) == (2 if scene.relation else 1)
            assert (scene.relation is not None) == (tag in ("two_object", "position", "color_attr"))


def test_any_beginning_is_balanced_and_prompts_do_not_depend_on_the_limit():
    items = shapes_geneval.read(Options(world=TOY))
    few = shapes_geneval.read(Options(world=TOY, limit=24))
    assert few == items[:24] and len({item.id for item in items}) == len(items)
    assert {item.group for item in few} == {f"{tag}, {kind}" for tag in TASKS for kind in COMPOSITIONS}
    assert all(sum(item.group == group for item in few) == 2 for group in {item.group for item in few})
    several = shapes_geneval.read(Options(world=TOY, limit=6, samples=3))
    assert [item.id[-4:] for item in several] == ["0000", "0001", "0002"] * 2
    assert several[0].content["line"] == items[0].content["line"]


@pytest.mark.parametrize("task", [*shapes_geneval.TASKS, *shapes_alignment.TASKS], ids=lambda task: task.name)
def test_a_model_of_real_images_has_no_such_task(task):
    with pytest.raises(UserError, match="knows no shapes world"):
        task.read(Options())


@given(st.sampled_from(TASKS), WORLDS, st.integers(0, 20))
def test_scenes_and_readings_survive_json(tag, world, seed):
    scene = scenes_of(tag, "seen", world, seed, 1)[0]
    reading = read(draw(scene, world), world)
    assert scene_of(json.loads(json.dumps(to_json(scene)))) == scene
    assert reading_of(json.loads(json.dumps(to_json(reading)))) == reading


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def line_of(item, drawn: Scene, world: World = TOY) -> Line:
    """The line of an item for which the model drew this scene."""
    truth = to_json(read(draw(scene_of(item.content["scene"]), world), world))
    output = {"image": f"{item.id}.png", "drawn": to_json(read(draw(drawn, world), world))}
    output |= {"clean": truth, "reconstructed": truth}
    found, metrics = shapes_geneval.score(item.content, output)
    return Line(item.id, item.group, item.content, output, found, metrics)


def test_the_truth_scores_all_and_chance_is_what_other_prompts_images_get():
    items = shapes_geneval.read(Options(world=TOY, limit=120))
    lines = [line_of(item, scene_of(item.content["scene"])) for item in items]
    rows = {row.name: row for row in shapes_geneval.figures(lines)}
    assert list(rows)[:3] == ["overall, seen", "overall, held out", "single_object, seen"] and len(rows) == 14
    assert all(row.value == row.ceiling == 1 for row in rows.values())
    # One of five shapes is right by chance; a colour as well is right in about 1 of 35.
    assert 0.05 < rows["single_object, seen"].chance < 0.4
    assert rows["colors, seen"].chance < 0.15 and rows["color_attr, seen"].chance < 0.05
    chances = [rows[f"{tag}, seen"].chance for tag in TASKS]
    assert rows["overall, seen"].chance == pytest.approx(sum(chances) / 6)


def test_chance_is_the_mean_over_all_pairs_of_different_prompts():
    items = [item for item in shapes_geneval.read(Options(world=TOY, samples=2)) if item.group == "single_object, seen"]
    lines = [line_of(item, scene_of(item.content["scene"])) for item in items[:14]]
    pairs = [
        judge(json.loads(a.content["line"]), reading_of(b.output["drawn"]))[0]
        for a in lines
        for b in lines
        if a.content["number"] != b.content["number"]
    ]
    assert shapes_geneval.chance(lines) == pytest.approx(sum(pairs) / len(pairs))
    assert shapes_geneval.chance(lines[:2]) is None  # two samples of one prompt


def test_wrong_images_count_for_their_task_alone(tmp_path):
    items = shapes_geneval.read(Options(world=TOY, limit=120))
    empty = Scene("white", (), ())
    scenes = [empty if item.group == "position, seen" else scene_of(item.content["scene"]) for item in items]
    lines = [line_of(item, scene) for item, scene in zip(items, scenes, strict=True)]
    rows = {row.name: row for row in shapes_geneval.figures(lines)}
    assert rows["position, seen"].value == 0 and rows["position, seen"].ceiling == 1
    assert rows["overall, seen"].value == pytest.approx(5 / 6) and rows["overall, held out"].value == 1
    # The exported file has the official fields, and the summary of it agrees.
    lines.append(Line("x", "", {}, {"problem": "no room"}, None, {}))
    shapes_geneval.TASKS[0].export(lines, Options(world=TOY), tmp_path)
    results = [json.loads(row) for row in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(results) == 120
    assert {tuple(row) for row in results} == {
        ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")
    }
    wrong = next(row for row in results if not row["correct"])
    assert wrong["tag"] == "position" and "1 wanted" in wrong["reason"]
    assert json.loads(wrong["metadata"])["prompt"] == wrong["prompt"] and json.loads(wrong["details"])["things"] == []
    # A line that was read back from the log, which sorts keys, is exported as the same bytes.
    logged = [parse(to_bytes([line])[:-1], "log") for line in lines]
    (tmp_path / "again").mkdir()
    shapes_geneval.TASKS[0].export(logged, Options(world=TOY), tmp_path / "again")
    assert (tmp_path / "again/results.jsonl").read_bytes() == (tmp_path / "results.jsonl").read_bytes()
    summed = {row.name: row for row in summarise(tmp_path / "results.jsonl")}
    assert summed["position"].value == 0.5 and summed["overall"].value == pytest.approx(5.5 / 6)


def official(folder, counts: dict[str, tuple[int, int]]):
    """A results file as the official scorer writes it: {task: (correct, images)}."""
    path = folder / "results.jsonl"
    rows = [
        {"filename": f"/x/{i:05}/samples/0000.png", "tag": tag, "prompt": "a photo of a bench", "correct": i < right,
         "reason": "", "metadata": '{"tag": "x"}', "details": "{}"}
        for tag, (right, n) in counts.items()
        for i in range(n)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_overall_score_is_the_mean_of_the_task_means_and_not_of_the_images(tmp_path):
    counts = dict(zip(TASKS, [(310, 320), (150, 396), (140, 320), (300, 376), (20, 400), (24, 400)], strict=True))
    overall, *tasks = summarise(official(tmp_path, dict(reversed(counts.items()))))
    assert [task.name for task in tasks] == list(TASKS)
    assert [task.value for task in tasks] == [right / n for right, n in counts.values()]
    assert overall.value == pytest.approx(sum(right / n for right, n in counts.values()) / 6)
    assert overall.value != pytest.approx(sum(r for r, _ in counts.values()) / sum(n for _, n in counts.values()))
    assert tasks[1].how == "Wilson" and (tasks[1].low, tasks[1].high) == wilson(150, 396)
    # the mean of six is surer than each of them
    assert overall.low < overall.value < overall.high
    assert overall.high - overall.low < min(task.high - task.low for task in tasks if 0.1 < task.value < 0.9)
    assert overall.note == "" and "overall" in table([overall, *tasks])


def test_the_interval_covers_the_true_mean_of_six_tasks(tmp_path):
    rng, truth = np.random.default_rng(0), np.array([0.97, 0.4, 0.45, 0.8, 0.05, 0.06])
    covered = 0
    for _ in range(100):
        correct = rng.random((6, 30)) < truth[:, None]
        overall = figures(dict(zip(TASKS, correct.tolist(), strict=True)))[0]
        covered += overall.low <= truth.mean() <= overall.high
    assert 92 <= covered <= 99


def test_a_missing_task_is_named(tmp_path):
    overall, *_ = summarise(official(tmp_path, {"counting": (1, 2), "colors": (2, 2)}))
    assert overall.value == 0.75 and "without single_object, two_object, position, color_attr" in overall.note


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"tag": "counting", "correct": true}\n{"tag": "counting"}', "r.jsonl:2 has no 'correct'"),
        ('{"tag": "counting", "correct": 1}', "r.jsonl:1 has 1 as 'correct'"),
        ('{"correct": true}', "r.jsonl:1 has no 'tag'"),
        ("", "is empty"),
    ],
)
def test_a_bad_results_file_is_one_sentence_with_the_line(tmp_path, text, why):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        summarise(tmp_path / "r.jsonl")
    assert why in str(error.value)
