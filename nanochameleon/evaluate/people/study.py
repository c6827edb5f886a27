"""A study: what an annotator's program reads, and, in another file, what it must not read.

    DIR/shown/study.json, shown/images/NAME.png    prompts, answers and items under random names
    DIR/owner/key.json                             which answer is whose, and which items check the annotator
    DIR/votes.sqlite                               votes.py

A study is blinded: names come from a secret, answers are in the order of their names, and images are PNG files from one
encoder. The sides of a pair and the order of the items are a hash of (seed, annotator, item), so they are the same each
time an annotator returns, and differ between annotators.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.people.questions import ABSOLUTE, RELATIVE, Question
from nanochameleon.evaluate.records import read_json_file
from nanochameleon.files import write_file

ANNOTATOR = re.compile(r"[A-Za-z0-9_-]{1,32}")
SHOWN, IMAGES, KEY = "shown/study.json", "shown/images", "owner/key.json"
Segments = list[dict[str, str]]  # {"text": ...} or {"image": name of a file}, in order


@dataclass(frozen=True)
class Item:
    """One answer to judge, or two to compare."""

    id: str
    prompt: str
    answers: tuple[str, ...]  # their random names, sorted
    for_all_annotators: bool = False  # wanted from every annotator, however many votes it has


@dataclass(frozen=True)
class Study:
    """All that an annotator's program knows."""

    folder: Path
    id: str  # a hash of the rest
    seed: int
    votes_per_item: int
    prompts: dict[str, Segments]
    answers: dict[str, Segments]
    items: dict[str, Item]
    orders: dict[str, list[Item]] = field(default_factory=dict, compare=False, repr=False)  # a cache, by annotator

    def sides(self, annotator: str, item: Item) -> tuple[str, ...]:
        """The answers in the order in which this annotator sees them."""
        swap = hashed(self.seed, "sides", annotator, item.id)[0] in "01234567"
        return item.answers[::-1] if swap else item.answers

    def order(self, annotator: str) -> list[Item]:
        """The items in the order in which this annotator meets them.

        Of two items with the same answers, one comes in the first third and one in the last: too far to remember.
        """
        if annotator not in self.orders:
            self.orders[annotator] = self.new_order(annotator)
        return self.orders[annotator]

    def new_order(self, annotator: str) -> list[Item]:
        place = {name: int(hashed(self.seed, "order", annotator, name), 16) / 16**32 for name in self.items}
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in sorted(self.items, key=place.__getitem__):
            groups.setdefault(self.items[name].answers, []).append(name)
        for first, *again in groups.values():
            if again:
                place[first] /= 3
                place[again[0]] = (2 + place[again[0]]) / 3
        return sorted(self.items.values(), key=lambda item: place[item.id])

    def questions(self, item: Item) -> list[Question]:
        if len(item.answers) == 2:
            return [RELATIVE]
        has_images = any("image" in segment for segment in self.answers[item.answers[0]])
        return [question for question in ABSOLUTE if has_images or not question.about_images]

    def image(self, name: str) -> Path:
        """The file of an image. Raises UserError for any other name, so no path can leave the folder."""
        if not re.fullmatch(r"[0-9a-f]{32}\.png", name):
            raise UserError(f"{shown(name)!r} is no image of this study: its names are 32 hexadecimal digits and .png")
        return self.folder / IMAGES / name


@dataclass(frozen=True)
class Asked:
    """A prompt of the study, as its owner knows it."""

    id: str
    task_type: str
    has_images: bool


@dataclass(frozen=True)
class Key:
    """The unblinding table."""

    models: tuple[str, ...]
    prompts: dict[str, Asked]  # by their names in the study; checks of attention have none
    answers: dict[str, str]  # name in the study -> model
    duplicates: dict[str, str]  # item -> the item that it repeats
    attention: dict[str, dict[str, str]]  # item -> {question: the right answer}

    def counts(self, item: Item) -> bool:
        """Is it an item of the study proper, and no check of the annotator?"""
        return item.id not in self.duplicates and item.id not in self.attention


def hashed(*parts: Any) -> str:
    """32 hexadecimal digits that depend on JSON values alone."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()[:32]


def check_annotator(name: str) -> str:
    if not ANNOTATOR.fullmatch(name):
        raise UserError(f"the annotator {shown(name)!r} must have 1 to 32 of the characters A-Z a-z 0-9 _ -")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Files


def contents(seed: int, votes_per_item: int, prompts: dict, answers: dict, items: Sequence[Item]) -> dict:
    """study.json. Everything is sorted by its random name, so no order tells what is whose."""
    return {
        "seed": seed,
        "votes_per_item": votes_per_item,
        "prompts": dict(sorted(prompts.items())),
        "answers": dict(sorted(answers.items())),
        "items": [asdict(item) for item in sorted(items, key=lambda item: item.id)],
    }


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace"))


def open_study(folder: Path) -> Study:
    """Read what annotators may see. Raises UserError for a folder without a study, or with a damaged one."""
    path = folder / SHOWN
    if not path.is_file():
        raise UserError(f"{folder} holds no study: make one with `human make --out {folder}`")
    content = read_json_file(path)
    try:
        items = [
            Item(row["id"], row["prompt"], tuple(row["answers"]), row["for_all_annotators"]) for row in content["items"]
        ]
        study = Study(
            folder, hashed(content), content["seed"], content["votes_per_item"], content["prompts"], content["answers"],
            {item.id: item for item in items},
        )  # fmt: skip
        known = all(item.prompt in study.prompts and study.answers.keys() >= {*item.answers} for item in items)
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise UserError(f"{path} is damaged: make the study again, in a new folder")
    return study


def open_key(folder: Path) -> Key:
    """Read the unblinding table. Raises UserError where only annotators' files are there."""
    path = folder / KEY
    if not path.is_file():
        raise UserError(f"{path} is missing: only the owner of the study, who has this file, can see results")
    content = read_json_file(path)
    try:
        prompts = {name: Asked(**row) for name, row in content["prompts"].items()}
        return Key(tuple(content["models"]), prompts, content["answers"], content["duplicates"], content["attention"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: restore it, or make the study again, in a new folder") from None
