"""Votes for other programs, and back.

jsonl         one record per vote, as saved and still blinded; `add` reads it back
csv           one row per vote, with the names of the models
lmsys         battles of Chatbot Arena: model_a, model_b, winner, both conversations
labelstudio   tasks of Label Studio 1.23, each with the annotations of all people
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from nanochameleon.errors import UserError
from nanochameleon.evaluate.people.questions import FIRST, RELATIVE, SAME
from nanochameleon.evaluate.people.results import meaning
from nanochameleon.evaluate.people.study import IMAGES, Item, Key, Segments, Study
from nanochameleon.evaluate.people.tables import to_csv
from nanochameleon.evaluate.people.votes import Vote
from nanochameleon.evaluate.records import get, read_json_lines

KINDS = {"order": list, "seconds": (int, float), "time": (int, float), "version": int}  # the others are texts


def lines(rows: Sequence[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_jsonl(votes: Sequence[Vote]) -> str:
    return lines([asdict(vote) for vote in votes])


def read_jsonl(path: Path, check: Callable[[Vote], None] = lambda vote: None) -> list[Vote]:
    """Read votes that as_jsonl wrote. Raises UserError, naming the line, for a field that is missing or wrong.

    check: raises UserError for a vote that cannot be; its sentence gets the line, too.
    """
    votes = []
    for place, row in read_json_lines(path):
        values = {f.name: get(row, f.name, KINDS.get(f.name, str), place) for f in fields(Vote)}
        votes.append(Vote(**values | {"order": tuple(map(str, values["order"]))}))
        try:
            check(votes[-1])
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return votes


def as_csv(study: Study, key: Key, votes: Sequence[Vote]) -> str:
    """Live votes with all that a spreadsheet needs. Cells that look like formulas are made harmless (tables.py)."""
    header = ("time", "annotator", "item", "kind", "prompt", "task_type", "question", "left", "right", "answer",
              "meaning", "seconds", "version")  # fmt: skip
    return to_csv([header, *(csv_row(study, key, vote) for vote in votes)])


def csv_row(study: Study, key: Key, vote: Vote) -> tuple:
    item = study.items[vote.item]
    kind = "study" if key.counts(item) else "duplicate" if item.id in key.duplicates else "attention"
    prompt, models = key.prompts.get(item.prompt), [key.answers.get(name, "") for name in vote.order]
    asked = (prompt.id, prompt.task_type) if prompt else ("", "")
    says = vote.answer if kind == "attention" else meaning(vote, key)
    return (f"{vote.time:.6f}", vote.annotator, item.id, kind, *asked, vote.question, models[0],
            models[1] if len(models) == 2 else "", vote.answer, says, vote.seconds, vote.version)  # fmt: skip


def text_of(segments: Segments) -> str:
    """Text with the mark <img> for each image, as in the paper's prompts."""
    return "".join(segment.get("text", "<img>") for segment in segments)


def images_of(segments: Segments) -> list[str]:
    return [f"{IMAGES}/{segment['image']}" for segment in segments if "image" in segment]


def message(role: str, segments: Segments) -> dict:
    return {"role": role, "content": text_of(segments), "images": images_of(segments)}


def as_lmsys(study: Study, key: Key, votes: Sequence[Vote]) -> str:
    """One battle for each vote on a pair. `model_a` is the answer that this annotator saw first."""
    battles = []
    for vote in votes:
        item = study.items[vote.item]
        if len(vote.order) == 2 and key.counts(item):
            prompt = message("user", study.prompts[item.prompt])
            battle = {"question_id": key.prompts[item.prompt].id}
            battle |= {f"model_{side}": key.answers[name] for side, name in zip("ab", vote.order, strict=True)}
            battle["winner"] = "tie" if vote.answer == SAME else "model_a" if vote.answer == FIRST else "model_b"
            battle["judge"] = vote.annotator
            for side, name in zip("ab", vote.order, strict=True):
                battle[f"conversation_{side}"] = [prompt, message("assistant", study.answers[name])]
            battles.append(battle | {"turn": 1, "anony": True, "language": "unknown", "tstamp": vote.time})
    return lines(battles)


def as_labelstudio(study: Study, key: Key, votes: Sequence[Vote]) -> str:
    """One task for each item. The left answer of a task is the same for all; "left" means the better one is there.

    A labelling configuration needs <Pairwise name="preference" toName="left,right"/> and <Choices> named as the
    questions; the label "same" comes as a choice, since Pairwise has no tie.
    """
    tasks = []
    for item in study.items.values():
        own = [vote for vote in votes if vote.item == item.id]
        if own and key.counts(item):
            tasks.append({"data": task_data(study, key, item), "annotations": annotations(item, own)})
    return json.dumps(tasks, ensure_ascii=False, indent=1) + "\n"


def task_data(study: Study, key: Key, item: Item) -> dict:
    data = {"item": item.id, "prompt": text_of(study.prompts[item.prompt])}
    data["prompt_images"], asked = images_of(study.prompts[item.prompt]), key.prompts[item.prompt]
    sides = ("left", "right") if len(item.answers) == 2 else ("answer",)
    for side, name in zip(sides, item.answers, strict=True):
        data |= {side: text_of(study.answers[name]), f"{side}_images": images_of(study.answers[name])}
        data[f"{side}_model"] = key.answers[name]
    return data | {"prompt_id": asked.id, "task_type": asked.task_type}


def annotations(item: Item, votes: Sequence[Vote]) -> list[dict]:
    """One annotation a person, with a result for each question."""
    people = sorted({vote.annotator for vote in votes})
    return [
        {
            "lead_time": sum(vote.seconds for vote in votes if vote.annotator == person),
            "result": [labelled(item, vote) for vote in votes if vote.annotator == person],
        }
        for person in people
    ]


def labelled(item: Item, vote: Vote) -> dict:
    pair = vote.question == RELATIVE.name
    result = {"from_name": vote.question, "to_name": "left,right" if pair else "answer"}
    result["meta"] = {"text": [vote.annotator]}
    if not pair or vote.answer == SAME:
        return result | {"type": "choices", "value": {"choices": [vote.answer]}}
    best = vote.order[0] if vote.answer == FIRST else vote.order[1]
    return result | {"type": "pairwise", "value": {"selected": "left" if best == item.answers[0] else "right"}}


FORMATS: dict[str, Callable[[Study, Key, Sequence[Vote]], str]] = {
    "csv": as_csv, "lmsys": as_lmsys, "labelstudio": as_labelstudio,
}  # fmt: skip
