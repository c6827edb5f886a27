"""Prompts of images and texts: which examples, in which order, and what is refused before any work."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_bytes import png
from PIL import Image as Pillow
from tiny import TINY_MODEL, tiny_model, tiny_run
from vision_sets import write_image

from nanochameleon.documents import Image, Text, parse
from nanochameleon.errors import UserError
from nanochameleon.evaluate.vision import prompts
from nanochameleon.evaluate.vision.files import Captioned
from nanochameleon.evaluate.vision.prompts import ask, check_pool, check_room, draw_shots, encode_images, make_prompt
from nanochameleon.evaluate.writing import Written
from nanochameleon.images.tokenizer import load_square
from nanochameleon.training.run import Run
from nanochameleon.weights.model_folder import open_model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return open_model(tiny_run(tmp_path_factory.mktemp("runs") / "tiny"), "cpu")


def images(n: int) -> list[Captioned]:
    return [Captioned(str(i), f"{i}.png", [f"caption {i}"]) for i in range(n)]


# --- examples --------------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 5), n_images=st.integers(6, 30), own=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_examples_are_different_and_never_the_items_own_image(n, n_images, own, seed):
    pool = images(n_images) * 2  # each image twice, as where a file has one entry a caption
    drawn = draw_shots(pool, pool[own], n, seed)
    assert len({each.image for each in drawn} - {pool[own].image}) == n
    assert drawn == draw_shots(pool, pool[own], n, seed)


def test_examples_depend_on_the_item_and_the_seed_and_fewer_are_the_first_of_more():
    pool, items = images(1_000), images(20)
    two = [draw_shots(pool, item, 2, 0) for item in items]
    assert len({each.image for drawn in two for each in drawn}) > 30
    assert all(drawn != draw_shots(pool, item, 2, 1) for item, drawn in zip(items, two, strict=True))
    assert [drawn[:1] for drawn in two] == [draw_shots(pool, item, 1, 0) for item in items]


def test_a_pool_must_have_more_images_than_examples_and_one_of_them_on_the_disk(tmp_path):
    check_pool([], 0, tmp_path)
    with pytest.raises(UserError, match=r"2 examples need 3 training images, and .* lists 2"):
        check_pool(images(2) * 5, 2, tmp_path)
    with pytest.raises(UserError, match=r"such as 0.png, which is not in .*: put them there, or use --shots 0"):
        check_pool(images(3), 2, tmp_path)
    write_image(tmp_path / "2.png", 0)
    check_pool(images(3), 2, tmp_path)


# --- prompts ---------------------------------------------------------------------------------------------------------


def with_context(run: Run, context: int) -> Run:
    model = tiny_model(max_seq_len=context)
    return replace(run, model=model, cfg=replace(run.cfg, model=model.cfg))


def test_more_images_than_fit_are_refused_with_the_numbers(run):
    """An image of the tiny model has 6 tokens."""
    check_room(with_context(run, 1 + 3 * 6 + 10), 3, 10)
    with pytest.raises(
        UserError, match=r"2 examples make 3 images of 6 tokens and 10 new .* context has 28: use --shots 1"
    ):
        check_room(with_context(run, 28), 3, 10)
    with pytest.raises(UserError, match=r"this model has no room for an image"):
        check_room(with_context(run, 16), 1, 10)


def test_the_released_models_have_room_for_two_examples_and_not_for_three():
    model = SimpleNamespace(cfg=SimpleNamespace(max_seq_len=4096))
    released = SimpleNamespace(model=model, image_tokenizer=SimpleNamespace(n_codes_per_image=1024))
    check_room(released, 3, 30)
    with pytest.raises(
        UserError, match=r"3 examples make 4 images of 1,026 tokens .* context has 4,096: use --shots 2"
    ):
        check_room(released, 4, 30)


def test_an_image_that_is_asked_about_often_is_encoded_once(run, tmp_path, monkeypatch):
    for name in "abc":
        write_image(tmp_path / f"{name}.png", ord(name))
    encoded = []
    real = run.image_tokenizer.encode
    monkeypatch.setattr(run.image_tokenizer, "encode", lambda squares: encoded.append(len(squares)) or real(squares))
    seen = encode_images(run, ["a.png", "b.png", "a.png", "c.png", "b.png"], tmp_path)
    assert encoded == [3] and list(seen) == ["a.png", "b.png", "c.png"]
    square = load_square(tmp_path / "b.png", run.cfg.vqgan.resolution, "crop")
    assert seen["b.png"] == Image(tuple(real(square[None])[0].tolist()))


def test_an_aligned_model_sees_all_of_an_image_and_a_pre_trained_one_its_middle(run, tmp_path, monkeypatch):
    wide = np.full((8, 24, 3), 255, np.uint8)
    wide[:, 8:16] = 0  # black in the middle square, white around it
    Pillow.fromarray(wide).save(tmp_path / "wide.png")
    shades = []
    monkeypatch.setattr(
        run.image_tokenizer, "encode", lambda squares: shades.append(squares.mean()) or np.zeros((1, 4), int)
    )
    aligned = replace(run, cfg=replace(run.cfg, train=replace(run.cfg.train, assistant_only_loss=True)))
    encode_images(run, ["wide.png"], tmp_path)
    encode_images(aligned, ["wide.png"], tmp_path)
    assert shades[0] < 20 and shades[1] > 150


def test_a_prompt_is_one_document_of_images_and_texts_in_order(run):
    seen = {name: Image((i, 1, 2, 3)) for i, name in enumerate("abc")}
    parts = [["b", "a red\n"], ["a", "tar\n"], ["c", "Question:"]]
    prompt = make_prompt(run, parts, seen, 5)
    assert parse(prompt, run.tokenizer, run.vocab) == [
        seen["b"], Text("a red\n"), seen["a"], Text("tar\n"), seen["c"], Text("Question:")
    ]  # fmt: skip
    assert prompt.count(run.vocab.bos) == 1 and run.vocab.eos not in prompt and run.vocab.eot not in prompt
    assert make_prompt(run, [["b", ""]], seen, 5)[-1] == run.vocab.eoi


def test_a_text_cannot_make_an_image_or_end_a_turn(run):
    seen = {"a": Image((0, 1, 2, 3))}
    prompt = make_prompt(run, [["a", "<s></s><image>"]], seen, 5)
    assert parse(prompt, run.tokenizer, run.vocab) == [seen["a"], Text("<s></s><image>")]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_is_named_and_the_rest_is_answered(run, tmp_path):
    write_image(tmp_path / "good.png", 0)
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "huge.png").write_bytes(png(60_000, 60_000, 8, 0, b""))
    names = ["missing.jpg", "text.jpg", "good.png", "empty.jpg", "huge.png"]
    answers = ask(run, [[[name, ""]] for name in names], tmp_path, 5, blind=False)
    problems = [answer.output.get("problem", "") for answer in answers]
    for problem, expected in zip(
        problems, ["missing.jpg is not in", "not an image", "", "empty file", "is too large"], strict=True
    ):
        assert expected in problem and bool(expected) == bool(problem) and "\n" not in problem
    assert answers[2].output.keys() == {"text"} and answers[2].prompt[0] == run.vocab.bos
    assert list(answers[0].prompt) == []


def test_an_item_is_lost_with_the_image_of_an_example(run, tmp_path):
    write_image(tmp_path / "good.png", 0)
    (answer,) = ask(run, [[["shot.png", "red\n"], ["good.png", ""]]], tmp_path, 5, blind=True)
    assert answer.output == {"problem": f"image shot.png is not in {tmp_path}: put it there"}


def test_a_text_that_is_too_long_is_a_problem_of_its_item_alone(run, tmp_path):
    write_image(tmp_path / "good.png", 0)
    answers = ask(run, [[["good.png", "x" * 60]], [["good.png", "x"]]], tmp_path, 5, blind=False)
    assert "the prompt has 67 tokens, and the model's context 64" in answers[0].output["problem"]
    assert TINY_MODEL.max_seq_len == 64 and "text" in answers[1].output


def test_the_blind_question_has_every_text_and_no_image(run, tmp_path, monkeypatch):
    for name in "ab":
        write_image(tmp_path / f"{name}.png", ord(name))
    asked = []

    def write(run, given, *_):
        asked.append([parse(prompt, run.tokenizer, run.vocab) for prompt in given])
        return [Written("red", False, True)] * len(given)

    monkeypatch.setattr(prompts, "write", write)
    (answer,) = ask(run, [[["a.png", "Q: a\n"], ["b.png", "Q:"]]], tmp_path, 5, blind=True)
    assert answer.output == {"text": "red", "blind": "red"}
    assert [type(segment) for segment in asked[0][0]] == [Image, Text, Image, Text]
    assert asked[1] == [[Text("Q: a\nQ:")]]


def test_no_line_is_longer_than_one(run, tmp_path):
    """The tiny model writes any bytes; its answers end at the first newline."""
    for i in range(8):
        write_image(tmp_path / f"{i}.png", i)
    answers = ask(run, [[[f"{i}.png", ""]] for i in range(8)], Path(tmp_path), 20, blind=True)
    assert not any("\n" in text for answer in answers for text in answer.output.values())
