"""The tasks that `python -m nanochameleon.evaluate` knows: each room of this folder adds a line."""

import difflib
from collections.abc import Sequence

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate import definitions, toy_tasks
from nanochameleon.evaluate.drawing import shapes_alignment, shapes_geneval
from nanochameleon.evaluate.harm import prompt_set, shapes_requests
from nanochameleon.evaluate.task import Task
from nanochameleon.evaluate.text import choices, mmlu, word_problems
from nanochameleon.evaluate.vision import captioning, questions, shapes_tasks

TASKS: tuple[Task, ...] = (
    *choices.TASKS,
    *mmlu.TASKS,
    *word_problems.TASKS,
    *captioning.TASKS,
    *questions.TASKS,
    *shapes_tasks.TASKS,
    *toy_tasks.TASKS,
    *definitions.TASKS,
    *shapes_geneval.TASKS,
    *shapes_alignment.TASKS,
    *prompt_set.TASKS,
    *shapes_requests.TASKS,
)


def pick(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names. Raises UserError for an unknown one, with the nearest that exists."""
    known = {task.name: task for task in TASKS}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"there is no task {shown(name)!r}: {meant}see them all with --tasks list")
    return [known[name] for name in names]
