"""Captions of COCO and Flickr30k: what does the model write after an image?

    image, caption, newline, image, caption, newline, image -> at most 30 new tokens -> CIDEr-D over all images

The protocol is the paper's (arXiv 2405.09818 section 4, Table 7): Karpathy's test splits, 2 examples, captions of at
most 30 tokens. Captions follow their images without a word between, as in pre-training.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from nanochameleon.evaluate.cider import cider_d
from nanochameleon.evaluate.statistics import mean_interval
from nanochameleon.evaluate.task import Answer, Figure, Item, Line, Options, Task
from nanochameleon.evaluate.vision import files
from nanochameleon.evaluate.vision.files import Captioned, official_id
from nanochameleon.evaluate.vision.prompts import SHOTS, ask, check_pool, draw_shots, make_content, one_line, parts_of
from nanochameleon.files import write_file
from nanochameleon.training.run import Run

MAX_NEW_TOKENS = 30

Read = Callable[[Path | None, bool], tuple[list[Captioned], list[Captioned]]]


def read(options: Options, reader: Read) -> list[Item]:
    """Return the test images, each with its examples. Raises UserError."""
    n = SHOTS if options.shots is None else options.shots
    test, training = reader(options.data, n > 0)
    check_pool(training, n, options.data)
    return [Item(each.id, content(each, training, n, options.seed)) for each in test[: options.limit]]


def content(image: Captioned, training: Sequence[Captioned], n: int, seed: int) -> dict:
    shots = [[shot.image, one_line(shot.references[0]) + "\n"] for shot in draw_shots(training, image, n, seed)]
    return make_content(shots, image.image, "", image.references)


def answer(run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    return ask(run, [parts_of(item.content) for item in items], options.data, MAX_NEW_TOKENS, blind=False)


def score(content: dict, output: dict) -> tuple[str, dict[str, float]]:
    """Return the caption. CIDEr-D depends on all images, so figures() computes it."""
    return output["text"].strip(), {}


# ---------------------------------------------------------------------------------------------------------------------
# The whole set


def figures(lines: Sequence[Line], n_images: int, paper: str) -> list[Figure]:
    """Return CIDEr-D, next to that of captions of other images. n_images: of the whole split."""
    return [cider_figure(lines, paper if len(lines) == n_images else f"{n_images:,} images make the set: {paper}")]


def cider(lines: Sequence[Line]) -> list[dict[str, float]]:
    """Return the CIDEr-D of each image among all of these, times 100 as papers print it."""
    _, scores = cider_d([line.extracted for line in lines], [line.content["references"] for line in lines])
    return [{"CIDEr-D": 100 * score} for score in scores]


def cider_figure(lines: Sequence[Line], note: str, ceiling: float | None = None) -> Figure:
    """Return the mean CIDEr-D. The baseline is the first reference of the next image: a caption that did not look."""
    scores = [each["CIDEr-D"] for each in cider(lines)]
    references = [line.content["references"] for line in lines]
    first = [texts[0] for texts in references]
    elsewhere, _ = cider_d([*first[1:], *first[:1]], references)
    interval, how = mean_interval(scores), "bootstrap over images"  # not mean_figure's: scores of 0 are no shares
    levels = {"baseline": 100 * elsewhere, "ceiling": ceiling}
    return Figure("CIDEr-D", fmean(scores), len(lines), "images", *interval, how, scale=1.0, note=note, **levels)


def export(lines: Sequence[Line], options: Options, folder: Path) -> None:
    """Write results.json for COCO's scorer, and per_image.jsonl with the CIDEr-D of each image."""
    kept = [line for line in lines if "problem" not in line.output]
    results = [{"image_id": official_id(line.id), "caption": line.extracted} for line in kept]
    write_file(folder / "results.json", json.dumps(results).encode())
    rows = [result | scores for result, scores in zip(results, cider(kept), strict=True)]
    write_file(folder / "per_image.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def caption_task(name: str, title: str, wanted: str, source: str, reader: Read, n_images: int, paper: str) -> Task:
    return Task(
        name,
        title,
        wanted,
        source,
        read=lambda options: read(options, reader),
        answer=answer,
        score=score,
        figures=lambda lines: figures(lines, n_images, paper),
        score_set=cider,
        export=export,
        takes=("shots",),
        chunk=128,
    )


KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
TASKS = (
    caption_task(
        "coco",
        "COCO captions, Karpathy's test split, CIDEr-D, 2 examples",
        "dataset_coco.json, or BLIP's coco_karpathy_test.json and coco_karpathy_train.json; val2014/, train2014/",
        f"{KARPATHY}; images: https://cocodataset.org/#download",
        files.coco,
        5_000,
        "Chameleon-34B has 120.2, aligned to many tasks 139.1 (paper, Table 7)",
    ),
    caption_task(
        "flickr30k",
        "Flickr30k captions, Karpathy's test split, CIDEr-D, 2 examples",
        "dataset_flickr30k.json; flickr30k-images/",
        f"{KARPATHY}; images: https://shannon.cs.illinois.edu/DenotationGraph/",
        files.flickr30k,
        1_000,
        "Chameleon-34B has 74.7, aligned to many tasks 76.2 (paper, Table 7)",
    ),
)
