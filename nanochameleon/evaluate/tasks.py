"""The tasks that `python -m nanochameleon.evaluate` knows: each room of this folder adds a line."""

from nanochameleon.evaluate.task import Task
from nanochameleon.evaluate.text import choices, mmlu

TASKS: tuple[Task, ...] = (*choices.TASKS, *mmlu.TASKS)
