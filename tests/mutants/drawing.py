"""Bugs to plant in evaluate/drawing/."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "a prompt leaves the folder",
        "evaluate/drawing/layouts.py",
        'if "/" in name or "\\\\" in name or name in (".", ".."):',
        "if False:",
        "evaluate/test_drawing_command.py",
    ),
    Mutant(
        "an image depends on its place in the file",
        "evaluate/drawing/images.py",
        "seeds = [item_seed(seed, file.prompt.text, sample) for file, sample in asked]",
        "seeds = [item_seed(seed, i) for i in range(len(asked))]",
        "evaluate/test_drawing_command.py",
    ),
    Mutant(
        "the images of another run are taken for this one's",
        "evaluate/drawing/folder.py",
        "if there != here:",
        "if False:",
        "evaluate/test_drawing_command.py",
    ),
    Mutant(
        "one object too many is none too many",
        "evaluate/drawing/geneval.py",
        'if n >= unwanted["count"]:',
        'if n > unwanted["count"]:',
        "evaluate/test_drawing_geneval.py",
    ),
    Mutant(
        "a little to the left is left of",
        "evaluate/drawing/geneval.py",
        "if part > 0.5}",
        "if part > 0}",
        "evaluate/test_drawing_geneval.py",
    ),
    Mutant(
        "any object has the colour",
        "evaluate/drawing/geneval.py",
        "fitting = [i for i in fitting if reading.things[i].colour == colour]",
        "fitting = fitting * (colour in (t.colour for t in reading.things))",
        "evaluate/test_drawing_geneval.py",
    ),
    Mutant(
        "the overall score is a mean over images",
        "evaluate/drawing/summary.py",
        "math.fsum(task.value for task in tasks) / len(tasks)",
        "math.fsum(task.value * task.n for task in tasks) / sum(task.n for task in tasks)",
        "evaluate/test_drawing_geneval.py",
    ),
    Mutant(
        "chance counts the prompt's own images",
        "evaluate/drawing/shapes_geneval.py",
        'if number != line.content["number"]',
        "if True",
        "evaluate/test_drawing_geneval.py",
    ),
    Mutant(
        "an answer that ends early is right",
        "evaluate/drawing/shapes_alignment.py",
        "len(wanted) == len(said) and",
        "len(wanted) >= len(said) and",
        "evaluate/test_drawing_tasks.py",
    ),
]
