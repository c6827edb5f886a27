"""Run tasks: items are read, asked a chunk at a time, logged and scored; then the tables are written.

    read (all tasks) -> open the model -> for each chunk: answer -> score -> log -> tables

A fault of one task does not stop the others. The command ends with exit code 2 after all else is done, if a task could
not be run or an item could not be asked. After Ctrl-C or a kill, the same command resumes (log.py).
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from nanochameleon.data.build import world
from nanochameleon.errors import Interrupted, UserError, say, shown, warn
from nanochameleon.evaluate import header as headers
from nanochameleon.evaluate.log import (
    ITEMS,
    PROBLEM,
    Log,
    make_line,
    read_lines,
    rescored,
    to_bytes,
    total_seconds,
    writing,
)
from nanochameleon.evaluate.records import check_ids
from nanochameleon.evaluate.results import HTML, task_result, write_results
from nanochameleon.evaluate.table import duration, summary
from nanochameleon.evaluate.task import Item, Line, Options, Task
from nanochameleon.files import write_file
from nanochameleon.generation.quantize import quantize_
from nanochameleon.kernels import use_kernels
from nanochameleon.training.modes import sampling_mode
from nanochameleon.training.run import Run, command
from nanochameleon.training.run_folder import claim
from nanochameleon.weights.model_folder import open_config, open_model

SAVE_EVERY = 60.0  # seconds, while items are asked again
WORTH_SAYING = 5.0  # seconds: less time is left before anybody has read how much


@dataclass
class Faults:
    """The sentences of tasks that could not be run and of items that could not be asked."""

    tasks: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)

    def task(self, name: str, sentence: str) -> None:
        self.tasks.append(sentence)
        warn(f"{name} is left out: {sentence}")

    def check(self) -> None:
        """Raise UserError if there was any fault."""
        if found := self.tasks + self.items:
            counts = [(self.tasks, "task", "could not be run"), (self.items, "item", "could not be asked")]
            what = " and ".join(f"{len(n):,} {noun}{'s'[: len(n) > 1]} {verb}" for n, noun, verb in counts if n)
            raise UserError(found[0] if len(found) == 1 else f"{what}; the first: {found[0]}")


# ---------------------------------------------------------------------------------------------------------------------
# Asking a model


def evaluate(
    model: Path, tasks: Sequence[Task], options: Options, device: str = "auto", dtype: str = "auto",
    vqgan: Path | None = None,
) -> dict:  # fmt: skip
    """Run the tasks and write options.out. Returns what results.json holds.

    Raises UserError at the end if a task could not be run or an item could not be asked, Interrupted after Ctrl-C.
    """
    out, faults, start = options.out, Faults(), time.monotonic()
    options = replace(options, world=world(open_config(model).data))
    with claim(out, "evaluates"):
        header = headers.read_header(out)
        asked = read_all(tasks, options, faults)
        run = open_model(model, device, "auto" if dtype == "int8" else dtype, vqgan)
        if dtype == "int8":
            quantize_(run.model)
        try:
            with sampling_mode(), use_kernels("auto"):
                begin(header, run, model, asked, options)
                results = ask_all(run, asked, options, header, faults)
        except KeyboardInterrupt:
            say(f"\nstopped; what was answered is kept, and this resumes: {same_command()}", file=sys.stderr)
            raise Interrupted from None
        header["sessions"][-1]["seconds"] = round(time.monotonic() - start, 1)
        headers.write_header(out, header)
        content = write_results(out, header, results)
    say(summary(content))
    say(out / HTML)
    faults.check()
    return content


def read_all(tasks: Sequence[Task], options: Options, faults: Faults) -> list[tuple[Task, list[Item]]]:
    """Return the tasks that can be run, with their items. Raises UserError if there are none."""
    asked = []
    for task in tasks:
        try:
            items = task.read(options)
            if not items:
                raise UserError(f"{task.name} has no items: look at its file, or leave the task out")
            check_ids((f"{task.name}: an item", item.id) for item in items)
            asked.append((task, items))
        except UserError as error:
            if len(tasks) == 1:
                raise
            faults.task(task.name, str(error))
    if not asked:
        faults.check()
    return asked


def begin(header: dict, run: Run, model: Path, asked: Sequence[tuple[Task, list[Item]]], options: Options) -> None:
    """Check that the folder belongs to this model and these options, and add a session to its header."""
    described = headers.describe_model(run, model)
    chosen = {name: getattr(options, name) for name in ("seed", "shots", "samples")}
    headers.check_same(options.out, header, described, chosen)
    header |= {"model": described, "options": chosen}
    header["sessions"].append(headers.describe_session(run, [task.name for task, _ in asked], options))
    headers.write_header(options.out, header)
    counts = ", ".join(f"{task.name} {len(items):,}" for task, items in asked)
    say(f"{sum(len(items) for _, items in asked):,} items ({counts}) -> {options.out}")


def ask_all(
    run: Run, asked: Sequence[tuple[Task, list[Item]]], options: Options, header: dict, faults: Faults
) -> dict[str, dict]:
    """Return the result of each task. A UserError ends its task alone."""
    results = {}
    for task, items in asked:
        folder = options.out / task.name
        try:
            log = Log(folder, items, task.chunk)
            header["tasks"][task.name] = len(items)  # not before: a log of other items keeps its own number
            headers.write_header(options.out, header)
            if 0 < len(log.lines) < len(items):
                headers.check_sessions(header, task.name)
            ask_again(run, task, items, options, log)
            ask(run, task, items, options, log)
            export(task, log.lines, options)
        except UserError as error:
            faults.task(task.name, str(error))
            continue
        left_out = [line for line in log.lines if PROBLEM in line.output]
        faults.items += [f"{task.name}, item {shown(line.id)}: {line.output[PROBLEM]}" for line in left_out]
        results[task.name] = task_result(task, log.lines, len(items), total_seconds(folder))
    return results


def ask_again(run: Run, task: Task, items: Sequence[Item], options: Options, log: Log) -> None:
    """Ask the items again that could not be asked: a missing image may be there now.

    If it is, its whole chunk is asked, because a batch changes the last digits of its answers. The log of VQAv2 has
    hundreds of MB, so it is not written again for each chunk.
    """
    saved, changed = time.monotonic(), False
    try:
        for start in range(0, len(log.lines), task.chunk):
            chunk = items[start : start + task.chunk]
            pairs = zip(chunk, log.lines[start : start + task.chunk], strict=True)
            left_out = [item for item, line in pairs if PROBLEM in line.output]
            answers = task.answer(run, left_out, options) if left_out else []
            if any(PROBLEM not in answer.output for answer in answers):
                if len(left_out) < len(chunk):
                    answers = task.answer(run, chunk, options)
                log.replace(start, [make_line(task, *pair) for pair in zip(chunk, answers, strict=True)])
                changed = True
            if changed and time.monotonic() - saved > SAVE_EVERY:
                log.save()
                saved, changed = time.monotonic(), False
    finally:
        if changed:
            log.save()


def ask(run: Run, task: Task, items: Sequence[Item], options: Options, log: Log) -> None:
    """Ask the items that the log does not have yet."""
    first = len(log.lines)
    with tqdm(total=len(items), initial=first, desc=task.name, unit="item", disable=None) as bar:
        while (start := len(log.lines)) < len(items):
            chunk, begun = items[start : start + task.chunk], time.monotonic()
            answers = task.answer(run, chunk, options)
            log.append([make_line(task, *pair) for pair in zip(chunk, answers, strict=True)], time.monotonic() - begun)
            bar.update(len(chunk))
            left = (time.monotonic() - begun) / len(chunk) * (len(items) - len(log.lines))
            if bar.disable and start == first and left > WORTH_SAYING:  # a bar says so itself
                say(f"{task.name}: about {duration(left)} left")


def export(task: Task, lines: Sequence[Line], options: Options) -> None:
    """Write the files that official scorers read, if the task has any."""
    if task.export:
        with writing(options.out / task.name):
            task.export(lines, options, options.out / task.name)


def same_command() -> str:
    return command("-m", "nanochameleon.evaluate", *sys.argv[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Scoring again


def rescore(tasks: Sequence[Task], options: Options) -> dict:
    """Score the lines of options.out again, without a model, and write the tables. Returns what results.json holds."""
    out = options.out
    if not (out / headers.HEADER).exists():
        raise UserError(f"{out} holds no evaluation: give the --out of one")
    with claim(out, "evaluates"):
        header, results = headers.read_header(out), {}
        for task in tasks:
            total, lines = header["tasks"].get(task.name, 0), rescore_log(task, out / task.name)
            if total and len(lines) == total:
                export(task, lines, headers.options_of(header, task.name, options))
            results[task.name] = task_result(task, lines, total, total_seconds(out / task.name))
        content = write_results(out, header, results)
    say(summary(content))
    say(out / HTML)
    return content


def rescore_log(task: Task, folder: Path) -> list[Line]:
    """Score the lines of one log. Its file is written only where a score changes."""
    if not (folder / ITEMS).exists():
        raise UserError(f"{folder} has no {ITEMS}: {task.name} was not run into this --out")
    lines = read_lines(folder / ITEMS)
    new = [rescored(task, line) for line in lines]
    if changed := sum(a != b for a, b in zip(lines, new, strict=True)):
        with writing(folder / ITEMS):
            write_file(folder / ITEMS, to_bytes(new))
        say(f"{task.name}: {changed:,} of {len(lines):,} items have another score than before")
    return new


def tasks_in(out: Path, tasks: Sequence[Task]) -> list[Task]:
    """Return those of the tasks that have a log in a folder."""
    return [task for task in tasks if (out / task.name / ITEMS).exists()]
