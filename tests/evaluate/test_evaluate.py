"""Each figure of the report is measured on a case whose value is known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TOKENIZER, VOCAB, tiny_config, tiny_model, tiny_run, training_config

from nanochameleon.config import DataConfig
from nanochameleon.data import write_images
from nanochameleon.data.sources.emoji import WHAT, WHICH, concepts, held_out_styles, prepare_emoji
from nanochameleon.data.sources.questions import ASK_CAPTION
from nanochameleon.data.sources.scenes import Scene, Thing, World, draw, scenes
from nanochameleon.documents import EndOfTurn, Image, Text, render
from nanochameleon.evaluate import report, samples, shapes
from nanochameleon.evaluate.likelihood import bits
from nanochameleon.presets import mixed
from nanochameleon.training.run import Run
from nanochameleon.weights.model_folder import open_model

WORLD = World()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return open_model(tiny_run(tmp_path_factory.mktemp("runs") / "tiny"), "cpu")


# --- likelihood ------------------------------------------------------------------------------------------------------


def documents(n: int) -> list[list[int]]:
    """Return documents of an image with random codes and a text that grows with i."""
    codes = np.random.default_rng(0).integers(0, 8, (n, 4)).tolist()
    return [render([Image(tuple(codes[i])), Text("réd " * (i + 1))], TOKENIZER, VOCAB) for i in range(n)]


@pytest.mark.parametrize("context", [64, 24])
def test_a_model_that_knows_nothing_needs_log_v_bits_a_code_and_an_id(run, context):
    """Texts that do not fit in the context count neither as tokens nor as bytes."""
    untrained = tiny_model(max_seq_len=context)
    torch.nn.init.zeros_(untrained.output.weight)
    lists = documents(5)
    kept = [i for i in range(5) if len(lists[i]) <= context]
    assert len(kept) == (5 if context == 64 else 3)
    measured = bits(replace(run, model=untrained, cfg=tiny_config(model=untrained.cfg)), documents(5), batch_size=2)
    assert measured["bits_per_code"] == pytest.approx(math.log2(VOCAB.size), rel=1e-5)
    n_text = sum(len(lists[i]) - 1 - 4 for i in kept)  # no target is <s> or one of the 4 codes
    n_bytes = sum(len("réd ".encode()) * (i + 1) for i in kept)
    assert measured["bits_per_byte"] == pytest.approx(math.log2(VOCAB.size) * n_text / n_bytes, rel=1e-5)


def test_of_a_run_that_learns_answers_alone_their_bits_and_bytes_count(run):
    untrained = tiny_model()
    torch.nn.init.zeros_(untrained.output.weight)
    talk = [Text("red"), EndOfTurn(), Text("a réd"), EndOfTurn(), Text("?"), EndOfTurn(), Image((1,) * 4)]
    cfg = tiny_config(model=untrained.cfg)
    cfg = replace(cfg, train=replace(cfg.train, assistant_only_loss=True))
    measured = bits(replace(run, model=untrained, cfg=cfg), [render(talk, TOKENIZER, VOCAB)])
    n_text = len(TOKENIZER.encode("a réd")) + 1 + 3  # the end of the turn, the image's begin and end, </s>
    assert measured["bits_per_byte"] == pytest.approx(math.log2(VOCAB.size) * n_text / len("a réd".encode()), rel=1e-5)
    assert measured["bits_per_code"] == pytest.approx(math.log2(VOCAB.size), rel=1e-5)


def test_what_nothing_was_counted_for_is_unknown_not_0(run):
    short = tiny_model(max_seq_len=4)  # no document fits
    measured = bits(replace(run, model=short, cfg=tiny_config(model=short.cfg)), documents(3))
    assert measured == {"bits_per_code": None, "bits_per_byte": None}


def test_bits_do_not_depend_on_how_documents_are_batched(run):
    first, second = bits(run, documents(6), batch_size=1), bits(run, documents(6), batch_size=16)
    assert first == pytest.approx(second, rel=1e-5) and first["bits_per_code"] > 3


# --- images --------------------------------------------------------------------------------------------------------


def test_the_mean_of_facts_counts_each_fact_among_the_scenes_that_have_it():
    judged = [
        {"count": True, "relation": True, "all_facts": True},
        {"count": True, "relation": False, "all_facts": False},
        {"count": True, "all_facts": False},
        {"count": False, "all_facts": False},
    ]
    assert shapes.mean_facts(judged) == {"all_facts": 0.25, "by_fact": {"count": 0.75, "relation": 0.5}}


class Ideal:
    """An image tokenizer for tests: the code is the number of the image; decode(codes) gives `shown` images."""

    def __init__(self, shown=None):
        self.shown, self.vqgan = shown, type("VQGAN", (), {"cfg": training_config(None).vqgan})

    def encode(self, images):
        self.shown = images if self.shown is None else self.shown
        return torch.arange(len(images))[:, None] % 8

    def decode(self, codes):
        return self.shown


def test_the_tokenizers_score_is_the_oracles_on_clean_images_and_on_what_comes_back():
    ideal, blank = Ideal(), Ideal(np.full((12, 32, 32, 3), 255, np.uint8))
    scores = shapes.tokenizer_scores(ideal, WORLD, 12)
    assert scores == {
        "oracle_on_clean": 1,
        "oracle_on_reconstructions": 1,
        "codebook_used": 0.5,
        "mean_absolute_error": 0,
    }
    scores = shapes.tokenizer_scores(blank, WORLD, 12)
    assert (scores["oracle_on_clean"], scores["oracle_on_reconstructions"]) == (1, 0)
    assert scores["mean_absolute_error"] == pytest.approx(np.mean(255 - ideal.shown.astype(float)) / 255)


@pytest.mark.parametrize("compositions", ["seen", "held_out"])
def test_images_of_the_truth_score_1_and_others_what_is_right_in_them(compositions, monkeypatch):
    config = type("Run", (), {"cfg": tiny_config()})
    asked = []

    def draws(mistake):
        def draw_images(run, captions, seed, progress=None):
            asked.extend(captions)
            wanted = scenes(WORLD, shapes.SCENE_SEED, len(captions), compositions, test=True)
            return np.stack([draw(mistake(scene), WORLD) for scene in wanted])

        monkeypatch.setattr(shapes, "draw_images", draw_images)
        return shapes.text_to_image(config, WORLD, compositions, 12)

    other = {"white": "black", "black": "white"}
    scores, drawn = draws(lambda scene: scene)
    assert scores["all_facts"] == 1 and set(scores["by_fact"].values()) == {1}
    assert asked == [d.scene.caption() for d in drawn] and all(d.scene.for_test for d in drawn)
    assert all(bool(d.scene.compositions & WORLD.held_out) == (compositions == "held_out") for d in drawn)
    scores, _ = draws(lambda scene: replace(scene, background=other[scene.background]))
    assert scores["all_facts"] == 0 == scores["by_fact"]["background"] and scores["by_fact"]["shapes"] == 1


def test_the_model_draws_whole_images_the_same_for_the_same_seed(run):
    captions = ["red", "a tar", "dare"]
    first, again, other = (shapes.draw_images(run, captions, seed) for seed in (0, 0, 1))
    assert first.shape == (3, 4, 4, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_second_image_follows_a_caption_its_image_and_another_caption(run, monkeypatch):
    """The model must see all three, and its drawing is judged by the second caption."""
    wanted = list(scenes(WORLD, shapes.SCENE_SEED + 5, 6, test=True))
    first = list(scenes(WORLD, shapes.SCENE_SEED + 4, 6, test=True))
    prompts = []
    monkeypatch.setattr(shapes, "prompt_tokens", lambda segments, run, ask: prompts.append((segments, ask)) or [0])
    monkeypatch.setattr(shapes, "draw_from", lambda run, ids, *rest: np.stack([draw(s, WORLD) for s in wanted]))
    scores, drawn = shapes.second_image(run, WORLD, 6)
    assert scores["all_facts"] == 1 and [d.scene for d in drawn] == wanted
    for (segments, ask), a, b in zip(prompts, first, wanted, strict=True):
        caption, image, second = segments
        assert (caption.text, second.text, ask) == (a.caption(), b.caption(), "draw")
        assert np.array_equal(image.pixels, draw(a, WORLD))


def test_where_two_images_have_no_room_nothing_is_claimed(run, monkeypatch):
    monkeypatch.setattr(shapes, "prompt_tokens", lambda segments, run, ask: [0] * 59)  # of 64, and an image takes 6
    assert shapes.second_image(run, WORLD, 3) == (None, [])
    assert shapes.has_room(run, [0] * 58) and not shapes.has_room(run, [0] * 59)


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_model_answers_each_question_or_continues_after_an_image(run):
    images = [np.full((4, 4, 3), shade, np.uint8) for shade in (0, 100, 255)]
    asked = [(image, question) for image in images for question in ("red?", "")]
    said = shapes.ask(run, asked)
    assert len(said) == 6 and all(isinstance(text, str) for text in said) and len(set(said)) > 1
    assert [shapes.ask(run, [one])[0] for one in asked] == said


def test_captions_score_1_for_the_truth_0_for_nonsense_and_are_of_unseen_scenes(monkeypatch):
    shown = list(scenes(WORLD, shapes.SCENE_SEED + 1, 10, test=True))

    def says(words):
        def ask(run, asked, progress=None):
            assert all(
                np.array_equal(p, draw(s, WORLD)) and q == ASK_CAPTION for (p, q), s in zip(asked, shown, strict=True)
            )
            return [words(scene) for scene in shown]

        monkeypatch.setattr(shapes, "ask", ask)
        return shapes.caption_facts(None, WORLD, 10)

    score, answers = says(Scene.caption)
    assert score == 1 and [a.said for a in answers] == [a.truth for a in answers]
    assert says(lambda scene: "nonsense")[0] == 0
    assert 0 < says(lambda scene: scene.caption(with_background=False))[0] < 1


def test_answers_must_be_exact_and_guesses_without_a_look_are_worth_little(monkeypatch):
    monkeypatch.setattr(shapes, "ask", lambda run, asked, progress=None: ["yes"] * len(asked))
    accuracy, answers = shapes.question_accuracy(None, WORLD, 300)
    truths = [answer.truth for answer in answers]
    assert accuracy == truths.count("yes") / 300 < 0.3 and len({a.question for a in answers}) > 40
    monkeypatch.setattr(shapes, "ask", lambda run, asked, progress=None: truths)
    assert shapes.question_accuracy(None, WORLD, 300)[0] == 1
    monkeypatch.setattr(shapes, "ask", lambda run, asked, progress=None: [truth + " " for truth in truths])
    assert shapes.question_accuracy(None, WORLD, 300)[0] == 0
    assert 0.2 < shapes.question_only(WORLD, answers, 1_500) < 0.5


def test_a_guess_is_the_commonest_answer_to_the_same_words():
    things = (Thing("big", "red", "circle"),)
    scene = Scene("white", things, ((0, 0),))
    common = shapes.Answer(scene, "how many things are there?", "one", "")  # pairs are the commoner half: "two"
    unheard = shapes.Answer(scene, "why?", "because", "")
    twos = [replace(common, truth="two")] * 3
    assert shapes.question_only(WORLD, [common, unheard, *twos], 300) == 3 / 5


# --- the report ------------------------------------------------------------------------------------------------------


def test_speed_is_all_tokens_over_all_seconds_and_absent_without_a_log(tmp_path):
    assert report.training_speed(tmp_path) == {}
    lines = [
        {"step": 0, "tokens": 5, "seconds": 0.0},
        {"step": 1, "tokens": 300, "seconds": 1.5},
        {"step": 2, "seconds": 9},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.training_speed(tmp_path) == {"tokens_per_second": 200}


def test_peak_memory_is_in_gib():
    block = np.ones(2**28 // 8)  # 0.25 GiB
    assert 0.25 < report.peak_memory_gib() < 64 and block[-1] == 1


@pytest.mark.parametrize("questions", [0.2, 0.0])
def test_emoji_are_asked_about_in_the_words_of_their_training_and_of_the_test_split(questions, run, tmp_path):
    both = [{"emoji": text, "style": style} for text in concepts() for style in ("flat", "outlined")]
    chosen = list(held_out_styles(both))[:4]
    names = {text: name for text, name in concepts().items() if text in chosen}
    prepare_emoji(tmp_path / "images", 4, names)
    stages = mixed(pairs=0.8, questions=questions) if questions else mixed(pairs=1.0)
    asking = replace(run, cfg=tiny_config(data=DataConfig("emoji"), stages=stages))
    talks = report.asked_about(asking, Path(tmp_path), 3)
    assert len(talks) == 3 and all(talk["image"].shape == (4, 4, 3) for talk in talks)
    for talk in talks:
        if questions:
            assert talk["truth"] in {WHAT: names.values(), WHICH: ("flat", "outlined")}[talk["question"]]
        else:
            assert talk["question"] == "" and talk["truth"].split(" emoji of ")[1] in names.values()


def test_captions_too_long_for_an_image_are_not_drawn_and_what_needs_an_oracle_is_null(run, tmp_path):
    """One such caption in a folder must not end a run; where all are, the sheet is empty."""
    config = tiny_config(data=DataConfig("folder"), stages=mixed(pairs=1.0))
    shown = Run(config, run.vocab, run.tokenizer, run.image_tokenizer, run.model)
    for name, texts in {"some": ["red", "ta " * 90], "all": ["ta " * 90] * 2}.items():
        items = [{"file": str(i), "captions": [text], "folder": "test", "luck": i} for i, text in enumerate(texts)]
        items.append({"file": "x", "captions": ["a"], "folder": "x", "luck": 9})
        pixels = np.random.default_rng(0).integers(0, 256, (len(items), 4, 4, 3), np.uint8)
        (tmp_path / name / "images").mkdir(parents=True)
        write_images(tmp_path / name / "images", zip(pixels, items, strict=True), 4)
        figures, sheet, talks = report.images_report(shown, tmp_path / name)
        assert [caption for caption, _, _ in sheet] == (["red"] if name == "some" else []) and len(talks) == 2
        samples.write_sample_sheet(shown, tmp_path / name / "samples" / "step-000001.png")
        unknown = [name for name in ("text_to_image", "interleaved", "captions", "questions") if figures[name] is None]
        assert len(unknown) == 4 and figures["tokenizer"]["oracle_on_clean"] is None
        assert 0 < figures["tokenizer"]["mean_absolute_error"] < 1
