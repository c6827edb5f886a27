"""Messages to begin with, which an empty page shows. They fit what a model was trained on."""

from nanochameleon.training.run import Run

SHAPES = [
    {"messages": ["please draw a big red star on white"]},
    {"messages": ["show a big red star on white, then two small blue crosses on black"], "mode": "chat"},
    {"messages": ["please draw two small blue crosses on black", "how many crosses are there?"]},
]


def examples(run: Run) -> list[dict] | None:
    """The examples of a model of the shapes world, in auto unless they name a mode; None: the page has others."""
    return SHAPES if run.cfg.data.source == "shapes" else None
