"""Alignment data: every answer follows from its prompt, what is unseen stays so, and only right answers count."""

import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import training_config

from nanochameleon.data import RawImage, digest, fuse
from nanochameleon.data.sources.alignment import CATEGORIES, REFUSAL, AlignmentSource, Exchange, program
from nanochameleon.data.sources.scenes import NUMBERS, Scene, World, draw, scenes
from nanochameleon.documents import EndOfTurn, Image, Text, render
from nanochameleon.evaluate import alignment
from nanochameleon.evaluate.captions import facts, parse_caption
from nanochameleon.packing import IGNORE, collate
from nanochameleon.presets import PRESETS
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab

WORLD = World()
RICH = World.rich()


def turns(category: str, n: int, world: World = WORLD, test: bool = False) -> list[Exchange]:
    source = AlignmentSource(world, category, 3, test)
    return [turn for i in range(n) for turn in source.exchanges(i)]


def words(exchange: Exchange) -> tuple[str, str]:
    return tuple("".join(s.text for s in side if isinstance(s, Text)) for side in (exchange.prompt, exchange.answer))


def test_questions_about_words_have_the_answer_that_counting_and_reading_give():
    kinds = Counter()
    for prompt, answer in map(words, turns("align_text", 400)):
        asked, _, rest = prompt.partition(": ")
        listed = rest.split()
        kinds[asked.split()[0], answer if asked.startswith("is ") else ""] += 1
        if asked == "say backwards":
            assert answer.split() == listed[::-1]
        elif asked.startswith("what is the"):
            assert answer == {"first": listed[0], "last": listed[-1]}[asked.split()[3]]
        elif asked == "how many words are there":
            assert answer == NUMBERS[len(listed)]
        else:
            assert answer == ("yes" if re.fullmatch(r"is (\w+) in", asked)[1] in listed else "no")
    assert set(kinds) == {("say", ""), ("what", ""), ("how", ""), ("is", "yes"), ("is", "no")}
    assert min(kinds.values()) > 30


def run_program(text: str, world: World) -> Scene | None:
    """The caption of what a program draws, by an independent interpreter."""

    def term(text: str) -> tuple[str, list]:
        name, _, inside = text.removesuffix(")").partition("(")
        parts, depth, start = [], 0, 0
        for i, letter in enumerate(inside + ","):
            depth += {"(": 1, ")": -1}.get(letter, 0)
            if letter == "," and not depth:
                parts.append(inside[start:i].strip())
                start = i + 1
        return name, parts

    def said(text: str) -> str:
        name, parts = term(text)
        if name == "put":
            return "a " + " ".join(parts)
        if name == "repeat":
            thing = said(parts[1]).removeprefix("a ")
            return f"{NUMBERS[int(parts[0])]} {thing}{'es' if thing.endswith('cross') else 's'}"
        joint = " and " if name == "all" else f" {name.replace('_', ' ')} "
        return joint.join(map(said, parts))

    name, (ground, body) = term(text)
    assert name == "on"
    return parse_caption(f"{said(body)} on {ground}", world)


@pytest.mark.parametrize("world", [WORLD, RICH])
def test_programs_say_what_their_captions_say(world):
    for scene in scenes(world, 1, 300):
        assert facts(run_program(program(scene), world)) == facts(scene)
    kinds = Counter()
    for prompt, answer in map(words, turns("align_code", 200, world)):
        asked, _, rest = prompt.partition(": ")
        if prompt.startswith("write code for "):
            assert run_program(answer, world).caption() == prompt.removeprefix("write code for ")
        elif asked == "what does this draw":
            assert run_program(rest, world).caption() == answer
        else:
            assert answer == NUMBERS[len(run_program(rest, world).things)]
        kinds[prompt.split()[0]] += 1
    assert min(kinds.values()) > 40


def test_what_is_asked_for_is_drawn():
    for exchange in turns("align_image_generation", 60):
        (scene,) = exchange.answer
        assert words(exchange)[0].endswith(" " + scene.caption())
    for exchange in turns("align_interleaved", 60):
        first, a, second, b = exchange.answer
        assert (first.text, second.text) == (a.caption(), b.caption())
        assert words(exchange)[0] == f"show {first.text}, then {second.text}"


def test_harm_is_refused_with_and_without_an_image():
    exchanges = turns("align_safety", 400)
    assert {exchange.answer for exchange in exchanges} == {(Text(REFUSAL),)}
    assert 60 < sum(isinstance(exchange.prompt[0], Scene) for exchange in exchanges) < 140
    assert len({words(exchange)[0] for exchange in exchanges}) > 150


@pytest.mark.parametrize("category", CATEGORIES)
def test_nothing_of_the_test_split_is_in_training(category):
    def shown(test: bool) -> set:
        firsts = [AlignmentSource(WORLD, category, 3, test).exchanges(i)[0] for i in range(500)]
        images = [next((s for s in (*e.prompt, *e.answer) if isinstance(s, Scene)), None) for e in firsts]
        return {words(e) if p is None else digest(draw(p, WORLD)) for e, p in zip(firsts, images, strict=True)}

    train, test = shown(False), shown(True)
    assert train.isdisjoint(test) and len(train) > 150 and len(test) > 20


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_document_is_prompts_and_answers_in_turn_of_which_only_answers_are_learnt(category):
    source = AlignmentSource(WORLD, category, 0)
    vocab = Vocab.toy(16, 60)
    tokenizer = TextTokenizer.train(source.captions(50), vocab, progress=False)
    for i in range(20):
        doc, exchanges = source.document(i), source.exchanges(i)
        assert sum(isinstance(s, EndOfTurn) for s in doc) == 2 * len(exchanges) - 1
        fused = [Image((5,) * 64) if isinstance(s, RawImage) else s for s in doc]
        ids = render(fused, tokenizer, vocab)
        targets = collate([[ids]], 2_048, vocab.pad, vocab.eot).targets
        learnt = targets[targets != IGNORE].tolist()
        expected = []
        for number, exchange in enumerate(exchanges):
            answer = [Image((5,) * 64) if isinstance(s, Scene) else s for s in exchange.answer]
            end = vocab.eos if number == len(exchanges) - 1 else vocab.eot
            expected += [*render(answer, tokenizer, vocab)[1:-1], end]
        assert learnt == expected


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_document_depends_on_seed_and_index_alone(category):
    def plain(seed: int, i: int) -> list:
        doc = AlignmentSource(WORLD, category, seed).document(i)
        return [s.pixels.tobytes() if isinstance(s, RawImage) else s for s in doc]

    forwards = [plain(0, i) for i in range(30)]
    assert [plain(0, i) for i in reversed(range(30))][::-1] == forwards
    assert [plain(1, i) for i in range(30)] != forwards


def test_the_toy_s_rows_hold_every_conversation():
    """With words of letters alone, as a tokenizer that has not seen them reads them, and its images of 64 codes."""
    cfg = PRESETS["align"]()
    tokenizer = TextTokenizer.train(AlignmentSource(WORLD, "align_code", 0).captions(400), Vocab.toy(512, 160), False)
    for category in CATEGORIES:
        for i in range(100):
            doc = AlignmentSource(WORLD, category, 0).document(i)
            fused = [Image((0,) * 64) if isinstance(s, RawImage) else s for s in doc]
            assert len(render(fused, tokenizer, tokenizer.vocab)) <= cfg.train.seq_len


# ---------------------------------------------------------------------------------------------------------------------
# Judging


SHOWN = list(scenes(WORLD, 9, 2))
IMAGES = np.stack([draw(scene, WORLD) for scene in SHOWN])
RUN = SimpleNamespace(image_tokenizer=SimpleNamespace(decode=lambda codes: IMAGES[codes[:, 0].numpy()]))
BOTH = Exchange((), (Text("a"), SHOWN[0], Text("b"), SHOWN[1]))
ZERO, ONE = Image((0,)), Image((1,))


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ([Text("a"), ZERO, Text("b"), ONE], True),
        ([Text("a"), ONE, Text("b"), ZERO], False),
        ([Text("a"), ZERO, Text("b ")], False),
        ([Text("a"), ZERO, Text("b "), ONE], False),
        ([Text("a"), ZERO, Text("b"), ONE, Text("c")], False),
        ([Text("a"), Text("b"), ZERO, ONE], False),
        ([], False),
    ],
)
def test_an_answer_is_right_when_all_of_it_is_and_nothing_else_is_there(said, right):
    assert alignment.is_correct(BOTH, said, RUN, WORLD) is right


def test_prompts_end_their_turn_and_answers_may_hold_both(monkeypatch):
    """A model that says the truth scores 1 in every category, of prompts of the test split."""
    vocab = Vocab.toy(512, 60)
    tokenizer = TextTokenizer.train(AlignmentSource(WORLD, "align_code", 0).captions(50), vocab, progress=False)
    cfg = replace(training_config(None), model=replace(training_config(None).model, max_seq_len=1_000))
    kept = {}

    class Images:
        n_codes_per_image = 1

        def encode(self, images):
            for image in images:
                kept.setdefault(image.tobytes(), (len(kept), image))
            return torch.tensor([[kept[image.tobytes()][0]] for image in images])

        def decode(self, codes):
            return np.stack([list(kept.values())[int(code)][1] for code in codes[:, 0]])

    run = SimpleNamespace(model=None, image_tokenizer=Images(), tokenizer=tokenizer, vocab=vocab, cfg=cfg)
    for category in CATEGORIES:
        source = AlignmentSource(WORLD, category, alignment.SCENE_SEED, test=True)

        def truth(model, prompts, vocab, n_codes, options, mode, seed, stops, progress, source=source):
            assert all(ids[0] == vocab.bos and ids[-1] == vocab.eot for ids in prompts)
            assert mode == "both" and options.temperature == 0 and set(stops) == {vocab.eos, vocab.eot}
            answers = [source.exchanges(i)[0].answer for i in range(len(prompts))]
            answers = [[RawImage(draw(s, WORLD)) if isinstance(s, Scene) else s for s in each] for each in answers]
            return [render(doc, tokenizer, vocab)[1:-1] + [vocab.eot] for doc in fuse(answers, run.image_tokenizer)]

        monkeypatch.setattr(alignment, "generate", truth)
        answers = alignment.answered(run, WORLD, category, 12)
        assert alignment.accuracy(answers) == 1 and all(each.exchange.for_test for each in answers)
