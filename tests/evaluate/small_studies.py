"""Small studies of text, made in milliseconds."""

from collections.abc import Sequence
from pathlib import Path

from nanochameleon.evaluate.people.make import build
from nanochameleon.evaluate.people.prompts import Prompt
from nanochameleon.evaluate.people.study import Item, Key, Study, open_key

MODELS = ("secretive", "Hidden-7B")


def prompts(n: int) -> list[Prompt]:
    """The first half are advice without images. The second half are stories."""
    return [Prompt(f"q{i}", "Advice" if i < n / 2 else "Story", [{"text": f"please do {i}"}]) for i in range(n)]


def small_study(
    folder: Path, n: int = 6, answers: dict[str, Sequence[str]] | None = None, **more
) -> tuple[Study, Key]:  # fmt: skip
    """n prompts and the answers of models. By default there are two models, and no checks of annotators."""
    answers = answers or {model: [f"text {i}" for i in range(n)] for model in MODELS}
    segments = {model: [[{"text": text}] for text in texts] for model, texts in answers.items()}
    study = build(folder, prompts(n), segments, **{"duplicates": 0.0, "attention": 0} | more)
    return study, open_key(folder)


def pairs(study: Study) -> list[Item]:
    return [item for item in study.items.values() if len(item.answers) == 2]


def side_of(study: Study, key: Key, annotator: str, item: Item, model: str) -> str:
    """The label that says that this model is better."""
    return "first" if key.answers[study.sides(annotator, item)[0]] == model else "second"
