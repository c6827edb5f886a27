"""Measure what a model knows of the shapes world: images drawn from text, captions and answers about new images.

Every scene is of the test split. Prompts name the background, so that it can be judged.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from nanochameleon.data import RawImage
from nanochameleon.data.sources.questions import ASK_CAPTION, questions
from nanochameleon.data.sources.scenes import Scene, World, draw, scenes
from nanochameleon.documents import Text, parse
from nanochameleon.evaluate.captions import score_caption
from nanochameleon.evaluate.oracle import judge
from nanochameleon.generation.engine import generate
from nanochameleon.generation.prompts import prompt_tokens
from nanochameleon.images.tokenizer import ImageTokenizer
from nanochameleon.training.run import Run

SCENE_SEED = 7_777  # of the scenes in prompts


@dataclass(frozen=True)
class Drawn:
    scene: Scene
    image: np.ndarray  # uint8 (R, R, 3)
    facts: dict[str, bool]  # by the oracle


@dataclass(frozen=True)
class Answer:
    scene: Scene
    question: str
    truth: str
    said: str


def mean_facts(judged: list[dict[str, bool]]) -> dict:
    """Return {"all_facts": accuracy, "by_fact": {fact: accuracy over the scenes that have it}}."""
    names = sorted({name for facts in judged for name in facts} - {"all_facts"})
    by_fact = {name: float(np.mean([facts[name] for facts in judged if name in facts])) for name in names}
    return {"all_facts": float(np.mean([facts["all_facts"] for facts in judged])), "by_fact": by_fact}


def tokenizer_scores(image_tokenizer: ImageTokenizer, world: World, n: int) -> dict:
    """Measure the oracle on clean images (its ceiling) and on reconstructions, and how much of the codebook is used."""
    shown = list(scenes(world, SCENE_SEED, n, test=True))
    clean = np.stack([draw(scene, world) for scene in shown])
    codes = image_tokenizer.encode(clean)
    again = image_tokenizer.decode(codes)
    right = [[judge(s, p, world)["all_facts"] for s, p in zip(shown, images, strict=True)] for images in (clean, again)]
    return {
        "oracle_on_clean": float(np.mean(right[0])),
        "oracle_on_reconstructions": float(np.mean(right[1])),
        "codebook_used": len(torch.unique(codes)) / image_tokenizer.vqgan.cfg.n_codes,
        "mean_absolute_error": float(np.abs(clean.astype(int) - again).mean()) / 255,
    }


def draw_images(run: Run, captions: list[str], seed: int, progress: str | None = None) -> np.ndarray:
    """Draw one image per caption: uint8 (n, R, R, 3)."""
    return draw_from(run, [prompt_tokens([Text(caption)], run, "draw") for caption in captions], seed, progress)


def has_room(run: Run, prompt: list[int]) -> bool:
    """Does an image fit in the context after this prompt, with <eoi> and </s>, as in training?"""
    return len(prompt) + run.image_tokenizer.n_codes_per_image + 2 <= run.cfg.model.max_seq_len


def draw_from(run: Run, prompts: list[list[int]], seed: int, progress: str | None = None) -> np.ndarray:
    """Draw one image per prompt, each of which ends in <boi>: uint8 (n, R, R, 3)."""
    n_codes, side = run.image_tokenizer.n_codes_per_image, run.cfg.vqgan.resolution
    if not prompts:
        return np.empty((0, side, side, 3), np.uint8)
    options = replace(run.cfg.sample, max_new_tokens=n_codes + 2)
    rows = generate(run.model, prompts, run.vocab, n_codes, options, "image", seed, progress=progress)
    return run.image_tokenizer.decode(torch.tensor([row[:n_codes] for row in rows]) - run.vocab.first_code)


def text_to_image(run: Run, world: World, compositions: str, n: int) -> tuple[dict, list[Drawn]]:
    """Draw n scenes from their captions and judge them by the oracle. Returns scores and what was drawn."""
    wanted = list(scenes(world, SCENE_SEED, n, compositions, test=True))
    images = draw_images(run, [s.caption() for s in wanted], run.cfg.seed, f"drawing {compositions}")
    drawn = [Drawn(s, p, judge(s, p, world)) for s, p in zip(wanted, images, strict=True)]
    return mean_facts([d.facts for d in drawn]), drawn


def second_image(run: Run, world: World, n: int) -> tuple[dict | None, list[Drawn]]:
    """Draw the end of interleaved documents: caption, image, another caption -> its image, judged by the oracle.

    Returns scores and what was drawn. The scores are None where the context has no room for two images.
    """
    first, second = (list(scenes(world, SCENE_SEED + k, n, test=True)) for k in (4, 5))
    prompts = [
        prompt_tokens([Text(a.caption()), RawImage(draw(a, world)), Text(b.caption())], run, "draw")
        for a, b in zip(first, second, strict=True)
    ]
    kept = [i for i in range(n) if has_room(run, prompts[i])]
    images = draw_from(run, [prompts[i] for i in kept], run.cfg.seed, "drawing interleaved")
    wanted = [second[i] for i in kept]
    drawn = [Drawn(s, p, judge(s, p, world)) for s, p in zip(wanted, images, strict=True)]
    return mean_facts([d.facts for d in drawn]) if drawn else None, drawn


def ask(run: Run, asked: list[tuple[np.ndarray, str]], progress: str | None = None) -> list[str]:
    """Return the model's greedy answer to each (image, question). For the question "", it continues after the image."""
    n_codes, vocab = run.image_tokenizer.n_codes_per_image, run.vocab
    prompts = []
    for image, question in asked:
        segments = [RawImage(image), Text(question)] if question else [RawImage(image)]
        prompts.append(prompt_tokens(segments, run, "answer" if question else "text"))
    options = replace(run.cfg.sample, temperature=0.0, max_new_tokens=40)
    stops = (vocab.eos, vocab.eot)
    rows = generate(run.model, prompts, vocab, n_codes, options, "text", stops=stops, progress=progress)
    return ["".join(s.text for s in parse(row, run.tokenizer, vocab) if isinstance(s, Text)) for row in rows]


def caption_facts(run: Run, world: World, n: int) -> tuple[float, list[Answer]]:
    """Measure the mean fraction of facts that captions of unseen scenes state correctly."""
    shown = list(scenes(world, SCENE_SEED + 1, n, test=True))
    said = ask(run, [(draw(scene, world), ASK_CAPTION) for scene in shown], "captions")
    answers = [Answer(scene, ASK_CAPTION, scene.caption(), text) for scene, text in zip(shown, said, strict=True)]
    return float(np.mean([score_caption(a.said, a.scene, world) for a in answers])), answers


def one_question(scene: Scene, world: World, rng: np.random.Generator) -> tuple[str, str]:
    asked = questions(scene, world, rng)
    return asked[rng.integers(len(asked))]


def question_accuracy(run: Run, world: World, n: int) -> tuple[float, list[Answer]]:
    """Measure exact answers to questions about unseen scenes, one question per scene."""
    shown = list(scenes(world, SCENE_SEED + 2, n, test=True))
    rng = np.random.default_rng(SCENE_SEED)
    asked = [one_question(scene, world, rng) for scene in shown]
    said = ask(run, [(draw(s, world), question) for s, (question, _) in zip(shown, asked, strict=True)], "questions")
    answers = [Answer(s, q, truth, text) for s, (q, truth), text in zip(shown, asked, said, strict=True)]
    return float(np.mean([a.said == a.truth for a in answers])), answers


def question_only(world: World, answers: list[Answer], n: int = 4_000) -> float:
    """Measure a baseline that never sees the image: the most common answer to each question's words."""
    rng, counts = np.random.default_rng(SCENE_SEED + 3), {}
    for scene in scenes(world, SCENE_SEED + 3, n):
        for question, answer in questions(scene, world, rng):
            seen = counts.setdefault(question, {})
            seen[answer] = seen.get(answer, 0) + 1
    best = {question: max(seen, key=seen.get) for question, seen in counts.items()}
    return float(np.mean([best.get(a.question) == a.truth for a in answers]))
