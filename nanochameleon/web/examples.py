"""Messages to begin with, which an empty page shows. They fit what a model was trained on."""

from nanochameleon.training.run import Run

SHAPES = [
    {"messages": ["a big red circle above a small blue star", "what colour is the star?"]},
    {"messages": ["two small green squares on black", "how many squares are there?"]},
    {"messages": ["please draw a big red star on white"], "mode": "chat"},
    {"messages": ["show a big red star on white, then two small blue crosses on black"], "mode": "chat"},
    {"messages": ["say backwards: red star"], "mode": "chat"},
]


def examples(run: Run) -> list[dict] | None:
    """The examples of a model of the shapes world, in auto unless they name a mode; None: the page has others."""
    return SHAPES if run.cfg.data.source == "shapes" and run.image_tokenizer.can_draw else None
