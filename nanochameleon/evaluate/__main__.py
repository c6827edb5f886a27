"""The paper's evaluations: text, captions, questions, images, people, safety.

    python -m nanochameleon.evaluate models/toy --tasks list                      every task, and the files it wants
    python -m nanochameleon.evaluate models/toy --tasks shapes_choice --limit 200
    python -m nanochameleon.evaluate runs/mine --tasks arc_easy,hellaswag,gsm8k --data benchmarks
    python -m nanochameleon.evaluate runs/mine --rescore                          scores again, without the model
    python -m nanochameleon.evaluate compare OUT_A OUT_B                          two models, item by item

MODEL is a run, models/toy or a model in any layout. Nothing is downloaded: --data is a folder with the benchmarks'
files. An evaluation that was stopped is resumed by the same command. More commands, each with its --help: COMMANDS.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nanochameleon.cli import MAX_SEED, parse
from nanochameleon.errors import UserError, exit_on_user_error, say, shown

if TYPE_CHECKING:  # torch is imported after the arguments are parsed, so that mistakes in them are found at once
    from nanochameleon.evaluate.task import Options, Task

COMMANDS = {
    "draw": "drawing.command",
    "human": "people.command",
    "safety": "safety",
    "compare": "compare",
    "contamination": "contamination",
    "harness": "text.harness",
}
PROGRAM = "python -m nanochameleon.evaluate"
FOLDER = "evaluation"  # in the model's folder, where --out is not given


@dataclass(frozen=True)
class Args:
    """Run tasks on a model and write tables of the results."""

    model: tyro.conf.Positional[Path | None] = None
    """A run, such as runs/toy, or a model in our, Hugging Face's or Meta's layout."""
    tasks: str = ""
    """Names of tasks, joined by commas; `list` shows them."""
    data: Path | None = None
    """The folder with the benchmarks' files."""
    limit: int | None = None
    """Ask at most this many items of each task."""
    out: Path | None = None
    """Folder for logs and tables; None is MODEL/evaluation."""
    seed: int = 0
    """Of shots and samples: the same seed gives the same answers."""
    shots: int | None = None
    """Examples before each question; None is as many as the paper has."""
    samples: int = 1
    """Answers to each item, of which the majority counts (maj@k)."""
    rescore: bool = False
    """Score the logs in --out again, without the model; without --tasks all of them."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Type of the transformer's weights; auto keeps that of its files."""
    vqgan: Path | None = None
    """A file with the image decoder, for a model from transformers, which drops it."""

    def check(self) -> None:
        """Raise UserError, naming the option, for a value that no task could take."""
        for name, good, requested in (
            ("limit", self.limit is None or self.limit >= 1, "1 or more"),
            ("seed", 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
            ("shots", self.shots is None or self.shots >= 0, "0 or more"),
            ("samples", self.samples >= 1, "1 or more"),
            ("data", self.data is None or self.data.is_dir(), "a folder"),
        ):
            if not good:
                raise UserError(f"--{name} must be {requested}, not {shown(getattr(self, name))}")
        if self.model is None and not (self.rescore and self.out):
            raise UserError("the model is missing: give a folder, such as models/toy")
        if not (self.tasks or self.rescore) and not self.model.exists():
            commands = ", ".join(COMMANDS)
            raise UserError(f"there is no model and no command {shown(str(self.model))!r}: commands are {commands}")
        if not (self.tasks or self.rescore):
            raise UserError("--tasks is missing: give names, such as --tasks arc_easy,boolq, or see --tasks list")
        names = self.names
        if "" in names:
            raise UserError("--tasks has an empty name: join names by single commas")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"--tasks has {shown(twice)} twice: name it once")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",")] if self.tasks else []

    @property
    def options(self) -> "Options":
        from nanochameleon.evaluate.task import Options

        out = self.out or self.model / FOLDER
        return Options(self.data, self.limit, self.seed, self.shots, self.samples, out=out)


def main(args: Args) -> None:
    if args.tasks == "list":
        from nanochameleon.evaluate.tasks import TASKS

        say(listed(TASKS))
        return
    args.check()
    from nanochameleon.evaluate.runner import evaluate, rescore, tasks_in
    from nanochameleon.evaluate.tasks import TASKS, pick

    tasks, options = pick(args.names), args.options
    if args.rescore:
        rescore(tasks or tasks_in(options.out, TASKS), options)
    else:
        check_taken(args, tasks)
        evaluate(args.model, tasks, options, args.device, args.dtype, args.vqgan)


def check_taken(args: Args, tasks: "Sequence[Task]") -> None:
    """Raise UserError for an option that no task takes: its figures would not be what the user asked for."""
    for name, given in (("shots", args.shots is not None), ("samples", args.samples != 1)):
        if given and not any(name in task.takes for task in tasks):
            raise UserError(f"--{name} changes nothing in {', '.join(args.names)}: leave it out")


def listed(tasks: "Sequence[Task]") -> str:
    """Return a paragraph for each task: its name, what it is, which files it wants, where people get them."""
    parts = []
    for task in tasks:
        files = [f"    files  {task.files}", f"    from   {task.source}"] if task.files else ["    files  none"]
        parts.append("\n".join([f"{task.name:20} {task.title}", *files]))
    return "\n".join(parts)


def start(arguments: list[str]) -> None:
    """Run a command that has options of its own, or evaluate."""
    if arguments and arguments[0] in COMMANDS:
        return import_module(f"nanochameleon.evaluate.{COMMANDS[arguments[0]]}").cli(arguments[1:])
    return main(parse(Args, arguments, description=__doc__.replace("COMMANDS", ", ".join(COMMANDS)), prog=PROGRAM))


if __name__ == "__main__":
    exit_on_user_error(lambda: start(sys.argv[1:]))
