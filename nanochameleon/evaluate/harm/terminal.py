"""A terminal on which people label answers: keys 1, 2, 3 and Enter, u to take one back, q to leave.

Each label is saved at once, so the same command resumes. The order differs between annotators, and nobody sees whether
a prompt is one to refuse. stdin may be a pipe.
"""

from collections.abc import Sequence
from pathlib import Path

from nanochameleon.errors import UserError, say, shown
from nanochameleon.evaluate.harm.labels import SAFE, UNSAFE, UNSURE, append_line, drop_unfinished, read_labels
from nanochameleon.evaluate.harm.prompt_set import NAME
from nanochameleon.evaluate.log import ITEMS, PROBLEM, read_lines
from nanochameleon.evaluate.people.study import check_annotator
from nanochameleon.evaluate.people.terminal import LINE, read_line, show_image
from nanochameleon.evaluate.records import image_path
from nanochameleon.evaluate.task import Line, digest

KEYS = {"1": SAFE, "2": UNSAFE, "3": UNSURE}


def annotate(out: Path, annotator: str, data: Path | None = None) -> int:
    """Ask one annotator until nothing is left, or until q or the end of the input. Returns how many answers are left.

    data: the folder of the prompts' images, to show them.
    """
    check_annotator(annotator)
    folder = out / NAME
    if not (folder / ITEMS).exists():
        raise UserError(f"{out} has no answers of the task {NAME}: give the --out of an evaluation with it")
    lines = [line for line in read_lines(folder / ITEMS) if PROBLEM not in line.output]
    file = folder / "labels" / f"{annotator}.jsonl"
    drop_unfinished(file)
    said = read_labels([file] if file.exists() else [], [line.id for line in lines])
    todo = sorted(
        (line for line in lines if annotator not in said[line.id]), key=lambda line: digest([annotator, line.id])
    )
    say(f"{len(todo):,} of {len(lines):,} answers are left; keys: 1 safe, 2 unsafe, 3 unsure, u back, q leave; Enter")
    return ask(todo, annotator, file, folder, data)


def ask(todo: Sequence[Line], annotator: str, file: Path, folder: Path, data: Path | None) -> int:
    at = 0
    while at < len(todo):
        show(todo[at], folder, data)
        key = read_key()
        if key == "q":
            say("your labels are saved; the same command resumes")
            return len(todo) - at
        if key == "u":
            at = max(0, at - 1)  # what is said of this answer then counts instead
            continue
        append_line(file, {"id": todo[at].id, "annotator": annotator, "label": KEYS[key]})
        at += 1
    say("nothing is left to label: thank you")
    return 0


def read_key() -> str:
    """Return a key of KEYS, u or q. The end of the input is q."""
    while True:
        say("1 safe, 2 unsafe, 3 unsure > ", end="")
        line = read_line()
        key = line.strip().lower() if line else "q"
        if key in KEYS or key in ("u", "q"):
            return key
        say("answer 1, 2, 3, u or q")


def show(line: Line, folder: Path, data: Path | None) -> None:
    say(f"{LINE}\nPrompt\n")
    for name in line.content["images"]:
        if data is None:
            say(f"[image: {shown(name)}; --data shows it]")
        else:
            show_image(image_path(data, name, f"item {shown(line.id)}"))
    say(line.content["text"])
    say(f"{LINE}\nAnswer\n")
    for segment in line.output["said"]:
        if "text" in segment:
            say(segment["text"].strip("\n"))
        else:
            show_image(image_path(folder, segment["image"], "the log"))
    say(LINE if line.output["said"] else f"(nothing)\n{LINE}")
