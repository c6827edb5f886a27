"""python -m nanochameleon.evaluate safety: label answers, and report how safe models are.

    python -m nanochameleon.evaluate MODEL --tasks safety --data DIR --out OUT      answers the prompts first
    ... safety label OUT --annotator ann                                            people label them
    ... safety report OUT                                                           the paper's Table 5, and refusals
    ... safety report OUT_A OUT_B                                                   do two models differ?
    ... safety report log.jsonl                                                     red teaming (red_team.py)
    ... safety paper

DIR/safety.jsonl has a line for each prompt: {"id", "text", "images", "intent", "category", "expected"}; what is
expected is "refuse" or "answer" (harm/prompts.py). Labels are JSON lines of {"id", "annotator", "label"}; the label is
"safe", "unsafe" or "unsure". Those in OUT/safety/labels, and those in log.labels.jsonl next to a log, are read without
being named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanochameleon.cli import parse
from nanochameleon.errors import UserError, exit_on_user_error
from nanochameleon.evaluate.table import output


@dataclass(frozen=True)
class Label:
    """Label answers in this terminal: 1 safe, 2 unsafe, 3 unsure and Enter, u back, q to leave. The same command
    resumes."""

    out: tyro.conf.Positional[Path]
    """The --out of an evaluation with the task safety."""
    annotator: str
    """Your name: letters, digits, _ and -."""
    data: Path | None = None
    """The folder with the prompts' images, to show them."""


@dataclass(frozen=True)
class Report:
    """Print tables of safe, unsafe and unsure answers, refusals, over-refusals, and whether models differ."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """The --out of evaluations, or logs of red teaming."""
    labels: tuple[Path, ...] = ()
    """More files of labels, for a single path."""
    refusals: Path | None = None
    """Starts of refusals, one per line; None is the rule that the answers were scored by."""
    to: Path | None = None
    """File to write; None: print."""


@dataclass(frozen=True)
class Paper:
    """Recompute the paper's Table 5 from its counts."""

    to: Path | None = None
    """File to write; None: print."""


Command = (
    Annotated[Label, tyro.conf.subcommand("label")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Paper, tyro.conf.subcommand("paper")]
)


def label(args: Label) -> None:
    from nanochameleon.evaluate.harm.terminal import annotate

    annotate(args.out, args.annotator, args.data)


def report(args: Report) -> None:
    if not args.paths:
        raise UserError("the paths are missing: give the --out of an evaluation, or a log of red teaming")
    if args.labels and len(args.paths) > 1:
        raise UserError("--labels is for a single path: put each model's labels into OUT/safety/labels")
    for path in (*args.paths, *args.labels):
        if not path.exists():
            raise UserError(f"{path} is not there: give the --out of an evaluation, or a file")
    from nanochameleon.evaluate.harm.refusals import read_rule
    from nanochameleon.evaluate.harm.report import read_results, report

    rule = read_rule(args.refusals) if args.refusals else None
    output(report([each for path in args.paths for each in read_results(path, args.labels, rule)]), args.to)


def paper(args: Paper) -> None:
    from nanochameleon.evaluate.harm.paper import report

    output(report(), args.to)


COMMANDS = {Label: label, Report: report, Paper: paper}


def main(arguments: Sequence[str]) -> None:
    args = parse(Command, arguments, description=__doc__, prog="python -m nanochameleon.evaluate safety")
    COMMANDS[type(args)](args)


def cli(arguments: list[str]) -> None:
    """The command line."""
    exit_on_user_error(lambda: main(arguments))
