"""Captions and questions in the forms of the published files, about images of a few pixels. All texts are made up."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CAPTIONS = {
    1: ["a red ball on grass", "the ball lies in a meadow"],
    2: ["two cats asleep", "a pair of cats"],
    3: ["a bus at night", "the last bus of the day", "a bus"],
}
TRAINING = {
    11: ["a kite in the sky"],
    12: ["three cups of tea"],
    13: ["an old bridge"],
    14: ["a dog\n and its  shadow"],
}
ANSWERS = {  # question id -> question, its answers, the type
    10: ("what is red?", ["ball"] * 7 + ["the ball"] * 3, "other"),
    20: ("how many cats are there?", ["2"] * 9 + ["3"], "number"),
    30: ("is it night?", ["yes"] * 10, "yes/no"),
}
TRAINING_ANSWERS = {number: (f"what is {number}?", ["a thing"] * 10, "other") for number in (110, 120, 130, 140)}


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)).save(path)


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def coco_name(split: str, number: int) -> str:
    return f"COCO_{split}_{number:012d}.jpg"


def write_images(folder: Path) -> None:
    """The images of COCO: tests in val2014, training images in train2014, two of which a split calls restval."""
    for number in CAPTIONS:
        write_image(folder / "val2014" / coco_name("val2014", number), number)
    for number in TRAINING:
        write_image(folder / "train2014" / coco_name("train2014", number), number)


def sentences(texts: list[str]) -> list[dict]:
    return [{"tokens": text.split(), "raw": text, "imgid": 0, "sentid": i} for i, text in enumerate(texts)]


def karpathy(splits: dict[int, tuple[str, str, list[str]]]) -> dict:
    """{number: (split, folder, references)} -> the content of dataset_coco.json."""
    images = [
        {"filepath": folder, "filename": coco_name(folder, number), "imgid": i, "cocoid": number, "split": split,
         "sentids": [], "sentences": sentences(texts)}
        for i, (number, (split, folder, texts)) in enumerate(splits.items())
    ]  # fmt: skip
    return {"dataset": "coco", "images": images}


def coco_content() -> dict:
    test = {number: ("test", "val2014", texts) for number, texts in CAPTIONS.items()}
    rest = {n: ("restval" if n > 12 else "train", "train2014", texts) for n, texts in TRAINING.items()}
    return karpathy({**test, **rest, 99: ("val", "val2014", ["not used"])})


def write_coco(folder: Path) -> Path:
    write_images(folder)
    return write_json(folder / "dataset_coco.json", coco_content())


def write_blip(folder: Path) -> Path:
    write_images(folder)
    training = [
        {"caption": text, "image": f"train2014/{coco_name('train2014', n)}", "image_id": f"coco_{n}"}
        for n, texts in TRAINING.items()
        for text in texts
    ]
    write_json(folder / "annotations" / "coco_karpathy_train.json", training)
    test = [{"image": f"val2014/{coco_name('val2014', n)}", "caption": texts} for n, texts in CAPTIONS.items()]
    return write_json(folder / "annotations" / "coco_karpathy_test.json", test)


def write_flickr(folder: Path) -> Path:
    every = {n: ("test", texts) for n, texts in CAPTIONS.items()} | {n: ("train", t) for n, t in TRAINING.items()}
    images = []
    for n, (split, texts) in every.items():
        write_image(folder / "flickr30k-images" / f"{n}.jpg", n)
        images.append({"filename": f"{n}.jpg", "imgid": n, "split": split, "sentences": sentences(texts)})
    return write_json(folder / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})


def write_questions(folder: Path, version: str, split: str, asked: dict, annotated: bool = True) -> Path:
    """The questions and annotations of VQAv2 (version "v2_") or OK-VQA (""). Question 10 is about image 1."""
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": split}
    questions = [{"image_id": n // 10, "question": text, "question_id": n} for n, (text, _, _) in asked.items()]
    path = folder / f"{version}OpenEnded_mscoco_{split}_questions.json"
    write_json(path, head | {"task_type": "Open-Ended", "questions": questions})
    if annotated:
        rows = [
            {"question_id": n, "image_id": n // 10, "question_type": "what", "answer_type": kind, "answers": [
                {"answer": a, "raw_answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(texts)
            ], "multiple_choice_answer": texts[0]}
            for n, (_, texts, kind) in asked.items()
        ]  # fmt: skip
        write_json(folder / f"{version}mscoco_{split}_annotations.json", head | {"annotations": rows})
    return path


def write_vqa(folder: Path, version: str = "v2_") -> Path:
    write_images(folder)
    write_questions(folder, version, "train2014", TRAINING_ANSWERS)
    return write_questions(folder, version, "val2014", ANSWERS)


def write_vizwiz(folder: Path) -> Path:
    for split, asked in (("train", TRAINING_ANSWERS), ("val", ANSWERS)):
        rows = []
        for n, (text, answers, kind) in asked.items():
            name = f"VizWiz_{split}_{n:08d}.jpg"
            write_image(folder / split / name, n // 10)
            given = [{"answer": a, "answer_confidence": "yes"} for a in answers]
            rows.append({"image": name, "question": text, "answers": given, "answer_type": kind, "answerable": 1})
        write_json(folder / f"{split}.json", rows)
    return folder / "val.json"
