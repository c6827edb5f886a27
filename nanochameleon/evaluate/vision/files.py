"""Captions and questions about images, from the files that their authors publish.

    dataset_coco.json, dataset_flickr30k.json         Karpathy's splits, all references of an image
    coco_karpathy_test.json, coco_karpathy_train.json the same in BLIP's form
    v2_OpenEnded_mscoco_*_questions.json + v2_mscoco_*_annotations.json    VQAv2; without v2_ OK-VQA
    val.json, train.json                              VizWiz

Files and images are looked for in DATA and in the folders of FOLDERS, where archives put them. Training items are
examples for prompts. Test questions have no annotations in public: their references are empty.

Sources: cs.stanford.edu/people/karpathy/deepimagesent, github.com/salesforce/BLIP, visualqa.org/download.html,
okvqa.allenai.org/download.html, vizwiz.org/tasks-and-datasets/vqa.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.records import check_ids, find_file, get, image_path, read_json_file

FOLDERS = ("", "annotations", "images", "coco", "vqav2", "okvqa", "flickr30k", "vizwiz", "Annotations")


@dataclass(frozen=True, slots=True)
class Captioned:
    """An image and what people wrote about it."""

    id: str
    image: str  # such as "val2014/COCO_val2014_000000391895.jpg"
    references: Sequence[str]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about an image, and what ten people answered. Test questions have no references."""

    id: str
    image: str
    question: str
    references: Sequence[str]
    answer_type: str


def official_id(name: str) -> int | str:
    """Return an id as the official files have it: a number, if it is one."""
    return int(name) if name.isdecimal() else name


# ---------------------------------------------------------------------------------------------------------------------
# Where files and images are


def locate(data: Path | None, *names: str) -> Path:
    """Return the first of these files that is in the folder or in one of FOLDERS. Raises UserError."""
    if data is not None:
        for path in (data / folder / name for folder in FOLDERS for name in names):
            if path.is_file():
                return path
    return find_file(data, *names)


def find_image(data: Path, name: str) -> Path:
    """Return the path of an image: DATA/val2014/NAME, DATA/images/val2014/NAME, DATA/NAME, ... Raises UserError."""
    for folder in FOLDERS:
        for each in (name, PurePosixPath(name).name):
            path = image_path(data / folder, each, "an item")
            if os.path.isfile(path):  # unlike Path.is_file, never raises, however odd the name
                return path
    raise UserError(f"image {shown(name)} is not in {data}: put it there")


def is_there(data: Path, name: str) -> bool:
    try:
        return bool(find_image(data, name))
    except UserError:
        return False


def slim(row: dict) -> Any:
    """Keep the text of an answer or of a sentence alone: VQAv2 has millions, of a few thousand different texts."""
    text = row.get("raw") if "sentid" in row else row.get("answer")
    return sys.intern(text) if isinstance(text, str) else row


def objects(rows: list, path: Path, name: str) -> Iterator[tuple[str, dict]]:
    """Yield (place, object) for each entry of a list."""
    for number, row in enumerate(rows, 1):
        place = f"{path}: {name} {number}"
        if not isinstance(row, dict):
            raise UserError(f"{place} is not an object: the file is not of this kind")
        yield place, row


def texts(row: dict, name: str, place: str) -> list[str]:
    """Return a field that is a list of texts, at least one."""
    found = get(row, name, list, place)
    if not found or not all(isinstance(text, str) for text in found):
        raise UserError(f"{place} has {name!r} without texts: give at least one text, and texts alone")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def coco(data: Path | None, examples: bool) -> tuple[list[Captioned], list[Captioned]]:
    """Return the images of the test split, and those of the training split if examples are wanted."""
    path = locate(data, "dataset_coco.json", "coco_karpathy_test.json")
    if path.name == "dataset_coco.json":
        return karpathy(path, "")
    test = blip(path)
    check_ids((f"{path}: image {i}", row.id) for i, row in enumerate(test, 1))
    return test, blip(locate(data, "coco_karpathy_train.json")) if examples else []


def flickr30k(data: Path | None, examples: bool) -> tuple[list[Captioned], list[Captioned]]:
    return karpathy(locate(data, "dataset_flickr30k.json"), "flickr30k-images")


def karpathy(path: Path, folder: str) -> tuple[list[Captioned], list[Captioned]]:
    """Return (test, training) images. folder: that of images without a filepath. COCO trains on restval, too."""
    rows = list(objects(get(read_json_file(path, slim=slim), "images", list, str(path)), path, "image"))
    splits: dict[str, list[Captioned]] = {}
    for place, row in rows:
        inside = get(row, "filepath", str, place) if "filepath" in row else folder
        name = f"{inside}/{get(row, 'filename', str, place)}"
        number = str(get(row, "cocoid", int, place)) if "cocoid" in row else PurePosixPath(name).stem
        splits.setdefault(get(row, "split", str, place), []).append(
            Captioned(number, name, texts(row, "sentences", place))
        )
    check_ids((place, row.get("cocoid", row["filename"])) for place, row in rows)
    if "test" not in splits:
        raise UserError(f"{path} has no image of the split 'test': it is not one of Karpathy's files")
    return splits["test"], splits.get("train", []) + splits.get("restval", [])


def blip(path: Path) -> list[Captioned]:
    """[{"image": "val2014/NAME.jpg", "caption": [five texts]}]; in training files one text an entry."""
    found = []
    for place, row in objects(read_json_file(path, list), path, "image"):
        name = get(row, "image", str, place)
        number = re.search(r"(\d+)\.\w+$", name)
        if number is None:
            raise UserError(f"{place} names the image {shown(name)!r}: a number must precede its ending")
        captions = [row["caption"]] if isinstance(row.get("caption"), str) else texts(row, "caption", place)
        found.append(Captioned(str(int(number[1])), name, captions))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def vqav2(data: Path | None, examples: bool) -> tuple[list[Asked], list[Asked]]:
    return mscoco(data, "v2_", "val2014"), mscoco(data, "v2_", "train2014") if examples else []


def vqav2_test(data: Path | None, examples: bool) -> tuple[list[Asked], list[Asked]]:
    path = locate(data, *(f"v2_OpenEnded_mscoco_{split}2015_questions.json" for split in ("test", "test-dev")))
    return list(open_ended(path, None)), mscoco(data, "v2_", "train2014") if examples else []


def okvqa(data: Path | None, examples: bool) -> tuple[list[Asked], list[Asked]]:
    return mscoco(data, "", "val2014"), mscoco(data, "", "train2014") if examples else []


def mscoco(data: Path | None, version: str, split: str) -> list[Asked]:
    """Return the questions of a split with their annotations."""
    questions = locate(data, f"{version}OpenEnded_mscoco_{split}_questions.json")
    return list(open_ended(questions, locate(data, f"{version}mscoco_{split}_annotations.json")))


def open_ended(path: Path, annotations: Path | None) -> Iterator[Asked]:
    """Yield the questions of a file in the form of visualqa.org."""
    content = read_json_file(path)
    split = get(content, "data_subtype", str, str(path)).replace("test-dev", "test")
    rows = list(objects(get(content, "questions", list, str(path)), path, "question"))
    check_ids((place, get(row, "question_id", int, place)) for place, row in rows)
    answers = None if annotations is None else read_annotations(annotations)
    for place, row in rows:
        number = row["question_id"]
        if answers is not None and number not in answers:
            raise UserError(
                f"{place} has the question_id {number}, which {annotations} has not: use files of one split"
            )
        references, answer_type = answers[number] if answers is not None else ([], "")
        image = f"{split}/COCO_{split}_{get(row, 'image_id', int, place):012d}.jpg"
        yield Asked(str(number), image, get(row, "question", str, place), references, answer_type)


def read_annotations(path: Path) -> dict[int, tuple[list[str], str]]:
    """Return the answers, and the type of the answer, by question."""
    rows = list(objects(get(read_json_file(path, slim=slim), "annotations", list, str(path)), path, "annotation"))
    check_ids((place, get(row, "question_id", int, place)) for place, row in rows)
    return {
        row["question_id"]: (texts(row, "answers", place), sys.intern(get(row, "answer_type", str, place)))
        for place, row in rows
    }


def vizwiz(data: Path | None, examples: bool) -> tuple[list[Asked], list[Asked]]:
    return vizwiz_split(data, "val"), vizwiz_split(data, "train") if examples else []


def vizwiz_split(data: Path | None, split: str) -> list[Asked]:
    path = locate(data, f"{split}.json")
    rows = list(objects(read_json_file(path, list, slim), path, "question"))
    check_ids((place, get(row, "image", str, place)) for place, row in rows)
    return [
        Asked(
            row["image"],
            f"{split}/{row['image']}",
            get(row, "question", str, place),
            texts(row, "answers", place),
            get(row, "answer_type", str, place),
        )
        for place, row in rows
    ]
