"""The text benchmarks as people have them: the authors' files, or the hub's parquet. Both give the same rows.

    read_split(name, data, split) -> [(place, row)]      find the files -> read them -> convert -> check each row

Rows have the hub's fields, of which those are kept that a prompt or a score needs (rows.py). Splits have the hub's
names: train, validation, test, and dev for MMLU's shots. A place is "file:line"; of parquet, "file:row".

The folder may be DATA, or DATA/NAME where several sets share one, and may hold what the authors' archive unpacks to,
its own folders included. Left out: archives, which are not unpacked, and downloads.
Formats: each set's repository, and the loaders that the hub had for them.
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.records import check_ids, find_file, read_json_file, read_json_lines, read_text
from nanochameleon.evaluate.text.rows import AUTHORS_ROW, HUB_ROW, one_of

Rows = list[tuple[str, Any]]
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Source:
    """Where a set's files lie. All are patterns relative to DATA or DATA/NAME; several of a kind are tried in order."""

    splits: dict[str, str]  # split -> the authors' file
    folders: tuple[str, ...] = ("",)  # of the authors' archive
    names: tuple[str, ...] = ()  # NAME may be one of these, too
    configs: tuple[str, ...] = ("", "data", "default", "plain_text")  # folders of the hub's parquet
    labels: str = ""  # the labels of a file that has them alone, one per line: dev-labels.lst next to dev.jsonl
    id: str = ""  # the field whose values differ, where there is one


def train_dev(folder: str) -> dict[str, Any]:
    return dict(splits={"train": "train.jsonl", "validation": "dev.jsonl"}, folders=("", folder))


def arc(part: str) -> Source:
    files = {split: f"{part}-{end}.jsonl" for split, end in zip(SPLITS, ("Train", "Dev", "Test"), strict=True)}
    folders = ("", part, f"ARC-V1-Feb2018-2/{part}")
    return Source(files, folders, names=("arc", "ai2_arc", "ARC-V1-Feb2018-2"), configs=(part, ""), id="id")


SPLITS = ("train", "validation", "test")
SOURCES = {
    "piqa": Source(**train_dev("physicaliqa-train-dev"), labels="01"),
    "social_iqa": Source(**train_dev("socialiqa-train-dev"), names=("siqa",), labels="123"),
    "hellaswag": Source({"train": "hellaswag_train.jsonl", "validation": "hellaswag_val.jsonl"}, ("", "data")),
    "winogrande": Source(
        {"train": "train_xl.jsonl", "validation": "dev.jsonl"},
        ("", "winogrande_1.1"),
        configs=("winogrande_xl", "", "data"),
        id="qID",
    ),
    "arc_easy": arc("ARC-Easy"),
    "arc_challenge": arc("ARC-Challenge"),
    "openbookqa": Source(
        {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"},
        ("OpenBookQA-V1-Sep2018/Data/Main", "Data/Main", "Main", ""),
        names=("obqa", "OpenBookQA-V1-Sep2018"),
        configs=("main", ""),
        id="id",
    ),
    "boolq": Source(**train_dev("BoolQ"), names=("super_glue",), configs=("boolq", "")),
    "gsm8k": Source(
        {"train": "train.jsonl", "test": "test.jsonl"},
        ("grade_school_math/data", "data", ""),
        names=("grade-school-math",),
        configs=("main", ""),
    ),
    "math": Source(
        {"train": "train/*/*.json", "test": "test/*/*.json"},
        ("MATH", ""),
        names=("MATH", "hendrycks_math"),
        configs=("*", ""),
    ),
    "mmlu": Source(
        {"dev": "dev/*_dev.csv", "validation": "val/*_val.csv", "test": "test/*_test.csv"},
        ("data", ""),
        configs=("all", "*", ""),
    ),
}


def read_split(name: str, data: Path | None, split: str) -> Rows:
    """Return [(place, row)] of a set's split, each row checked. Raises UserError for what a user can do wrong."""
    source, rows, ids = SOURCES[name], [], []
    for path in find_split(name, data, split):
        is_hub = path.suffix == ".parquet"
        for place, row in read_parquet(path) if is_hub else read_authors(source, path):
            if source.id in row:
                ids.append((place, str(row[source.id])))
            rows.append((place, HUB_ROW[name](row if is_hub else AUTHORS_ROW[name](row, place), place)))
    check_ids(ids)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def find_split(name: str, data: Path | None, split: str) -> list[Path]:
    """Return the files of a split: those of the first place that has any."""
    source = SOURCES[name]
    if data is None:
        raise UserError(f"--data is missing: give the folder that holds {name}, such as {source.splits[split]}")
    names = (name, *source.names)
    patterns = [f"{folder}/{source.splits[split]}" for folder in source.folders]
    for config in source.configs:
        patterns += [f"{config}/{split}{end}" for end in ("-*.parquet", "/*.parquet", ".parquet")]
    for home in (*(data / n for n in names), data):
        for pattern in patterns:
            if pattern.startswith("*") and home.name not in names:
                continue  # the folders in DATA itself may be those of other sets
            if found := [path for path in home.glob(pattern.lstrip("/")) if path.is_file()]:
                return sorted(found, key=in_order)
    raise UserError(f"{data} has no {split} split of {name}: {what_to_do(name, data, split)}")


def in_order(path: Path) -> tuple[Path, int, str]:
    """The key that puts 2.json before 10.json."""
    return path.parent, int(path.stem) if path.stem.isdecimal() else 0, path.name


def what_to_do(name: str, data: Path, split: str) -> str:
    """Name the archive that should be unpacked, or the file that should be there."""
    source = SOURCES[name]
    words = tuple(word.lower() for word in (name, *source.names, *filter(None, source.folders)))
    here = [
        path for path in sorted(data.glob("*")) if path.name.lower().startswith(tuple(w.split("/")[0] for w in words))
    ]
    inside = [path for n in (name, *source.names) for path in sorted((data / n).glob("*"))]
    for path in (*here, *inside):
        if path.name.endswith(ARCHIVES):
            return f"unpack {path} where it is"
    return f"put {source.splits[split]} or the hub's {split}-*.parquet into {data / name}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_authors(source: Source, path: Path) -> Rows:
    """Return [(place, what the authors' file holds there)]."""
    if path.suffix == ".csv":
        return read_csv(path)
    if path.suffix == ".json":
        return [(str(path), read_json_file(path))]
    rows = read_json_lines(path)
    return with_labels(rows, path, source.labels) if source.labels else rows


def with_labels(rows: Rows, path: Path, allowed: str) -> Rows:
    """Add each row's "label" from the file of labels."""
    labels_path = find_file(path.parent, f"{path.stem}-labels.lst")
    labels = [label.strip() for label in read_text(labels_path).rstrip().split("\n")]
    if len(labels) != len(rows):
        raise UserError(
            f"{labels_path} has {len(labels)} lines for the {len(rows)} items of {path.name}: unpack both files again"
        )
    for number, label in enumerate(labels, 1):
        one_of(label, allowed, "label", f"{labels_path}:{number}")
    return [(place, row | {"label": label}) for (place, row), label in zip(rows, labels, strict=True)]


def read_csv(path: Path) -> Rows:
    """Return [(place, {"columns": [...], "subject": ...})] of MMLU's files, which have no header."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    subject, rows, line = path.stem.rpartition("_")[0], [], 1
    try:
        for columns in reader:
            if columns:
                rows.append((f"{path}:{line}", {"columns": columns, "subject": subject}))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line} is not CSV ({shown(error)}): unpack the file again") from None
    return rows


def read_parquet(path: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f'{path} needs pyarrow: pip install "nanochameleon[eval]", or bring the authors\' files'
        ) from None
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
        # through JSON, so that a column of bytes or dates is a text, and found wrong by the check of the row
        rows = json.loads(json.dumps(rows, default=str))
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path} is no readable parquet file ({shown(error, 80)}): download it again") from None
    if not rows:
        raise UserError(f"{path} is empty: put the items there, or leave the task out")
    return [(f"{path}:{number}", row) for number, row in enumerate(rows, 1)]
