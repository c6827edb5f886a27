"""The tasks that `python -m nanochameleon.evaluate` knows: each room of this folder adds a line."""

from nanochameleon.evaluate.task import Task

TASKS: tuple[Task, ...] = ()
