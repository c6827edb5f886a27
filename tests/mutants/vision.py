"""Bugs to plant in evaluate/vision/."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "an example shows the image in question",
        "evaluate/vision/prompts.py",
        "if other.image != item.image:",
        "if True:",
        "evaluate/test_vision_prompts.py",
    ),
    Mutant(
        "an aligned model sees the middle of an image alone",
        "evaluate/vision/prompts.py",
        '"pad" if run.cfg.train.assistant_only_loss else "crop"',
        '"crop"',
        "evaluate/test_vision_prompts.py",
    ),
    Mutant(
        "an image that does not fit is left to the engine",
        "evaluate/vision/prompts.py",
        "if n_images * image_len > room:",
        "if False:",
        "evaluate/test_vision_prompts.py",
    ),
    Mutant(
        "an image may lie outside of the folder",
        "evaluate/vision/files.py",
        'path = image_path(data / folder, each, "an item")',
        "path = data / folder / each",
        "evaluate/test_vision_files.py",
    ),
    Mutant(
        "COCO's restval is no training split",
        "evaluate/vision/files.py",
        ' + splits.get("restval", [])',
        "",
        "evaluate/test_vision_files.py",
    ),
    Mutant(
        "EvalAI gets the answers to some questions",
        "evaluate/vision/questions.py",
        "if options.limit is None and not",
        "if not",
        "evaluate/test_vision_tasks.py",
    ),
    Mutant(
        "an answer keeps its full stop",
        "evaluate/vision/questions.py",
        '.removesuffix(".")',
        "",
        "evaluate/test_vision_tasks.py",
    ),
]
