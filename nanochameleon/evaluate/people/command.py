"""python -m nanochameleon.evaluate human: make a study, let people vote, and read the results.

    ... human make --prompts prompts.jsonl --models ours=runs/align other=answers.jsonl --out study
    ... human annotate study --annotator ann
    ... human report study
    ... human export study --format csv --to votes.csv
    ... human import study --votes votes.jsonl
    ... human paper

A model is a run, a model in any layout, or a file of answers: JSON lines of {"id", "segments"}. Prompts are the paper's
released file, or JSON lines of {"id", "segments", "task_type"}. A segment is {"text": ...} or {"image": FILE}.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochameleon.cli import parse
from nanochameleon.errors import UserError, exit_on_user_error, say, shown
from nanochameleon.evaluate.table import output

NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,31}", re.ASCII)  # of a model: it becomes a file name


@dataclass(frozen=True)
class Make:
    """Make a blinded study from prompts and the answers of models. Resumes if it was stopped."""

    prompts: Path
    """JSON lines: the paper's released prompts, or {"id", "segments", "task_type"}."""
    models: tuple[str, ...]
    """NAME=PATH of each model: a run, a model in any layout, or a .jsonl of answers."""
    out: Path
    """Folder of the study."""
    images: Path | None = None
    """Folder of the prompts' images; None: that of the prompts."""
    questions: Literal["both", "absolute", "relative"] = "both"
    """Ask about single answers, about pairs, or about both."""
    pairs: Literal["all", "first"] = "all"
    """Compare every two models, or the first one with each other, as the paper did."""
    votes: int = 3
    """Votes wanted for each item."""
    duplicates: float = 0.05
    """Share of items that each annotator sees twice."""
    attention: int = 1
    """Items of each form that say how they are to be answered."""
    limit: int | None = None
    """At most this many prompts."""
    seed: int = 0
    """Of the answers, and of sides and order."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the transformers' weights; auto keeps that of their files."""


@dataclass(frozen=True)
class Annotate:
    """Vote in this terminal: keys 1, 2, 3 and Enter, u to undo, q to leave. The same command resumes."""

    study: tyro.conf.Positional[Path]
    annotator: str
    """Your name: letters, digits, _ and -."""


@dataclass(frozen=True)
class Report:
    """Print the results, and write them to STUDY/owner: one page of Markdown, and a CSV file for each table."""

    study: tyro.conf.Positional[Path]
    least: int | None = None
    """Votes that an item needs to count; None: as many as the study wants."""
    without: tuple[str, ...] = ()
    """Annotators whose votes do not count."""


@dataclass(frozen=True)
class Export:
    """Write the votes in another form."""

    study: tyro.conf.Positional[Path]
    format: Literal["jsonl", "csv", "lmsys", "labelstudio"]
    to: Path | None = None
    """File to write; None: print."""


@dataclass(frozen=True)
class Import:
    """Add votes that `export --format jsonl` wrote. Votes that are there already are not added twice."""

    study: tyro.conf.Positional[Path]
    votes: Path


@dataclass(frozen=True)
class Paper:
    """Recompute the paper's human evaluation from its counts, and say where the paper contradicts itself."""

    to: Path | None = None
    """File to write; None: print."""


Command = (
    Annotated[Make, tyro.conf.subcommand("make")]
    | Annotated[Annotate, tyro.conf.subcommand("annotate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Paper, tyro.conf.subcommand("paper")]
)


def make(args: Make) -> None:
    check(args)
    models = named_models(args.models, args.questions)
    from nanochameleon.evaluate.people.answers import answer_all
    from nanochameleon.evaluate.people.make import build, check_new
    from nanochameleon.evaluate.people.prompts import read_answers, read_prompts
    from nanochameleon.weights.model_folder import open_model

    check_new(args.out)
    prompts = read_prompts(args.prompts, args.images, args.limit)
    # files first: a mistake in one is found before a model answers anything
    answers = {name: read_answers(path, prompts) if path.is_file() else [] for name, path in models.items()}
    for name, path in models.items():
        if not path.is_file():
            run = open_model(path, args.device, args.dtype)
            answers[name] = answer_all(run, name, prompts, args.out / "owner" / "answers", args.seed)
    how = args.votes, args.questions, args.pairs, args.duplicates, args.attention
    study = build(args.out, prompts, answers, args.seed, *how)
    say(f"{args.out} has {len(study.items)} items: annotate them with `human annotate {args.out} --annotator NAME`")


def check(args: Make) -> None:
    """Raise UserError for a number out of range, naming the option."""
    for name, good, wanted in (
        ("votes", args.votes >= 1, "1 or more"),
        ("duplicates", 0 <= args.duplicates <= 1, "from 0 to 1"),
        ("attention", args.attention >= 0, "0 or more"),
        ("limit", args.limit is None or args.limit >= 1, "1 or more"),
        ("seed", args.seed >= 0, "0 or more"),
    ):
        if not good:
            raise UserError(f"--{name} must be {wanted}, not {shown(getattr(args, name))}")


def named_models(words: Sequence[str], questions: str) -> dict[str, Path]:
    """Read NAME=PATH words."""
    from nanochameleon.evaluate.agreement import TIE

    models: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not NAME.fullmatch(name) or name in models:
            raise UserError(f"--models has {shown(word)!r}: give NAME=PATH, each name once, such as ours=runs/align")
        if name == TIE:
            raise UserError(f"--models has the name {TIE}, which results use for a tie: give another one")
        models[name] = Path(path).expanduser()
    if len(models) < (2 if questions == "relative" else 1):
        raise UserError("--models has too few models: a pair needs two")
    return models


def annotate(args: Annotate) -> None:
    from nanochameleon.evaluate.people.terminal import annotate

    annotate(args.study, args.annotator)


def report(args: Report) -> None:
    if args.least is not None and args.least < 1:
        raise UserError(f"--least must be 1 or more, not {args.least}")
    from nanochameleon.evaluate.people.report import make_report

    say(make_report(args.study, args.least, args.without))


def export(args: Export) -> None:
    from nanochameleon.evaluate.people.export import FORMATS, as_jsonl
    from nanochameleon.evaluate.people.study import open_key, open_study
    from nanochameleon.evaluate.people.votes import Votes

    study = open_study(args.study)
    if args.format == "jsonl":
        output(as_jsonl(Votes(study).log()), args.to)
    else:
        output(FORMATS[args.format](study, open_key(args.study), Votes(study).current_votes()), args.to)


def import_votes(args: Import) -> None:
    from nanochameleon.evaluate.people.export import read_jsonl
    from nanochameleon.evaluate.people.study import open_study
    from nanochameleon.evaluate.people.votes import Votes

    store = Votes(open_study(args.study))
    votes = read_jsonl(args.votes, store.check)
    say(f"{store.add(votes)} of {len(votes)} votes are new")


def paper(args: Paper) -> None:
    from nanochameleon.evaluate.people.paper import report

    output(report(), args.to)


COMMANDS = {
    Make: make, Annotate: annotate, Report: report, Export: export, Import: import_votes, Paper: paper,
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    args = parse(Command, arguments, description=__doc__, prog="python -m nanochameleon.evaluate human")
    COMMANDS[type(args)](args)


def cli(arguments: list[str]) -> None:
    """The command line."""
    exit_on_user_error(lambda: main(arguments))
