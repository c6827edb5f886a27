"""Scenes, and what the oracle read in an image, as JSON: so an image can be judged again when it is gone."""

import dataclasses
from typing import Any

from nanochameleon.data.sources.scenes import Scene, Thing
from nanochameleon.evaluate.oracle import Reading


def to_json(value: Scene | Reading) -> dict[str, Any]:
    return dataclasses.asdict(value)


def scene_of(value: dict[str, Any]) -> Scene:
    return Scene(value["background"], things(value), cells(value), value["relation"])


def reading_of(value: dict[str, Any]) -> Reading:
    return Reading(value["background"], things(value), cells(value), value["unreadable"])


def things(value: dict[str, Any]) -> tuple[Thing, ...]:
    return tuple(Thing(**thing) for thing in value["things"])


def cells(value: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((row, column) for row, column in value["cells"])
