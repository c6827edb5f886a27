"""Tasks that need no real model: the answer is computed from the item."""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace

from nanochameleon.errors import UserError
from nanochameleon.evaluate.task import Answer, Item, Line, Options, Task, item_seed


def sums(n: int = 20, chunk: int = 4, name: str = "sums", **changes) -> Task:
    """Add two numbers; every third answer is one too large. Groups: even and odd."""

    def read(options: Options) -> list[Item]:
        items = [
            Item(f"sum-{i}", {"numbers": (i, 2 * i), "target": 3 * i}, "odd" if i % 2 else "even") for i in range(n)
        ]
        return items[: options.limit]

    def answer(run, items: Sequence[Item], options: Options) -> list[Answer]:
        return [answer_one(item, options) for item in items]

    task = Task(name, "Sums of two numbers", "", "", read, answer, score, chunk=chunk)
    return replace(task, **changes)


def answer_one(item: Item, options: Options) -> Answer:
    a, b = item.content["numbers"]
    text = f"{a} + {b} = {a + b + (a % 3 == 2)}"
    return Answer([1, a + 2], {"text": text, "draw": item_seed(options.seed, item.id)}, truncated=a == 7)


def score(content: dict, output: dict) -> tuple[str, dict[str, float]]:
    found = output["text"].split("= ")[1]
    return found, {"acc": float(found == str(content["target"]))}


def after(n_items: int, act: Callable[[], None], task: Task) -> Task:
    """The task, which acts before it answers its item number n_items."""

    def answer(run, items: Sequence[Item], options: Options) -> list[Answer]:
        if any(item.id == f"sum-{n_items}" for item in items):
            act()
        return task.answer(run, items, options)

    return replace(task, answer=answer)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refused(sentence: str, name: str = "refused") -> Task:
    """A task whose file is bad."""

    def read(options: Options) -> list[Item]:
        raise UserError(sentence)

    return sums(name=name, read=read)


def with_problem(bad: Sequence[str], **changes) -> Task:
    """Sums of which some cannot be asked."""

    def answer(run, items: Sequence[Item], options: Options) -> list[Answer]:
        problem = {"problem": "a.png:1 has no image: mend it"}
        return [Answer([], problem) if item.id in bad else answer_one(item, options) for item in items]

    return sums(answer=answer, **changes)


def line(name: int | str, group: str = "", **metrics: float) -> Line:
    return Line(str(name), group, {"n": str(name)}, {}, None, metrics)


def header(name: str) -> dict:
    """The header of an evaluation of a model of this name."""
    model = {"path": f"models/{name}", "weights": "aa", "image_tokenizer": "bb", "text_tokenizer": "cc"}
    model |= {"parameters": 1234, "dtype": "float32", "device": "cpu"}
    session = {"date": "2026-01-01T00:00:00+00:00", "tasks": [], "limit": None, "data": None, "commit": "abc"}
    session |= {"uncommitted_changes": True, "versions": {"torch": "2.13"}, "machine": "a CPU"}
    session |= {"kernels": {"linear": "joined"}, "seconds": 75.0}
    return {"model": model, "options": {"seed": 3, "shots": None}, "tasks": {}, "sessions": [session]}
