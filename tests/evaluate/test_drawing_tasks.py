"""The tasks shapes_geneval and shapes_alignment: what they ask, save and score; the alignment rule over JSON."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage
from tiny import SHAPES_VQGAN, TINY_MODEL, TOKENIZER, tiny_config, tiny_model

from nanochameleon.config import SamplingParams
from nanochameleon.data.sources.alignment import CATEGORIES, REFUSAL, AlignmentSource, Exchange
from nanochameleon.data.sources.scenes import World, draw, draw_scene
from nanochameleon.documents import EndOfTurn, Image, Text, render
from nanochameleon.errors import UserError
from nanochameleon.evaluate import alignment
from nanochameleon.evaluate.drawing import shapes_alignment, shapes_geneval
from nanochameleon.evaluate.drawing.readings import to_json
from nanochameleon.evaluate.oracle import read
from nanochameleon.evaluate.shapes import SCENE_SEED
from nanochameleon.evaluate.task import Line, Options
from nanochameleon.images.tokenizer import NO_DECODER, ImageTokenizer
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training.run import Run
from nanochameleon.vocab import Vocab

WORLD = World()


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    with use_kernels("reference"):
        yield


@pytest.fixture(scope="module")
def run() -> Run:
    """A random model of the size of the shapes world."""
    vocab = Vocab.toy(SHAPES_VQGAN.n_codes, 4)
    model = dataclasses.replace(TINY_MODEL, vocab_size=vocab.size, max_seq_len=360)
    cfg = tiny_config(vqgan=SHAPES_VQGAN, model=model, sample=SamplingParams(guidance_scale=1, image_guidance_scale=1))
    transformer = tiny_model(vocab_size=vocab.size, max_seq_len=360)
    transformer.output.weight.data.mul_(0.2)
    torch.manual_seed(0)
    vqgan = VQGAN(SHAPES_VQGAN)
    torch.nn.init.normal_(vqgan.quantize.embedding.weight, std=3.0)
    return Run(cfg, vocab, TextTokenizer(TOKENIZER.merges, vocab), ImageTokenizer(vqgan), transformer)


# ---------------------------------------------------------------------------------------------------------------------
# shapes_geneval


def test_images_are_saved_as_geneval_has_them_and_judged_by_what_they_show(run, tmp_path):
    options = Options(world=WORLD, samples=2, limit=6, out=tmp_path)
    items = shapes_geneval.read(options)
    answers = shapes_geneval.answer(run, items, options)
    assert len(answers) == 6
    for item, answer in zip(items, answers, strict=True):
        image = np.asarray(PillowImage.open(tmp_path / "shapes_geneval" / answer.output["image"]))
        assert image.shape == (32, 32, 3)
        assert answer.output["drawn"] == to_json(read(image, WORLD))
        line = tmp_path / "shapes_geneval" / answer.output["image"].split("/")[0] / "metadata.jsonl"
        assert line.read_text() == item.content["line"] + "\n"
        assert json.loads(item.content["line"])["prompt"] == item.content["prompt"]
        _, metrics = shapes_geneval.score(item.content, answer.output)
        assert set(metrics) == {"correct", "clean", "reconstructed"} and metrics["clean"] == 1


def test_an_answer_depends_on_its_item_and_the_seed_alone(run, tmp_path):
    options = Options(world=WORLD, limit=6, out=tmp_path / "a")
    items = shapes_geneval.read(options)
    together = shapes_geneval.answer(run, items, options)
    apart = [shapes_geneval.answer(run, [item], options)[0] for item in reversed(items)]
    assert together == apart[::-1]
    files = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*.png")}
    shapes_geneval.answer(run, items, dataclasses.replace(options, seed=1, out=tmp_path / "b"))
    assert len(files) == 6 and any((tmp_path / "b" / name).read_bytes() != data for name, data in files.items())


def test_a_prompt_without_room_for_an_image_is_a_problem_and_the_others_are_drawn(run, tmp_path):
    options = Options(world=WORLD, limit=4, out=tmp_path)
    items = shapes_geneval.read(options)
    items[1] = dataclasses.replace(items[1], content=items[1].content | {"prompt": "x" * 400})
    answers = shapes_geneval.answer(run, items, options)
    assert ["problem" in answer.output for answer in answers] == [False, True, False, False]
    assert "context of 360" in answers[1].output["problem"]


@pytest.mark.parametrize("task", [shapes_geneval, shapes_alignment])
def test_a_model_without_image_decoder_is_refused(run, tmp_path, task, monkeypatch):
    monkeypatch.setattr(ImageTokenizer, "can_draw", property(lambda _: False))
    options = Options(world=WORLD, limit=1, out=tmp_path)
    with pytest.raises(UserError) as error:
        task.answer(run, task.read(options), options)
    assert str(error.value) == NO_DECODER


# ---------------------------------------------------------------------------------------------------------------------
# shapes_alignment


def test_the_requests_are_those_of_the_test_split_and_take_turns():
    items = shapes_alignment.read(Options(world=WORLD))
    assert len(items) == 600 and [item.group for item in items[:12]] == [*CATEGORIES, *CATEGORIES]
    assert items[:20] == shapes_alignment.read(Options(world=WORLD, limit=20))
    for item in items[:60]:
        number = int(item.id.rpartition("-")[2])
        exchange = AlignmentSource(WORLD, item.group, SCENE_SEED, test=True).exchanges(number)[0]
        assert shapes_alignment.segments_of(item.content["prompt"]) == exchange.prompt
        assert shapes_alignment.segments_of(item.content["answer"]) == exchange.answer


SCENES = st.builds(lambda i: draw_scene(WORLD, 0, i), st.integers(0, 6))
WORDS = st.sampled_from(["yes", "no", REFUSAL]).map(Text)


class Exact:
    """An image tokenizer whose only code is the number of a scene."""

    def decode(self, codes):
        return np.stack([draw(draw_scene(WORLD, 0, int(code[0])), WORLD) for code in codes])


@given(st.lists(WORDS | SCENES, max_size=3), st.data())
def test_the_rule_is_the_one_of_the_report(wanted, data):
    """Any answer, most of them a copy of the expected one with one segment changed, added or removed."""
    numbers = {draw_scene(WORLD, 0, i): i for i in range(7)}
    said = [s if isinstance(s, Text) else Image((numbers[s],)) for s in wanted]
    other = data.draw(WORDS | st.builds(lambda i: Image((i,)), st.integers(0, 6)))
    place, cut = data.draw(st.integers(0, len(said))), data.draw(st.integers(0, 1))
    said = data.draw(st.sampled_from([said, said[:place] + [other] + said[place + cut :], said[:-1]]))
    as_json = [
        {"text": s.text} if isinstance(s, Text) else {"reading": to_json(read(Exact().decode([s.codes])[0], WORLD))}
        for s in said
    ]
    exchange = Exchange((Text("?"),), tuple(wanted))
    run = Run(*[None] * 3, image_tokenizer=Exact(), model=None)
    expected = alignment.is_correct(exchange, said, run, WORLD)
    content = {"answer": json.loads(json.dumps(shapes_alignment.segments_json(wanted)))}
    assert shapes_alignment.is_correct(content["answer"], json.loads(json.dumps(as_json))) == expected


def test_answers_are_independent_and_their_truth_is_scored(run, tmp_path):
    options = Options(world=WORLD, limit=2, out=tmp_path)
    short = dataclasses.replace(run, model=tiny_model(vocab_size=run.vocab.size, max_seq_len=130))
    items = shapes_alignment.read(options)
    together = shapes_alignment.answer(short, items, options)
    assert together == [shapes_alignment.answer(short, [item], options)[0] for item in items]
    for item, answer in zip(items, together, strict=True):
        said, metrics = shapes_alignment.score(item.content, answer.output)
        assert len(said) == len(answer.output["said"])
        assert (metrics["ceiling"], metrics["refusing"]) == (1, 0)  # texts alone


def test_what_was_said_is_kept_in_order_and_its_images_are_saved(run, tmp_path, monkeypatch):
    """The model answers with a text, an image, another text and the end of its turn."""
    said = [Text("red"), Image((3,) * run.image_tokenizer.n_codes_per_image), Text("star"), EndOfTurn()]
    tokens = render(said, run.tokenizer, run.vocab, end=False)[1:]
    monkeypatch.setattr(shapes_alignment, "generate_each", lambda run, prompts, *_: [(i, tokens) for i in range(6)])
    options = Options(world=WORLD, limit=6, out=tmp_path)
    items = shapes_alignment.read(options)
    for item, answer in zip(items, shapes_alignment.answer(run, items, options), strict=True):
        first, second, third = answer.output["said"]
        assert (first, third) == ({"text": "red"}, {"text": "star"})
        image = np.asarray(PillowImage.open(tmp_path / "shapes_alignment" / second["image"]))
        assert second["reading"] == to_json(read(image, WORLD))
        assert shapes_alignment.score(item.content, answer.output)[0] == ["red", "<image>", "star"]
    assert len({path for path in tmp_path.rglob("*.png")}) == 6


def test_refusing_everything_does_not_win():
    refusals = {"said": [{"text": REFUSAL}], "truth": []}
    lines = []
    for item in shapes_alignment.read(Options(world=WORLD, limit=60)):
        found, metrics = shapes_alignment.score(item.content, refusals)
        lines.append(Line(item.id, item.group, item.content, refusals, found, metrics))
    rows = {row.name: row for row in shapes_alignment.figures(lines)}
    assert rows["correct"].value == rows["correct"].baseline == pytest.approx(1 / 6)
    assert rows["correct, align_safety"].value == 1 and rows["correct, align_text"].baseline == 0
    assert list(rows) == ["correct", *(f"correct, {name}" for name in CATEGORIES)]
