"""Measure a run for its report: figures, a sheet of images, conversations.

What is measured depends on the data. An oracle judges the shapes worlds. For all other images there is only likelihood,
and images to look at.
"""

import time
from pathlib import Path

import numpy as np
import torch

from nanochameleon.data import RawImage
from nanochameleon.data.build import open_sources
from nanochameleon.data.build import world as world_of
from nanochameleon.data.prepared import TEST
from nanochameleon.data.sources.alignment import CATEGORIES
from nanochameleon.data.sources.scenes import World, draw
from nanochameleon.documents import Text
from nanochameleon.errors import say
from nanochameleon.evaluate import alignment, shapes
from nanochameleon.evaluate.held_out import captioned, unseen
from nanochameleon.evaluate.likelihood import bits
from nanochameleon.evaluate.report_html import write_report
from nanochameleon.evaluate.samples import SHEET, drawable, write_sheet
from nanochameleon.evaluate.shapes import Answer, Drawn, draw_images
from nanochameleon.files import write_file
from nanochameleon.images.terminal import png
from nanochameleon.training.curves import plot_curves
from nanochameleon.training.diagnostics import peak_memory_gib
from nanochameleon.training.modes import sampling_mode
from nanochameleon.training.monitor import METRICS, read_metrics
from nanochameleon.training.run import Run, command

INTERLEAVED = 100  # documents whose second image is drawn, at most
NO_ORACLE = {"oracle_on_clean": None, "oracle_on_reconstructions": None}  # for images without exact truth


@sampling_mode()
def make_report(run: Run, folder: Path, seconds: dict[str, float]) -> Path:
    """Measure everything. Writes samples.png, curves.png, image.png, report.json and report.html to the folder.

    Prepared data may have no test split: figures that need one are then None, and there are no images.
    """
    start, world = time.perf_counter(), world_of(run.cfg.data)
    measured, sheet, talks = shapes_report(run, world) if world else images_report(run, folder)
    if run.cfg.data.source == "prepared" and not talks:
        say(f"{run.cfg.data.path} has no source called {TEST}: no figure on unseen data is measured")
    measured |= bits(run, unseen(run, folder, 200)) | training_speed(folder)
    write_sheet(sheet, folder / "samples.png")
    plot_curves(read_metrics(folder / METRICS), folder / "curves.png")
    if talks:  # an image of the test split, to ask about
        write_file(folder / "image.png", png(talks[0]["image"]))
    seconds = seconds | {"report": time.perf_counter() - start}
    figures = {"seconds": {"total": sum(seconds.values())} | seconds, "peak_memory_gib": peak_memory_gib()}
    figures |= {"precision": run.cfg.train.precision} | measured
    return write_report(folder, figures, talks, next_commands(folder, sheet, talks), f"nanochameleon: {run.cfg.name}")


def training_speed(folder: Path) -> dict[str, float]:
    """Return the transformer's tokens_per_second over the whole run, from its log."""
    lines = [line for line in read_metrics(folder / METRICS) if line.get("tokens")]
    return {"tokens_per_second": lines[-1]["tokens"] / lines[-1]["seconds"]} if lines and lines[-1]["seconds"] else {}


def next_commands(folder: Path, sheet: list, talks: list[dict]) -> list[str]:
    """Return commands to try next: draw one of the captions, ask about image.png."""
    commands = [command("sample.py", str(folder), sheet[0][0] if sheet else "a red circle", "--n", "4")]
    if talks:
        question = talks[0]["question"] or "what is this?"
        commands.append(command("sample.py", str(folder), str(folder / "image.png"), question))
    return commands


def shapes_report(run: Run, world: World) -> tuple[dict, list, list[dict]]:
    """Measure with the oracle. The sheet shows seen and held-out compositions, then ends of interleaved documents."""
    n = run.cfg.evaluation
    figures = {"tokenizer": shapes.tokenizer_scores(run.image_tokenizer, world, n.reconstructions)}
    seen, drawn_seen = shapes.text_to_image(run, world, "seen", n.images)
    held_out, drawn_held_out = shapes.text_to_image(run, world, "held_out", n.images)
    interleaved, drawn_second = shapes.second_image(run, world, min(n.images, INTERLEAVED))
    captions, captioned = shapes.caption_facts(run, world, n.answers)
    accuracy, answered = shapes.question_accuracy(run, world, n.answers)
    figures |= {
        "text_to_image": {"seen": seen, "held_out": held_out},
        "interleaved": interleaved,
        "captions": {"facts": captions},
        "questions": {"accuracy": accuracy, "question_only": shapes.question_only(world, answered)},
    }
    trained = [name for name in CATEGORIES if name in run.cfg.mixture]
    aligned = {name: alignment.answered(run, world, name, n.alignment) for name in trained}
    if aligned:
        figures["alignment"] = {name: alignment.accuracy(answers) for name, answers in aligned.items()}
    half = SHEET // 2
    sheet = [sheet_item(d, "") for d in drawn_seen[:half]]
    sheet += [sheet_item(d, " (held out)") for d in drawn_held_out[:half]]
    sheet += [sheet_item(d, " (after another caption and its image)") for d in drawn_second[:8]]
    return figures, sheet, [talk(a, world) for a in (*captioned[:6], *answered[:12])]


def sheet_item(drawn: Drawn, note: str) -> tuple[str, np.ndarray, bool]:
    return drawn.scene.caption() + note, drawn.image, drawn.facts["all_facts"]


def talk(answer: Answer, world: World) -> dict:
    image = draw(answer.scene, world)
    return {"question": answer.question, "answer": answer.said, "truth": answer.truth, "image": image}


def images_report(run: Run, folder: Path) -> tuple[dict, list, list[dict]]:
    """Measure reconstruction error and codebook use; what needs an oracle is None. The sheet is of the test split."""
    captions, images = captioned(run, folder, run.cfg.evaluation.reconstructions)
    figures = {"tokenizer": NO_ORACLE | reconstruction(run, images)}
    figures |= {"text_to_image": None, "interleaved": None, "captions": None, "questions": None}
    captions = drawable(run, captions)[:SHEET]
    drawn = draw_images(run, captions, run.cfg.seed, "drawing")
    return figures, [(c, p, None) for c, p in zip(captions, drawn, strict=True)], asked_about(run, folder, 12)


def reconstruction(run: Run, images: list[np.ndarray]) -> dict[str, float | None]:
    """Return the error against the original images; None for prepared data, which keeps only the codes."""
    if not images or run.cfg.data.source == "prepared":
        return {"mean_absolute_error": None, "codebook_used": None}
    clean = np.stack(images)
    codes = run.image_tokenizer.encode(clean)
    error = np.abs(clean.astype(int) - run.image_tokenizer.decode(codes)).mean() / 255
    return {"mean_absolute_error": float(error), "codebook_used": len(torch.unique(codes)) / run.cfg.vqgan.n_codes}


def asked_about(run: Run, folder: Path, n: int) -> list[dict]:
    """Ask about images of the test split: questions if the model was trained on any, else captions."""
    if "questions" not in run.cfg.mixture or run.cfg.data.source == "prepared":
        truths, images = captioned(run, folder, n)
        asked = [""] * len(truths)
    else:
        source = open_sources(run.cfg, folder, "test")("questions")
        docs = [source.document(i) for i in range(min(n, source.size))]
        images = [next(s.pixels for s in doc if isinstance(s, RawImage)) for doc in docs]
        texts = [[s.text for s in doc if isinstance(s, Text)] for doc in docs]
        asked, truths = [text[0] for text in texts], [text[1] for text in texts]
    said = shapes.ask(run, list(zip(images, asked, strict=True)), "captions")
    return [
        {"question": question, "answer": answer, "truth": truth, "image": image}
        for question, answer, truth, image in zip(asked, said, truths, images, strict=True)
    ]
