"""The tasks that `python -m nanochameleon.evaluate` knows: each room of this folder adds a line."""

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
    *shapes_geneval.TASKS,
    *shapes_alignment.TASKS,
    *prompt_set.TASKS,
    *shapes_requests.TASKS,
)
