"""Look for a benchmark's items in training data: runs of 13 words that both have.

    python -m nanochameleon.evaluate contamination prepared/ extra.jsonl --tasks arc_easy,gsm8k --data benchmarks
    python -m nanochameleon.evaluate contamination prepared/ --tasks gsm8k --data benchmarks --results OUT

Words are letters and digits in lower case, so punctuation and line breaks do not hide a copy. 13 words are GPT-3's
choice (arXiv 2005.14165, appendix C), and so is to ignore what more than 10 documents have: such runs are phrases, not
leaks. Each line of an item is looked for by itself, without the "Question:" and "Answer:" of a prompt: a copy need not
have its options in the same place. A line of 8 to 12 words is looked for as a whole; a shorter one proves nothing. What
share of the words of these lines was found sorts an item, as in Llama 2 (arXiv 2307.09288, appendix A.6): under 20%
clean, from 80% dirty. Shots are not looked for, since they come from the training split. Left out: images.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from nanochameleon.cli import MAX_SEED, parse
from nanochameleon.data.prepared import INDEX, TEST, open_prepared
from nanochameleon.data.shards import Shards
from nanochameleon.errors import UserError, say, shown
from nanochameleon.evaluate.log import ITEMS, read_lines
from nanochameleon.evaluate.records import load
from nanochameleon.evaluate.statistics import mean_figure
from nanochameleon.evaluate.table import interval, markdown_table, number
from nanochameleon.evaluate.task import Item, Options
from nanochameleon.evaluate.tasks import pick
from nanochameleon.files import write_file

N, SHORTEST, FREQUENT = 13, 8, 10  # words of a run; of the shortest line; documents that may have a run
PART, DIRTY = 0.2, 0.8  # shares of an item's words
WORD = re.compile(r"\w+")
LABEL = re.compile(r"\b(?:Question|Short answer|Answer|Problem|Solution|Q|A):")  # what a prompt adds to an item
BLOCK = 2**20  # characters of a text file that are read at a time; each block counts as a document
NOT_ASKED = ("preamble", "shots", "image", "images")  # parts of an item's content that are not its own words

Gram = tuple[str, ...]


@dataclass(frozen=True)
class Args:
    """Look for the items of tasks in training data."""

    training: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of prepared data, .txt files, and .jsonl files of {"text": ...}."""
    tasks: str
    """Names of tasks, joined by commas."""
    data: Path | None = None
    """The folder with the benchmarks' files."""
    limit: int | None = None
    """At most this many items of each task."""
    seed: int = 0
    """As for the evaluation, where items are drawn."""
    results: Path | None = None
    """The --out of an evaluation: its figures on clean items and on the others are given apart."""
    out: Path | None = None
    """Write a JSON line for each item to this file."""


@dataclass
class Checked:
    """An item, and what training data have of it."""

    task: str
    id: str
    n_words: int  # of the lines that are long enough to be looked for
    share: float = 0.0  # of its words that lie in a run that was found
    example: str = ""  # the first such run
    where: str = ""  # the document that has it
    texts: list[list[str]] = field(default_factory=list, repr=False)  # the words of each of these lines

    @property
    def state(self) -> str:
        if not self.texts:
            return "too short"
        return "clean" if self.share < PART else "part" if self.share < DIRTY else "dirty"


# ---------------------------------------------------------------------------------------------------------------------
# Words


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def strings(value: Any) -> Iterator[str]:
    """Yield the texts of an item's content, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            if name not in NOT_ASKED:
                yield from strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from strings(part)


def check_item(task: str, item: Item) -> Checked:
    """Return the item's different lines of SHORTEST words or more, without the labels of a prompt."""
    lines = [LABEL.sub(" ", line) for text in strings(item.content) for line in text.splitlines()]
    distinct = dict.fromkeys(tuple(words_of(line)) for line in lines)
    texts = [list(words) for words in distinct if len(words) >= SHORTEST]
    return Checked(task, item.id, sum(map(len, texts)), texts=texts)


def grams(words: Sequence[str], n: int) -> Iterator[Gram]:
    return zip(*(words[start:] for start in range(n)), strict=False)


# ---------------------------------------------------------------------------------------------------------------------
# Training data


def documents(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield (where, text) of training data, a document at a time; a long text file block by block."""
    for path in paths:
        if (path / INDEX).is_file():
            yield from prepared(path)
        elif path.suffix == ".jsonl" and path.is_file():
            yield from json_lines(path)
        elif path.suffix == ".txt" and path.is_file():
            yield from blocks(path)
        else:
            raise UserError(f"{path} is no training data: give a folder of prepared data, a .txt or a .jsonl file")


def json_lines(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, " ".join(strings(load(line, place)))


def prepared(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the text of each document of prepared data. The test split is no training data."""
    tokenizer = open_prepared(folder).text()
    for source in sorted(path.parent for path in folder.glob(f"*/{Shards.INDEX}") if path.parent.name != TEST):
        shards = Shards(source, tokenizer.vocab.size)
        for i in range(len(shards)):
            tokens = shards[i]
            yield f"{source}:{i}", tokenizer.decode(tokens[tokenizer.vocab.is_text(tokens)].tolist())


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """Yield a text file in blocks that overlap, so that a run of words across two of them is found in one."""
    kept, start = "", 0
    with open(path, encoding="utf-8", errors="replace") as file:
        while block := file.read(BLOCK):
            yield f"{path}: from character {start - len(kept):,}", kept + block
            start, kept = start + len(block), tail(kept + block)


def tail(text: str) -> str:
    """Return the end of a text: its last N words, the first and the last of which may be cut."""
    begins = [match.start() for match in WORD.finditer(text)]
    return text[begins[-N] :] if len(begins) >= N else text


# ---------------------------------------------------------------------------------------------------------------------
# Both


def check(items: Sequence[Checked], paths: Sequence[Path]) -> Sequence[Checked]:
    """Look for the items in training data; fills in share, example and where."""
    wanted: dict[int, dict[Gram, list[str]]] = {}  # length -> run of words -> the documents that have it
    for item in items:
        for text in item.texts:
            n = min(N, len(text))
            wanted.setdefault(n, {}).update((gram, []) for gram in grams(text, n))
    for where, text in tqdm(documents(paths), "documents", unit=" documents", disable=None):
        words = words_of(text)
        for n, known in wanted.items():
            for gram in known.keys() & set(grams(words, n)):
                if len(known[gram]) <= FREQUENT:
                    known[gram].append(where)
    for item in items:
        fill(item, wanted)
    return items


def fill(item: Checked, wanted: dict[int, dict[Gram, list[str]]]) -> None:
    covered = 0
    for text in item.texts:
        known = wanted[n := min(N, len(text))]
        hits = [(i, gram) for i, gram in enumerate(grams(text, n)) if 1 <= len(known[gram]) <= FREQUENT]
        covered += len({word for i, _ in hits for word in range(i, i + n)})
        if hits and not item.example:
            item.example, item.where = " ".join(hits[0][1]), known[hits[0][1]][0]
    item.share = covered / item.n_words if item.texts else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def rows(items: Sequence[Checked]) -> list[dict[str, str]]:
    """Return a row for each task: how many items are clean, in part, dirty, too short."""
    states = ("clean", "part", "dirty", "too short")
    found = []
    for task in dict.fromkeys(item.task for item in items):
        mine = [item.state for item in items if item.task == task]
        found.append({"task": task, "items": f"{len(mine):,}"} | {s: f"{mine.count(s):,}" for s in states})
    return found


def apart(items: Sequence[Checked], results: Path) -> list[dict[str, str]]:
    """Return each metric of an evaluation on the clean items, and on those that training data have in part or whole."""
    found = []
    for task in dict.fromkeys(item.task for item in items):
        if not (path := results / task / ITEMS).is_file():
            raise UserError(f"{results} has no {task}: evaluate it first, or leave out --results")
        states = {item.id: item.state for item in items if item.task == task}
        for which, of in (("clean", ("clean",)), ("found in training data", ("part", "dirty"))):
            lines = [line for line in read_lines(path) if states.get(line.id) in of]
            for metric in sorted({metric for line in lines for metric in line.metrics}):
                figure = mean_figure(metric, [line.metrics[metric] for line in lines if metric in line.metrics])
                shown_as = {"value": number(figure.value, 100), "95% interval": interval(asdict(figure))}
                found.append({"task": task, "items": which, "figure": metric, **shown_as, "n": f"{figure.n:,}"})
    return found


def write_lines(path: Path, items: Sequence[Checked]) -> None:
    lines = ({key: value for key, value in asdict(item).items() if key != "texts"} for item in items)
    try:
        write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from None


def main(args: Args) -> None:
    if not 0 <= args.seed <= MAX_SEED or (args.limit is not None and args.limit < 1):
        raise UserError(f"--seed must be 0 to {MAX_SEED}, and --limit 1 or more")
    if not args.training:
        raise UserError("the training data are missing: give a folder of prepared data, or text files")
    for path in args.training:
        if not path.exists():
            raise UserError(f"{shown(path)} is not there: give training data that are")
    tasks = pick([name.strip() for name in args.tasks.split(",")])
    options = Options(args.data, args.limit, args.seed)
    items = [check_item(task.name, item) for task in tasks for item in task.read(options)]
    if args.out:
        write_lines(args.out, items)  # before hours of search, so that a file that cannot be written is found at once
    check(items, args.training)
    if args.out:
        write_lines(args.out, items)
    tables = [rows(items)] + ([apart(items, args.results)] if args.results else [])
    say("\n\n".join(markdown_table(list(table[0]), table) for table in tables if table))


def cli(arguments: list[str]) -> None:
    main(parse(Args, arguments, description=__doc__, prog="python -m nanochameleon.evaluate contamination"))
