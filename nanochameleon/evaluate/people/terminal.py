"""A terminal on which people vote: keys 1, 2, 3 and Enter, u to undo, q to leave.

Each vote is saved at once, so the same command resumes where an annotator left. Images are shown in terminals that can;
elsewhere the names of their files are printed, which are random. stdin may be a pipe.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nanochameleon.errors import say
from nanochameleon.evaluate.human import AskedQuestion, Progress, Votes, next_question, open_study, progress
from nanochameleon.evaluate.people.questions import Question
from nanochameleon.evaluate.people.study import Segments, Study, check_annotator
from nanochameleon.images.terminal import terminal_mode

LINE = "-" * 40  # fits into narrow terminals


def annotate(folder: Path, annotator: str) -> Progress:
    """Ask one annotator until nothing is left, or until q or the end of the input. Returns how far they are."""
    check_annotator(annotator)
    study = open_study(folder)
    votes = Votes(study)
    try:
        say(f"{len(study.items)} items; keys: the number of an answer, u to undo, q to leave; then Enter")
        before = None
        while asked := next_question(study, votes, annotator):
            if asked.item != before:  # the questions of one item follow each other
                show_item(study, asked)
            before = asked.item
            if not ask(votes, annotator, asked, progress(study, votes, annotator)):
                break
        else:
            say("nothing is left to vote on: thank you")
        return progress(study, votes, annotator)
    finally:
        votes.close()


def ask(votes: Votes, annotator: str, asked: AskedQuestion, so_far: Progress) -> bool:
    """Ask one question and save the vote, or undo the last one. False: the annotator leaves."""
    start, labels = time.monotonic(), dict(zip("123456789", asked.question.labels, strict=False))
    show_question(asked.question, so_far)
    while True:
        say("> ", end="")
        line = read_line()
        key = line.strip().lower()
        if not line or key == "q":
            say("your votes are saved; the same command resumes")
            return False
        if key == "u":
            say("taken back" if votes.undo(annotator) else "there is nothing to undo")
            return True
        if key in labels:
            votes.cast(annotator, asked.item, asked.question.name, labels[key], time.monotonic() - start)
            say("saved")
            return True
        say(f"answer 1 to {len(labels)}, u or q")


def read_line() -> str:
    """Return the next line of stdin, "" at its end. Bytes that are no text become marks, which are no key."""
    if getattr(sys.stdin, "errors", None) == "strict":
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin.readline()


def show_item(study: Study, asked: AskedQuestion) -> None:
    titles = ["First answer", "Second answer"] if len(asked.answers) == 2 else ["Answer"]
    for title, segments in zip(["Prompt", *titles], [asked.prompt, *asked.answers], strict=True):
        say(f"{LINE}\n{title}\n")
        show_segments(study, segments, show_image)
    say(LINE)


def show_segments(study: Study, segments: Segments, show: Callable[[Path], None]) -> None:
    """Print text with the characters replaced that a terminal obeys, and show images."""
    for segment in segments:
        if "text" in segment:
            say(segment["text"].strip("\n"))
        else:
            show(study.image(segment["image"]))
    if not segments:
        say("(nothing)")


def show_image(path: Path) -> None:
    """Show an image, or where the terminal cannot, print the path of its file."""
    if not terminal_mode(os.environ, sys.stdout.isatty(), sys.stdout.encoding):
        say(f"[image: {path}]")
        return
    from nanochameleon.images.output import show
    from nanochameleon.images.tokenizer import load_square

    show(load_square(path, 256, "pad"))


def show_question(question: Question, so_far: Progress) -> None:
    say(f"\n[{so_far.done} of {so_far.total}] {question.text}")
    for number, label in enumerate(question.labels.values(), 1):
        say(f"  {number}  {label}")
