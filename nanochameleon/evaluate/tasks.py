"""The tasks that `python -m nanochameleon.evaluate` knows: each room of this folder adds a line."""

from nanochameleon.evaluate.drawing import shapes_alignment, shapes_geneval
from nanochameleon.evaluate.task import Task

TASKS: tuple[Task, ...] = (*shapes_geneval.TASKS, *shapes_alignment.TASKS)
