"""Runs tasks of lm-evaluation-harness on a model, offline.

    python -m nanochameleon.evaluate harness models/toy --tasks list
    python -m nanochameleon.evaluate harness runs/mine --tasks hellaswag,gsm8k_cot --data benchmarks --limit 100
    python -m nanochameleon.evaluate harness runs/mine --tasks my_task.yaml

MODEL is a run, models/toy or a model in any layout. --tasks takes lm-eval's names for the ten sets of the paper, whose
files --data holds, and paths of task files of your own. OUT gets results.json and, for each task,
samples_TASK.jsonl: a line for each item, with lm-eval's hashes of the item, its prompt and its target.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import tyro

from nanochameleon.cli import MAX_SEED, parse
from nanochameleon.errors import UserError, exit_on_user_error, say, shown, warn
from nanochameleon.files import check_writable, is_safe_name, write_file

MISSING = "lm-evaluation-harness is missing: pip install -c constraints.txt -e '.[eval]'"


@dataclass(frozen=True)
class Args:
    """Run tasks of lm-evaluation-harness on a model."""

    model: tyro.conf.Positional[Path | None] = None
    """A run, such as runs/toy, or a model in our, Hugging Face's or Meta's layout."""
    tasks: str = ""
    """lm-eval's names of tasks, and paths of .yaml files, joined by commas; `list` shows the names."""
    data: Path | None = None
    """The folder with the benchmarks' files: the authors', or the hub's parquet."""
    limit: int | None = None
    """Ask at most this many items of each task."""
    out: Path | None = None
    """Folder for results and samples; None is MODEL/harness."""
    shots: int | None = None
    """Examples before each question; None is as many as the task says."""
    chat: bool = False
    """End the user's turn after each context, and an answer at the end of the model's turn."""
    seed: int = 1234
    """Of the choice of examples, and of samples. 1234 is lm-eval's own."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the transformer's weights; auto keeps that of its files."""

    def check(self) -> None:
        """Raise UserError, naming the option, for a value out of range."""
        for name, good, requested in (
            ("limit", self.limit is None or self.limit >= 1, "1 or more"),
            ("shots", self.shots is None or self.shots >= 0, "0 or more"),
            ("seed", 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
            ("data", self.data is None or self.data.is_dir(), "a folder"),
        ):
            if not good:
                raise UserError(f"--{name} must be {requested}, not {shown(getattr(self, name))}")
        if not self.names:
            raise UserError("--tasks is missing: give names, such as --tasks hellaswag, or see --tasks list")
        if self.model is None:
            raise UserError("the model is missing: give a folder, such as models/toy")
        if not self.model.is_dir():
            raise UserError(f"there is no folder {shown(self.model)}: give a model, such as models/toy")
        if missing := next((name for name in self.names if is_path(name) and not Path(name).is_file()), None):
            raise UserError(f"there is no file {shown(missing)}: give the path of a task file")

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip()))


def is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def main(args: Args) -> dict[str, Any] | None:
    """Print the list of tasks, or evaluate and return what lm-eval returns."""
    if find_spec("lm_eval") is None:
        raise UserError(MISSING)
    if args.tasks == "list":
        from nanochameleon.evaluate.text.harness_tasks import listed

        return say(listed())
    args.check()
    out = args.out or args.model / "harness"
    with writing(out):
        check_writable(out)  # before hours of answers
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update(offline(Path(folder)))  # before the import of datasets, which reads them once
        return run_tasks(args, Path(folder), out)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise UserError for an OSError within, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from None


def run_tasks(args: Args, folder: Path, out: Path) -> dict[str, Any]:
    """Run what can be run, then raise UserError if something could not."""
    from nanochameleon.evaluate.text.harness_tasks import write_tasks

    problems = write_tasks([name for name in args.names if not is_path(name)], args.data, folder, args.shots)
    for problem in problems.values():
        warn(problem)
    if names := [str(Path(name).resolve()) if is_path(name) else name for name in args.names if name not in problems]:
        results = evaluate(args, names, folder)
        with writing(out):
            write_results(results, out)
        say(summary(results, out))
    if problems:
        raise UserError(f"{len(problems)} of {len(args.names)} tasks were not run: {next(iter(problems.values()))}")
    return results


def offline(folder: Path) -> dict[str, str]:
    """Environment variables that keep datasets and its relatives from the network and from the home directory."""
    off = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    homes = {"HF_HOME": folder / "home", "HF_DATASETS_CACHE": folder / "cache", "HF_MODULES_CACHE": folder / "modules"}
    return dict.fromkeys(off, "1") | {name: str(path) for name, path in homes.items()}


def evaluate(args: Args, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Load the tasks, then the model, and ask."""
    import logging

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from nanochameleon.evaluate.header import describe_model, describe_session
    from nanochameleon.evaluate.task import Options
    from nanochameleon.evaluate.text.harness_model import Harness
    from nanochameleon.weights.model_folder import open_model

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = load(manager, names)
    run = open_model(args.model, args.device, args.dtype)
    model = Harness(run, args.chat, args.seed, str(args.model))
    seeds = dict.fromkeys(("numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), args.seed)
    how = dict(num_fewshot=args.shots, limit=args.limit, task_manager=manager, **seeds)
    results = simple_evaluate(model, tasks=tasks, **how)
    results["requests"] = {"asked": model.n_requests, "truncated": model.n_truncated}
    options = Options(args.data, args.limit, args.seed, args.shots)
    results["nanochameleon"] = describe_model(run, args.model) | describe_session(run, names, options)
    return results


def load(manager, names: Sequence[str]) -> list:
    """Return lm-eval's objects of tasks and groups. Raises UserError for a task file of the user that does not load."""
    found, where = [], {}
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # a task file may run Python of the user's
            if not is_path(name):
                raise
            raise UserError(f"{name} is no task that lm-eval can load offline ({shown(error, 120)}): mend it") from None
        for task in loaded["tasks"]:
            if (other := where.setdefault(task, name)) != name:
                raise UserError(f"{task} is in {other} and in {name}: leave one of them out")
        found += [next(iter(loaded["groups"].values()))] if loaded["groups"] else loaded["tasks"].values()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Results


def write_results(results: dict[str, Any], out: Path) -> None:
    from lm_eval.utils import handle_non_serializable

    def to_json(value: Any, **how) -> str:
        return json.dumps(value, default=handle_non_serializable, **how) + "\n"

    rest = {name: value for name, value in results.items() if name != "samples"}
    write_file(out / "results.json", to_json(rest, indent=1).encode())
    for task, samples in results["samples"].items():
        name = task if is_safe_name(task) else "".join(c if c.isalnum() else "_" for c in task)
        write_file(out / f"samples_{name}.jsonl", "".join(map(to_json, samples)).encode())


def summary(results: dict[str, Any], out: Path) -> str:
    """Return a table of all figures, and sentences on what they rest on."""
    rows = [("task", "measure", "value", "standard error", "items", "examples")]
    for task, measures in results["results"].items():
        items, shots = results["n-samples"].get(task, {}).get("effective", ""), results["n-shot"].get(task, "")
        rows += [(task, *row, str(items), str(shots)) for row in figures(measures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    asked, cut = results["requests"]["asked"], results["requests"]["truncated"]
    if cut:
        lines.append(f"{cut:,} of {asked:,} requests were longer than the model's context: their left ends were cut")
    return "\n".join([*lines, f"results and samples are in {out}"])


def figures(measures: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """lm-eval's {"acc,none": 0.5, "acc_stderr,none": 0.1, ...} -> ("acc", "0.5000", "0.1000"), ..."""
    for name, value in measures.items():
        measure, _, how = name.partition(",")
        if how and not measure.endswith("_stderr"):
            error = measures.get(f"{measure}_stderr,{how}")
            yield (measure if how == "none" else f"{measure} ({how})", number(value), number(error))


def number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else str("" if value is None else value)


def cli(arguments: list[str]) -> None:
    """The command line: python -m nanochameleon.evaluate harness ..."""
    program = "python -m nanochameleon.evaluate harness"
    exit_on_user_error(lambda: main(parse(Args, arguments, description=__doc__, prog=program)))
