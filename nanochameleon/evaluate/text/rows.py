"""One row of a text benchmark: the authors' fields -> the hub's fields, and what a row must hold.

    AUTHORS_ROW[name](row, place) -> row in the hub's fields        HUB_ROW[name](row, place) -> the row, checked

Labels keep the hub's types, whichever file they come from:

    int: piqa 0-1, boolq 0-1 (yes is 1), mmlu 0-3
    str: social_iqa "1"-"3", hellaswag "0"-"3", winogrande "1"-"2", ARC and openbookqa a member of choices["label"]

BoolQ's passage is "TITLE -- PASSAGE" on the hub (SuperGLUE's form), so the authors' title goes in front of theirs.
Left out are fields that no prompt and no score needs.
"""

from collections.abc import Callable
from typing import Any

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.records import get

Row = dict[str, Any]
LETTERS = "ABCD"


def texts(row: Row, names: str, place: str) -> Row:
    """Return the fields of these names, which must be texts."""
    return {name: get(row, name, str, place) for name in names.split()}


def text_list(row: Row, name: str, sizes: range, place: str) -> list[str]:
    """Return a list of texts whose length is one of `sizes`."""
    values = get(row, name, list, place)
    if len(values) not in sizes or not all(isinstance(value, str) for value in values):
        wanted = f"{sizes[0]} texts" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} texts"
        raise UserError(f"{place} has {len(values)} {name!r}: there must be {wanted}")
    return values


def one_of(value: Any, allowed: Any, name: str, place: str) -> Any:
    if value not in list(allowed):
        wanted = ", ".join(map(str, allowed))
        raise UserError(f"{place} has {shown(repr(value), 40)} as {name!r}: it must be one of {wanted}")
    return value


def label(row: Row, name: str, allowed: str, place: str) -> str:
    """Return a label that the hub keeps as a text, and HellaSwag's authors as a number."""
    return one_of(str(get(row, name, (str, int), place)), allowed, name, place)


def number(row: Row, name: str, below: int, place: str) -> int:
    return one_of(get(row, name, int, place), range(below), name, place)


# ---------------------------------------------------------------------------------------------------------------------
# The hub's fields, checked


def piqa(row: Row, place: str) -> Row:
    return texts(row, "goal sol1 sol2", place) | {"label": number(row, "label", 2, place)}


def social_iqa(row: Row, place: str) -> Row:
    return texts(row, "context question answerA answerB answerC", place) | {"label": label(row, "label", "123", place)}


def hellaswag(row: Row, place: str) -> Row:
    endings = text_list(row, "endings", range(4, 5), place)
    more = {"endings": endings, "label": label(row, "label", "0123", place)}
    return texts(row, "activity_label ctx_a ctx_b", place) | more


def winogrande(row: Row, place: str) -> Row:
    fields = texts(row, "sentence option1 option2", place)
    if (n := fields["sentence"].count("_")) != 1:
        raise UserError(f"{place} has {n} '_' in its sentence: there must be one, where an option goes")
    return fields | {"answer": label(row, "answer", "12", place)}


def question_with_choices(question: str, sizes: range) -> Callable[[Row, str], Row]:
    """The check of ARC and OpenBookQA, which differ in the name of the question and in the number of choices."""

    def check(row: Row, place: str) -> Row:
        choices = get(row, "choices", dict, place)
        labels = text_list(choices, "label", sizes, place)
        pair = {"text": text_list(choices, "text", range(len(labels), len(labels) + 1), place), "label": labels}
        if len(set(labels)) < len(labels):
            raise UserError(f"{place} has one label for two choices, {', '.join(labels)}: labels must differ")
        answer = one_of(get(row, "answerKey", str, place).strip(), labels, "answerKey", place)
        return texts(row, f"id {question}", place) | {"choices": pair, "answerKey": answer}

    return check


def boolq(row: Row, place: str) -> Row:
    return texts(row, "question passage", place) | {"label": number(row, "label", 2, place)}


def gsm8k(row: Row, place: str) -> Row:
    fields = texts(row, "question answer", place)
    if "####" not in fields["answer"]:
        raise UserError(f"{place} has an answer without '####': its last line must be '#### ' and the number")
    return fields


def math(row: Row, place: str) -> Row:
    return texts(row, "problem level type solution", place)


def mmlu(row: Row, place: str) -> Row:
    more = {"choices": text_list(row, "choices", range(4, 5), place), "answer": number(row, "answer", 4, place)}
    return texts(row, "question subject", place) | more


HUB_ROW: dict[str, Callable[[Row, str], Row]] = {
    "piqa": piqa,
    "social_iqa": social_iqa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": question_with_choices("question", range(3, 6)),
    "arc_challenge": question_with_choices("question", range(3, 6)),
    "openbookqa": question_with_choices("question_stem", range(4, 5)),
    "boolq": boolq,
    "gsm8k": gsm8k,
    "math": math,
    "mmlu": mmlu,
}


# ---------------------------------------------------------------------------------------------------------------------
# The authors' fields -> the hub's


def same(row: Row, place: str) -> Row:
    return row


def piqa_authors(row: Row, place: str) -> Row:
    """The label has been checked with the file of labels."""
    return row | {"label": int(row["label"])}


def flatten_question(question: str) -> Callable[[Row, str], Row]:
    """question {stem, choices [{text, label}]} -> QUESTION, choices {text [], label []}."""

    def flatten(row: Row, place: str) -> Row:
        nested = get(row, "question", dict, place)
        choices = get(nested, "choices", list, place)
        if not all(isinstance(choice, dict) for choice in choices):
            raise UserError(f"{place} has choices that are no objects: each must have 'text' and 'label'")
        pair = {name: [get(choice, name, str, place) for choice in choices] for name in ("text", "label")}
        return row | {question: get(nested, "stem", str, place), "choices": pair}

    return flatten


def boolq_authors(row: Row, place: str) -> Row:
    fields = texts(row, "title passage", place)
    passage = f"{fields['title']} -- {fields['passage']}"
    return row | {"passage": passage, "label": int(get(row, "answer", bool, place))}


def mmlu_authors(row: Row, place: str) -> Row:
    if len(row["columns"]) != 6:
        raise UserError(f"{place} has {len(row['columns'])} columns: there must be 6, question, A, B, C, D, letter")
    question, *choices, letter = row["columns"]
    answer = LETTERS.index(one_of(letter.strip(), LETTERS, "letter", place))
    return {"question": question, "subject": row["subject"], "choices": choices, "answer": answer}


AUTHORS_ROW: dict[str, Callable[[Row, str], Row]] = {
    **dict.fromkeys(HUB_ROW, same),
    "piqa": piqa_authors,
    "arc_easy": flatten_question("question"),
    "arc_challenge": flatten_question("question"),
    "openbookqa": flatten_question("question_stem"),
    "boolq": boolq_authors,
    "mmlu": mmlu_authors,
}
