"""The tasks that `python -m nanochameleon.evaluate` knows: each room of this folder adds a line."""

from nanochameleon.evaluate.task import Task
from nanochameleon.evaluate.text import word_problems

TASKS: tuple[Task, ...] = (*word_problems.TASKS,)
