"""Prompts that a model should refuse or answer, from the user's file. No prompts of others are part of this project.

    {"id": 7, "text": "...", "images": ["a.png"], "intent": "both", "category": "violence", "expected": "refuse"}

That is one line of safety.jsonl. `images`, `intent` and `category` may be left out. `intent` says what carries the
wish: the text, the image, or both together. Three files of others are read by their columns, as safety.csv:

    XSTest       id, prompt, type, label           "safe" prompts should be answered: they measure over-refusal
    AILuminate   release_prompt_id, prompt_text, hazard
    HarmBench    Behavior, SemanticCategory, ContextString, BehaviorID           the context comes first

Sources: github.com/paul-rottger/xstest, github.com/mlcommons/ailuminate, github.com/centerforaisafety/HarmBench.
"""

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.records import check_ids, check_unicode, get, image_path, read_json_lines, read_text

REFUSE, ANSWER = "refuse", "answer"
INTENTS = ("text", "image", "both")
UNNAMED = "unnamed"  # the category where the file names none
Row = tuple[str, str, dict[str, Any]]  # place, id, content


def read_prompts(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (id, content) of each prompt, in the file's order. Raises UserError, naming the line."""
    rows = list(csv_rows(path) if path.suffix.lower() == ".csv" else json_rows(path))
    check_ids((place, name) for place, name, _ in rows)
    return [(name, content) for _, name, content in rows]


def json_rows(path: Path) -> Iterator[Row]:
    for place, row in read_json_lines(path):
        text = get(row, "text", str, place) if "text" in row else ""
        images = get(row, "images", list, place) if "images" in row else []
        for name in images:
            if not isinstance(name, str):
                raise UserError(f"{place} has an image that is no text: write the name of its file")
            image_path(path.parent, name, place)
        if not (text.strip() or images):
            raise UserError(f"{place} has neither text nor images: give the prompt, or remove the line")
        content = {
            "text": check_unicode(text, place),
            "images": images,
            "intent": one_of(row, "intent", INTENTS, place, "text" if not images else "image" if not text else "both"),
            "category": get(row, "category", str, place).strip() or UNNAMED if "category" in row else UNNAMED,
            "expected": one_of(row, "expected", (REFUSE, ANSWER), place),
        }
        yield place, str(get(row, "id", (str, int), place)), content


def one_of(row: dict, name: str, choices: tuple[str, ...], place: str, default: str | None = None) -> str:
    if name not in row and default is not None:
        return default
    value = get(row, name, str, place)
    if value not in choices:
        raise UserError(f"{place} has {shown(value)!r} as {name!r}: it must be {' or '.join(choices)}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Tables of others


def xstest(row: dict[str, str], place: str) -> tuple[str, str, str, str]:
    label = one_of(row, "label", ("safe", "unsafe"), place)
    return row["id"], row["prompt"], row["type"], ANSWER if label == "safe" else REFUSE


def ailuminate(row: dict[str, str], place: str) -> tuple[str, str, str, str]:
    return row["release_prompt_id"], row["prompt_text"], row["hazard"], REFUSE


def harmbench(row: dict[str, str], place: str) -> tuple[str, str, str, str]:
    context = row["ContextString"].strip()
    text = f"{context}\n\n{row['Behavior']}" if context else row["Behavior"]
    return row["BehaviorID"], text, row["SemanticCategory"], REFUSE


READERS: dict[tuple[str, ...], Callable[[dict[str, str], str], tuple[str, str, str, str]]] = {
    ("id", "prompt", "type", "label"): xstest,
    ("release_prompt_id", "prompt_text", "hazard"): ailuminate,
    ("Behavior", "SemanticCategory", "ContextString", "BehaviorID"): harmbench,
}


def csv_rows(path: Path) -> Iterator[Row]:
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        names = set(table.fieldnames or ())
        reader = next((reader for columns, reader in READERS.items() if names >= set(columns)), None)
        if reader is None:
            known = "; ".join(", ".join(columns) for columns in READERS)
            raise UserError(f"{path} has other columns than the tables that are read: {known}")
        for row in table:
            place = f"{path}:{table.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place} has another number of cells than the first line: mend it, or remove it")
            name, text, category, expected = reader(row, place)
            if not (name.strip() and text.strip()):
                raise UserError(f"{place} has no id or no prompt: fill it, or remove the line")
            yield place, name, {
                "text": text, "images": [], "intent": "text", "category": category or UNNAMED, "expected": expected
            }  # fmt: skip
    except csv.Error as error:
        raise UserError(f"{path}:{table.line_num} is not CSV ({shown(error)}): mend it, or remove it") from None
