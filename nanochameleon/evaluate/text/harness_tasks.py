"""Task files for lm-evaluation-harness: its own tasks, on files that the user has.

    read_split (files.py) -> FOLDER/TASK-SPLIT.jsonl, and FOLDER/TASK.yaml, which includes the built-in task and
    replaces its data

A task keeps its built-in name, prompt, metrics and version. Only splits that are needed are written: that with the
questions, and that with the examples if there are any. Groups such as mmlu hold the subjects that the files have.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.text.files import SOURCES, Rows, read_split
from nanochameleon.files import write_file

BUILT_IN = {  # set -> its files in lm_eval/tasks
    "piqa": ["piqa/piqa.yaml"],
    "social_iqa": ["siqa/siqa.yaml"],
    "hellaswag": ["hellaswag/hellaswag.yaml"],
    "winogrande": ["winogrande/default.yaml"],
    "arc_easy": ["arc/arc_easy.yaml"],
    "arc_challenge": ["arc/arc_challenge*.yaml"],
    "openbookqa": ["openbookqa/openbookqa.yaml"],
    "boolq": ["super_glue/boolq/default.yaml"],
    "gsm8k": ["gsm8k/*.yaml"],
    "math": ["hendrycks_math/hendrycks_math_*.yaml", "minerva_math/minerva_math_*.yaml"],
    "mmlu": ["mmlu/default/mmlu_*.yaml"],
}
AREAS = "stem", "humanities", "social_sciences", "other"  # of MMLU
GROUPS = {"math": ["hendrycks_math", "minerva_math"], "mmlu": ["mmlu", *(f"mmlu_{area}" for area in AREAS)]}
SPLITS = "training_split", "validation_split", "test_split", "fewshot_split"  # which key of a task names which split


@dataclass(frozen=True)
class BuiltIn:
    set: str
    path: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return self.config["task"]

    @property
    def subject(self) -> str | None:
        """The part of the set that the task asks; None for all of it."""
        return self.config["dataset_name"] if self.set in ("math", "mmlu") else None

    @property
    def questions(self) -> str:
        return self.config.get("test_split") or self.config["validation_split"]

    @property
    def fixed_examples(self) -> bool:
        """Does the task bring its examples along?"""
        return "samples" in self.config.get("fewshot_config", {})

    def n_examples(self, shots: int | None) -> int:
        """How many examples stand before each question. lm-eval never changes a task that says 0."""
        own = self.config.get("num_fewshot")
        return own or 0 if shots is None or own == 0 else shots

    def splits(self, shots: int | None) -> set[str]:
        """The splits that must be written."""
        if self.fixed_examples or not self.n_examples(shots):
            return {self.questions}
        return {self.questions, self.config.get("fewshot_split") or self.config["training_split"]}


class Loader(yaml.SafeLoader):
    """Reads a task file without running the functions that it names."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read_task(path: Path) -> dict[str, Any]:
    """Return the content of a task file, with that of the files that it includes."""
    config = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    base = config.pop("include", None)
    return read_task(path.parent / base) | config if base else config


def built_in(names: Iterable[str] = tuple(BUILT_IN)) -> dict[str, BuiltIn]:
    """Return lm-eval's own tasks of these sets, by name."""
    folder = Path(find_spec("lm_eval").origin).parent / "tasks"
    paths = [(name, path) for name in names for pattern in BUILT_IN[name] for path in sorted(folder.glob(pattern))]
    tasks = [BuiltIn(name, path, read_task(path)) for name, path in paths]
    return {task.name: task for task in tasks if not task.name.endswith("math500")}  # other data


def groups(tasks: dict[str, BuiltIn]) -> dict[str, list[str]]:
    """Return the members of each group. Those of mmlu are groups, too."""
    found = {group: [name for name in tasks if name.startswith(group)] for group in GROUPS["math"]}
    for area in AREAS:
        found[f"mmlu_{area}"] = [name for name, task in tasks.items() if task.config.get("tag") == f"mmlu_{area}_tasks"]
    return found | {"mmlu": [f"mmlu_{area}" for area in AREAS]}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_tasks(names: Sequence[str], data: Path | None, folder: Path, shots: int | None) -> dict[str, str]:
    """Write what lm-eval needs for these tasks or groups. Returns {name: what is wrong} of those it cannot run.

    Raises UserError for a name that does not exist.
    """
    tasks, problems = built_in(), {}
    families, read = groups(tasks), Splits(data)
    for name in names:
        if name not in tasks and name not in families:
            raise UserError(
                f"there is no task {shown(repr(name))} of the ten sets: see --tasks list, or give your own NAME.yaml"
            )
        try:
            if not write_group(name, tasks, families, read, folder, shots):
                raise UserError(f"{data} has no items of {name}: bring the whole set, or leave the task out")
        except UserError as error:
            problems[name] = str(error)
    return problems


class Splits:
    """The rows of each split, read once."""

    def __init__(self, data: Path | None):
        self.data, self.rows = data, {}

    def __call__(self, task: BuiltIn, split: str) -> list[dict]:
        if (task.set, split) not in self.rows:
            self.rows[task.set, split] = by_subject(task.set, read_split(task.set, self.data, split))
        return self.rows[task.set, split].get(task.subject, [])


def by_subject(name: str, rows: Rows) -> dict[str | None, list[dict]]:
    """Return the rows of each subject; of a set without subjects, {None: all rows}."""
    found: dict[str | None, list[dict]] = {}
    for _, row in rows:
        subject = None
        if name == "mmlu":
            subject = row["subject"]
        elif name == "math":  # "Counting & Probability" -> counting_and_probability, the name of the hub
            subject = row["type"].lower().replace("&", "and").replace(" ", "_")
        found.setdefault(subject, []).append(row)
    return found


def write_group(name: str, tasks: dict, families: dict, read: Splits, folder: Path, shots: int | None) -> bool:
    """Write a task, or a group with all its members that have items. Returns whether there are any."""
    if name in tasks:
        return write_task(tasks[name], read, folder, shots)
    members = [each for each in families[name] if write_group(each, tasks, families, read, folder, shots)]
    if members:
        metrics = ["acc"] if name.startswith("mmlu") else ["exact_match"]
        metrics += ["math_verify"] if name == "minerva_math" else []
        means = [{"metric": metric, "aggregation": "mean", "weight_by_size": True} for metric in metrics]
        save(folder / f"{name}.yaml", {"group": name, "task": members, "aggregate_metric_list": means})
    return bool(members)


def write_task(task: BuiltIn, read: Splits, folder: Path, shots: int | None) -> bool:
    """Write a task and its data. Returns False if there are no questions."""
    if not read(task, task.questions):
        return False
    n, files = task.n_examples(shots), {}
    if task.fixed_examples and n > (most := task.config["num_fewshot"]):
        raise UserError(f"{task.name} brings {most} examples along: --shots must be at most {most}, not {n}")
    for split in sorted(task.splits(shots)):
        rows = read(task, split)
        if split != task.questions and len(rows) < n:
            raise UserError(f"{task.name} has {len(rows)} rows in its {split} split: {n} examples need at least {n}")
        files[split] = str(folder / f"{task.name}-{split}.jsonl")
        write_file(Path(files[split]), "".join(json.dumps(row) + "\n" for row in rows).encode())
    unused = {key: None for key in SPLITS if task.config.get(key) and task.config[key] not in files}
    config = {"include": str(task.path), "task": task.name, "dataset_path": "json", "dataset_name": None}
    config["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    save(folder / f"{task.name}.yaml", config | unused)
    return True


def save(path: Path, content: dict) -> None:
    write_file(path, yaml.safe_dump(content, sort_keys=False).encode())


# ---------------------------------------------------------------------------------------------------------------------
# The list


def listed() -> str:
    """Return a line for each set: the file that holds its questions, and lm-eval's tasks of it."""
    lines = ["set             questions (or the hub's parquet)   tasks"]
    for name in BUILT_IN:
        tasks = built_in([name])
        split = next(iter(tasks.values())).questions
        one = ", ".join([*tasks][-1:] if name in GROUPS else tasks)
        many = f"{', '.join(GROUPS[name])}, or one of their subjects, such as " if name in GROUPS else ""
        lines.append(f"{name:15} {SOURCES[name].splits[split]:34} {many}{one}")
    return "\n".join(lines)
