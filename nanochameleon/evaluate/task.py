"""What a task is: items that are read from files, answered by a model, and scored without one.

    read(options) -> items                     answer(run, items, options) -> answers
    score(content, output) -> found, metrics   figures(lines) -> the rows of a table

An item's content and a model's output are JSON. They go into the log of the run (log.py), so a run can be scored again
when the model is gone.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from nanochameleon.data.sources.scenes import World
from nanochameleon.errors import UserError
from nanochameleon.training.run import Run


@dataclass(frozen=True)
class Options:
    """How a model is asked."""

    data: Path | None = None  # the folder of the files that the user brings
    limit: int | None = None  # at most this many items of each task; None: all
    seed: int = 0  # of shots, samples and resamples
    shots: int | None = None  # examples before each question; None: as many as the paper has
    samples: int = 1  # answers to each item, for a majority (maj@k)
    world: World | None = None  # the shapes world that the model learnt; None: none
    out: Path = Path("evaluation")  # where images and other large outputs may go: out / task name


def need_world(options: Options) -> World:
    """Return the shapes world. Raises UserError for a model that was not trained on it."""
    if options.world is None:
        raise UserError("the model knows no shapes world: ask models/toy, or a run of train.py toy")
    return options.world


@dataclass(frozen=True)
class Item:
    """One question. `content` is JSON: all that defines the item, with what counts as right."""

    id: str  # unique in its task, and the same in every run
    content: dict[str, Any]
    group: str = ""  # a subject, a level, an answer type: figures are given by group, too


@dataclass(frozen=True)
class Answer:
    """What the model did with one item. `output` is JSON: texts, log-probabilities, names of image files.

    An item that cannot be asked, such as one whose image is missing, has the output {"problem": one sentence}. It does
    not count, the table says how many there were, and the program ends with exit code 2.
    """

    prompt: Sequence[int]  # tokens, of which the log keeps a hash
    output: dict[str, Any]
    truncated: bool = False  # was the left end of the prompt cut off to fit the context?


@dataclass(frozen=True)
class Line:
    """One item in the log: what was asked, what came out, and its score."""

    id: str
    group: str
    content: dict[str, Any]
    output: dict[str, Any]
    extracted: Any  # the answer that was found in the output
    metrics: dict[str, float]
    truncated: bool = False
    hashes: dict[str, str] = field(default_factory=dict)  # of the content, and of the prompt's tokens


@dataclass(frozen=True)
class Figure:
    """A row of the table. Shares are 0 to 1; `scale` says by which factor they are printed (100: percent)."""

    name: str  # such as "acc_norm", or "acc, physics"
    value: float
    n: int  # how many of `unit` the value is a mean of
    unit: str = "items"
    low: float | None = None  # the 95% interval
    high: float | None = None
    how: str = ""  # of the interval: "Wilson", "Clopper-Pearson", "bootstrap over items"
    chance: float | None = None  # what guessing gets
    baseline: float | None = None  # what a model that cannot see the image gets
    ceiling: float | None = None  # the judge's score of the correct answer
    scale: float = 100.0
    note: str = ""


@dataclass(frozen=True)
class Task:
    """The functions raise UserError for what a user can do wrong.

    read: the items in a fixed order, at most options.limit of them, the same in every run.
    answer: one Answer per item, in order. An answer depends on its item and the seed, not on its neighbours, up to
    rounding. score: ("what was found", {"acc": 1.0}) from an item's content and the model's output; needs no model.
    score_set: the metrics of each line that depend on the others, such as CIDEr-D; only `compare` asks for them.
    export: writes the files that official scorers read into a folder that exists, from all lines, at the end of a run.
    """

    name: str
    title: str  # one line for `--tasks list`
    files: str  # what it wants in --data; "" for nothing
    source: str  # where people get these files; "" where nothing is needed
    read: Callable[[Options], list[Item]]
    answer: Callable[[Run, Sequence[Item], Options], list[Answer]]
    score: Callable[[dict, dict], tuple[Any, dict[str, float]]]
    figures: Callable[[Sequence[Line]], list[Figure]] | None = None  # None: the mean of each metric, by group, too
    _: KW_ONLY
    takes: tuple[str, ...] = ()  # of the options "shots" and "samples"
    score_set: Callable[[Sequence[Line]], list[dict[str, float]]] | None = None  # metrics that need all lines, by line
    export: Callable[[Sequence[Line], Options, Path], None] | None = None  # writes files for others' scorers
    chunk: int = 64  # items between two writes to the log


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that depend on a JSON value alone."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def item_seed(*parts: int | str) -> int:
    """A 32-bit seed from such parts as (options.seed, item.id, sample): no item's draws depend on the other items."""
    return int(digest(list(parts))[:8], 16)
