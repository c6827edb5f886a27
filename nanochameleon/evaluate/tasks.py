"""The tasks that `python -m nanochameleon.evaluate` knows: each room of this folder adds a line."""

from nanochameleon.evaluate.task import Task
from nanochameleon.evaluate.vision import captioning, questions, shapes_tasks

TASKS: tuple[Task, ...] = (
    *captioning.TASKS,
    *questions.TASKS,
    *shapes_tasks.TASKS,
)
