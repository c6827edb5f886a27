"""A run's report: figures, sheets of images, conversations. What is measured depends on the data.

An oracle judges the shapes worlds. For all other images there is likelihood alone, and images to look at.
"""

import time
from pathlib import Path

import numpy as np
import torch

from nanochameleon.data import RawImage
from nanochameleon.data.build import open_sources, world
from nanochameleon.data.prepared import TEST
from nanochameleon.data.sources.alignment import CATEGORIES
from nanochameleon.data.sources.shapes import World, draw
from nanochameleon.documents import Text
from nanochameleon.errors import say
from nanochameleon.evaluate import alignment, shapes
from nanochameleon.evaluate.held_out import captioned, unseen
from nanochameleon.evaluate.likelihood import bits
from nanochameleon.evaluate.report_html import samples_sheet, write_report
from nanochameleon.evaluate.shapes import Answer, Drawn, draw_images
from nanochameleon.files import write_file
from nanochameleon.generation.prompts import prompt_tokens
from nanochameleon.images.terminal import png
from nanochameleon.training.curves import plot_curves
from nanochameleon.training.diagnostics import peak_memory_gib
from nanochameleon.training.monitor import METRICS, read_metrics
from nanochameleon.training.run import Run, command

GRID = 14  # images of a sample grid during training
SHEET = 28  # images in samples.png
INTERLEAVED = 100  # documents of two images at most whose second one is drawn
NO_ORACLE = {"oracle_on_clean": None, "oracle_on_reconstructions": None}  # of images without exact truth


def drawable(run: Run, captions: list[str]) -> list[str]:
    """Those that leave room for their image in the context; training leaves the others out as well."""
    return [caption for caption in captions if shapes.has_room(run, prompt_tokens([Text(caption)], run, "draw"))]


def sample_grid(run: Run, path: Path) -> None:
    """Draws a few captions of the test split, the same ones each time, into one sheet."""
    captions, _ = captioned(run, path.parent.parent, SHEET)
    captions = drawable(run, captions)[:GRID]
    if not captions:
        return
    path.parent.mkdir(exist_ok=True)
    samples_sheet([(c, p, None) for c, p in zip(captions, draw_images(run, captions, 0), strict=True)], path)


def training_seconds(folder: Path) -> dict[str, float]:
    """tokens_per_second of the transformer over the whole run, from its log."""
    lines = [line for line in read_metrics(folder / METRICS) if line.get("tokens")]
    return {"tokens_per_second": lines[-1]["tokens"] / lines[-1]["seconds"]} if lines and lines[-1]["seconds"] else {}


def make_report(run: Run, folder: Path, seconds: dict[str, float]) -> Path:
    """Measures everything; writes samples.png, curves.png, image.png, report.json and report.html to the folder.

    Without anything unseen, as prepared data may be, what is measured on it is None, and the images are not there.
    """
    clock, place = time.perf_counter(), world(run.cfg.data)
    figures, sheet, talks = shapes_report(run, place) if place else images_report(run, folder)
    figures |= bits(run, unseen(run, folder, 200)) | training_seconds(folder)
    samples_sheet(sheet, folder / "samples.png")
    plot_curves(read_metrics(folder / METRICS), folder / "curves.png")
    seconds = seconds | {"report": time.perf_counter() - clock}
    made = {"seconds": {"total": sum(seconds.values())} | seconds, "peak_memory_gib": peak_memory_gib()}
    figures = made | {"precision": run.cfg.train.precision} | figures
    prompt = sheet[0][0] if sheet else "a red circle"
    question = talks[0]["question"] or "what is this?" if talks else ""
    tries = [[prompt, "--n", "4"]]
    if run.cfg.data.source == "prepared" and not talks:
        say(f"{run.cfg.data.path} has no source called {TEST}, so nothing unseen is measured")
    if talks:  # an image of the test split, to ask about
        write_file(folder / "image.png", png(talks[0]["image"]))
        tries.append([str(folder / "image.png"), question])
    commands = [command("sample.py", str(folder), *words) for words in tries]
    return write_report(folder, figures, talks, commands, f"nanochameleon: {run.cfg.name}")


def shapes_report(run: Run, place: World) -> tuple[dict, list, list[dict]]:
    """Figures by the oracle; the sheet shows seen and held-out compositions, then ends of interleaved documents."""
    n = run.cfg.evaluation
    figures = {"tokenizer": shapes.tokenizer_scores(run.image_tokenizer, place, n.reconstructions)}
    seen, drawn_seen = shapes.text_to_image(run, place, "seen", n.images)
    held_out, drawn_held_out = shapes.text_to_image(run, place, "held_out", n.images)
    interleaved, drawn_second = shapes.second_image(run, place, min(n.images, INTERLEAVED))
    captions, captioned = shapes.caption_facts(run, place, n.answers)
    accuracy, answered = shapes.question_accuracy(run, place, n.answers)
    figures |= {
        "text_to_image": {"seen": seen, "held_out": held_out},
        "interleaved": interleaved,
        "captions": {"facts": captions},
        "questions": {"accuracy": accuracy, "question_only": shapes.question_only(place, answered)},
    }
    learnt = [name for name in CATEGORIES if name in run.cfg.mixture]
    aligned = {name: alignment.answered(run, place, name, n.alignment) for name in learnt}
    if aligned:
        figures["alignment"] = {name: alignment.share_right(answers) for name, answers in aligned.items()}
    half = SHEET // 2
    sheet = [sheet_item(d, "") for d in drawn_seen[:half]]
    sheet += [sheet_item(d, " (held out)") for d in drawn_held_out[:half]]
    sheet += [sheet_item(d, " (after another caption and its image)") for d in drawn_second[:8]]
    return figures, sheet, [talk(a, place) for a in (*captioned[:6], *answered[:12])]


def sheet_item(drawn: Drawn, note: str) -> tuple[str, np.ndarray, bool]:
    return drawn.scene.caption() + note, drawn.image, drawn.facts["all_facts"]


def talk(answer: Answer, place: World) -> dict:
    image = draw(answer.scene, place)
    return {"question": answer.question, "answer": answer.said, "truth": answer.truth, "image": image}


def images_report(run: Run, folder: Path) -> tuple[dict, list, list[dict]]:
    """Reconstruction error and codebook use, and a sheet of the test split. What needs an oracle is None."""
    captions, images = captioned(run, folder, run.cfg.evaluation.reconstructions)
    figures = {"tokenizer": NO_ORACLE | reconstruction(run, images)}
    figures |= {"text_to_image": None, "interleaved": None, "captions": None, "questions": None}
    captions = drawable(run, captions)[:SHEET]
    drawn = draw_images(run, captions, run.cfg.seed, "drawing")
    return figures, [(c, p, None) for c, p in zip(captions, drawn, strict=True)], asked_about(run, folder, 12)


def reconstruction(run: Run, images: list[np.ndarray]) -> dict[str, float | None]:
    """Of images as they were before they became codes: prepared data has them no more, and no figure then."""
    if not images or run.cfg.data.source == "prepared":
        return {"mean_absolute_error": None, "codebook_used": None}
    clean = np.stack(images)
    codes = run.image_tokenizer.encode(clean)
    error = np.abs(clean.astype(int) - run.image_tokenizer.decode(codes)).mean() / 255
    return {"mean_absolute_error": float(error), "codebook_used": len(torch.unique(codes)) / run.cfg.vqgan.n_codes}


def asked_about(run: Run, folder: Path, n: int) -> list[dict]:
    """What the model says of images of the test split: answers where it learnt questions, else captions."""
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
