"""Make a study: prompts and the answers of models -> a blinded study and its key (study.py).

    answers under random names -> items -> duplicates and checks of attention -> shown/study.json, owner/key.json

Every image is decoded, brought to one size and encoded again by one PNG encoder, so neither its format nor its size
tells whose it is. Left out: what a model's style betrays.
"""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Literal

from nanochameleon.errors import UserError
from nanochameleon.evaluate.people.answers import SIDE
from nanochameleon.evaluate.people.prompts import Prompt
from nanochameleon.evaluate.people.questions import ABSOLUTE, RELATIVE
from nanochameleon.evaluate.people.study import (
    IMAGES,
    KEY,
    SHOWN,
    Asked,
    Item,
    Key,
    Segments,
    Study,
    contents,
    hashed,
    open_study,
    write_json,
)
from nanochameleon.evaluate.people.votes import FILE, Votes
from nanochameleon.files import write_file
from nanochameleon.images.terminal import png
from nanochameleon.images.tokenizer import load_square

Questions = Literal["both", "absolute", "relative"]
Pairing = Literal["all", "first"]  # every two models, or the first model against each other one


def build(
    folder: Path, prompts: Sequence[Prompt], answers: dict[str, list[Segments]], seed: int = 0, votes_per_item: int = 3,
    questions: Questions = "both", pairing: Pairing = "all", duplicates: float = 0.05, attention: int = 1,
) -> Study:  # fmt: skip
    """Write a study to a folder that has none, and return it. answers: {model: its answers, in the prompts' order}."""
    check_new(folder)
    secret = read_secret(folder)
    names = {(model, prompt.id): hashed(secret, "answer", model, prompt.id) for model in answers for prompt in prompts}
    items = make_items(secret, prompts, list(answers), names, questions, pairing)
    items, repeats = with_duplicates(secret, items, duplicates)
    shown_prompts, shown_answers = blind_all(folder, secret, prompts, answers, names)
    checks = make_checks(secret, items, attention)
    for item, sentence, texts, _ in checks:
        items.append(item)
        shown_prompts[item.prompt] = [{"text": sentence}]
        shown_answers |= dict(zip(item.answers, texts, strict=True))
    key = Key(
        tuple(answers),
        {hashed(secret, "prompt", prompt.id): as_asked(prompt) for prompt in prompts},
        {name: model for (model, _), name in names.items()},
        repeats,
        {item.id: right for item, *_, right in checks},
    )
    write_json(folder / KEY, asdict(key))
    write_json(folder / SHOWN, contents(seed, votes_per_item, shown_prompts, shown_answers, items))
    study = open_study(folder)
    Votes(study).close()  # the file is there before several annotators open it at once
    return study


def as_asked(prompt: Prompt) -> Asked:
    return Asked(prompt.id, prompt.task_type, any("image" in segment for segment in prompt.segments))


def check_new(folder: Path) -> None:
    """Raise UserError if a study is there: its votes would lose their meaning."""
    if (folder / SHOWN).exists() or (folder / FILE).exists():
        raise UserError(f"{folder} already holds a study, or the votes of one: give another --out")


def read_secret(folder: Path) -> str:
    """A random word that names are made of, so that nobody can guess them from the names of models."""
    path = folder / "owner" / "secret"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, os.urandom(16).hex().encode())
    return path.read_text()


def blind_all(
    folder: Path, secret: str, prompts: Sequence[Prompt], answers: dict[str, list[Segments]],
    names: dict[tuple[str, str], str],
) -> tuple[dict[str, Segments], dict[str, Segments]]:  # fmt: skip
    """Return the prompts and the answers under their random names.

    Images are written in the order of these names, so the times of the files do not tell whose they are, either.
    """
    asked = {hashed(secret, "prompt", prompt.id): blinded(folder, prompt.segments, secret, "prompt", prompt.id)
             for prompt in prompts}  # fmt: skip
    said = {(model, prompt.id): segments for model, own in answers.items()
            for prompt, segments in zip(prompts, own, strict=True)}  # fmt: skip
    in_order = sorted(said, key=names.__getitem__)
    return asked, {names[owner]: blinded(folder, said[owner], secret, "answer", *owner) for owner in in_order}


def blinded(folder: Path, segments: Segments, secret: str, *owner: str) -> Segments:
    """Save the images of a prompt or an answer under random names."""
    result: Segments = []
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    for number, segment in enumerate(segments):
        if "text" in segment:
            result.append({"text": segment["text"]})
            continue
        result.append({"image": f"{hashed(secret, 'image', *owner, number)}.png"})
        # written again on resuming: the answer may have changed since the run was killed
        write_file(folder / IMAGES / result[-1]["image"], png(load_square(segment["image"], SIDE, "pad")))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Items


def make_items(
    secret: str, prompts: Sequence[Prompt], models: list[str], names: dict[tuple[str, str], str],
    questions: Questions, pairing: Pairing,
) -> list[Item]:  # fmt: skip
    """One item for each answer (absolute questions) and for each pair of answers to one prompt (the relative one)."""
    groups: list[tuple[str, ...]] = [(model,) for model in models] if questions != "relative" else []
    if questions != "absolute":
        groups += combinations(models, 2) if pairing == "all" else [(models[0], other) for other in models[1:]]
    return [
        Item(
            hashed(secret, "item", *group, prompt.id),
            hashed(secret, "prompt", prompt.id),
            tuple(sorted(names[model, prompt.id] for model in group)),
        )
        for prompt in prompts
        for group in groups
    ]


def with_duplicates(secret: str, items: list[Item], share: float) -> tuple[list[Item], dict[str, str]]:
    """Repeat a share of the items. All annotators get the copies and their originals, so each is asked twice."""
    repeated = random.Random(secret).sample(items, math.ceil(share * len(items)))
    copies = {hashed(secret, "again", item.id): item for item in repeated}
    twice = {item.id for item in repeated}
    originals = [Item(i.id, i.prompt, i.answers, i.id in twice) for i in items]
    return (
        originals + [Item(name, item.prompt, item.answers, True) for name, item in copies.items()],
        {name: item.id for name, item in copies.items()},
    )


def make_checks(secret: str, items: list[Item], n: int) -> list[tuple[Item, str, list[Segments], dict[str, str]]]:
    """Items that say how to answer them: n for pairs and n for single answers, as far as the study has such items.

    Returns (item, prompt, answers, {question: right answer}) of each.
    """
    checks = []
    for size in sorted({len(item.answers) for item in items}):
        for number in range(n):
            name = hashed(secret, "check", size, number)
            draw = random.Random(name)
            asked = [RELATIVE] if size == 2 else [question for question in ABSOLUTE if not question.about_images]
            right = {question.name: draw.choice(list(question.labels)) for question in asked}
            if size == 1:  # one place in every list, so that one sentence says it
                right = {question.name: next(iter(question.labels)) for question in asked}
            want = RELATIVE.labels[right[RELATIVE.name]] if size == 2 else "the first choice of every question"
            sentence = f"This item checks that prompts are read. Please choose: {want}."
            answers = tuple(sorted(hashed(name, side) for side in range(size)))
            texts = [[{"text": "Please read the prompt."}] for _ in answers]
            checks.append((Item(name, hashed(name, "prompt"), answers, True), sentence, texts, right))
    return checks
