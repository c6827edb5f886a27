"""The task shapes_geneval: a model of the shapes world draws GenEval's six tasks, and the oracle judges (geneval.py).

    case -> item, one for each sample -> image in OUT/shapes_geneval/00000/samples/0000.png -> reading -> judge

Next to each figure are two others. Ceiling: the judge on the true scene, drawn exactly and sent through the model's
image tokenizer. Chance: the judge on images that the model drew for other prompts of the same task and compositions.
At the end results.jsonl has a line for each image, as GenEval's scorer writes them; summary.py reads it.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochameleon.data.sources.scenes import draw
from nanochameleon.errors import UserError
from nanochameleon.evaluate.drawing.each import generate_each
from nanochameleon.evaluate.drawing.folder import save
from nanochameleon.evaluate.drawing.geneval import COMPOSITIONS, cases, judge, metadata
from nanochameleon.evaluate.drawing.geneval import TASKS as TAGS
from nanochameleon.evaluate.drawing.images import pixels, tokens_of
from nanochameleon.evaluate.drawing.readings import reading_of, scene_of, to_json
from nanochameleon.evaluate.drawing.summary import figures as figures_of
from nanochameleon.evaluate.oracle import read as read_image
from nanochameleon.evaluate.shapes import SCENE_SEED, has_room
from nanochameleon.evaluate.task import Answer, Figure, Item, Line, Options, Task, item_seed, need_world
from nanochameleon.images.terminal import png
from nanochameleon.images.tokenizer import NO_DECODER
from nanochameleon.training.run import Run

NAME = "shapes_geneval"
OTHERS = 50  # other prompts for whose images the judge is asked, to measure chance


def read(options: Options) -> list[Item]:
    items = []
    for number, (tag, compositions, scene) in enumerate(cases(need_world(options), SCENE_SEED)):
        line = json.dumps(metadata(tag, scene))  # a text, since the log sorts the keys of objects
        content = {"number": number, "line": line, "prompt": scene.caption(), "scene": to_json(scene)}
        for sample in range(options.samples):
            item = Item(f"{number:05}-{sample:04}", content | {"sample": sample}, f"{tag}, {compositions}")
            items.append(item)
    return items[: options.limit]


def answer(run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    if not run.image_tokenizer.can_draw:
        raise UserError(NO_DECODER)
    prompts = [tokens_of(run, item.content["prompt"]) for item in items]
    fitting = [i for i, prompt in enumerate(prompts) if has_room(run, prompt)]
    params = dataclasses.replace(run.cfg.sample, max_new_tokens=run.image_tokenizer.n_codes_per_image + 1)
    seeds = [item_seed(options.seed, items[i].id) for i in fitting]
    context = run.model.cfg.max_seq_len
    outputs: list[dict] = [
        {"problem": f"{NAME}: the prompt of item {item.id} and an image are too long for a context of {context} tokens"}
        for item in items
    ]
    for n, tokens in generate_each(run, [prompts[i] for i in fitting], seeds, params, "image"):
        outputs[fitting[n]] = judged(run, tokens, items[fitting[n]], options)
    return [Answer(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def judged(run: Run, tokens: Sequence[int], item: Item, options: Options) -> dict[str, Any]:
    """Save an image, and return its name and what the oracle reads in it; also in the true scene, before and after the
    image tokenizer."""
    image = pixels(run, tokens)
    name = f"{item.content['number']:05}/samples/{item.content['sample']:04}.png"
    path = options.out / NAME / name
    save(path.parents[1] / "metadata.jsonl", f"{item.content['line']}\n".encode())
    save(path, png(image))
    clean = draw(scene_of(item.content["scene"]), options.world)
    again = run.image_tokenizer.decode(run.image_tokenizer.encode(clean[None]))[0]
    shown = {"drawn": image, "clean": clean, "reconstructed": again}
    return {"image": name} | {key: to_json(read_image(x, options.world)) for key, x in shown.items()}


def score(content: dict, output: dict) -> tuple[str, dict[str, float]]:
    """Return what is wrong with the image, and whether it and the true scene are correct."""
    line = json.loads(content["line"])
    verdicts = {key: judge(line, reading_of(output[key])) for key in ("drawn", "clean", "reconstructed")}
    metrics = {key: float(correct) for key, (correct, _) in verdicts.items()}
    return verdicts["drawn"][1], {"correct": metrics.pop("drawn")} | metrics


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def figures(lines: Sequence[Line]) -> list[Figure]:
    """Return the overall figures, then those of the tasks."""
    found = [rows for compositions in COMPOSITIONS if (rows := figures_for(compositions, lines))]
    return [rows[0] for rows in found] + [row for rows in found for row in rows[1:]]


def figures_for(compositions: str, lines: Sequence[Line]) -> list[Figure]:
    """Return the overall figure and one per task, for prompts of one kind of compositions."""
    by_tag = {tag: here for tag in TAGS if (here := [line for line in lines if line.group == f"{tag}, {compositions}"])}
    if not by_tag:
        return []
    rows = figures_of({tag: [line.metrics["correct"] == 1 for line in here] for tag, here in by_tag.items()})
    chances = [chance(here) for here in by_tag.values()]
    ceilings = [mean([line.metrics["reconstructed"] for line in here]) for here in by_tag.values()]
    named = compositions.replace("_", " ")
    return [
        dataclasses.replace(row, name=f"{row.name}, {named}", chance=guessed, ceiling=ceiling)
        for row, guessed, ceiling in zip(rows, [mean(chances), *chances], [mean(ceilings), *ceilings], strict=True)
    ]


def mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def chance(lines: Sequence[Line]) -> float | None:
    """Return how often an image that was drawn for another prompt is correct; None for a single prompt."""
    drawn = [(line.content["number"], reading_of(line.output["drawn"])) for line in lines]
    asked = [json.loads(line.content["line"]) for line in lines]
    verdicts = [
        judge(asked[i], reading)[0]
        for i, line in enumerate(lines)
        for number, reading in (drawn * 2)[i + 1 : i + 1 + min(OTHERS, len(lines) - 1)]
        if number != line.content["number"]
    ]
    return sum(verdicts) / len(verdicts) if verdicts else None


def export(lines: Sequence[Line], options: Options, folder: Path) -> None:
    """Write results.jsonl. As in the official file, metadata and details are JSON in a text."""
    rows = [result(line) for line in lines if "drawn" in line.output]
    save(folder / "results.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def result(line: Line) -> dict[str, Any]:
    return {
        "filename": line.output["image"],
        "tag": json.loads(line.content["line"])["tag"],
        "prompt": line.content["prompt"],
        "correct": line.metrics["correct"] == 1,
        "reason": line.extracted,
        "metadata": line.content["line"],
        "details": json.dumps(line.output["drawn"], sort_keys=True),
    }


TASKS = (
    Task(
        NAME,
        "GenEval's six tasks in the shapes world, judged by the oracle",
        "",
        "",
        read,
        answer,
        score,
        figures,
        takes=("samples",),
        export=export,
    ),
)
