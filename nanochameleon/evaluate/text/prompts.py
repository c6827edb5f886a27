"""A row of a text benchmark -> the question that a model is asked: contexts, what may follow, and which is right.

The wordings are those of lm-evaluation-harness 0.4.13, which the field reports; the paper does not print its own. A
continuation follows its context after one space. WinoGrande is scored partially (Trinh and Le, 1806.02847): its two
options go into the context, and the text after the "_" is the one continuation.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]


class Question(NamedTuple):
    """`contexts` and `continuations` have one text for each option, or a single one for all of them."""

    contexts: list[str]
    continuations: list[str]
    options: list[str]  # what a reader chooses from
    right: int  # the index of an option

    def pairs(self) -> list[tuple[str, str]]:
        """Return (context, continuation) of each option."""
        n = len(self.options)
        contexts, continuations = (self.contexts * n)[:n], (self.continuations * n)[:n]
        return list(zip(contexts, continuations, strict=True))

    def with_answer(self) -> str:
        """Return the text of a shot: the question and its right answer."""
        return " ".join(self.pairs()[self.right])


def ask(context: str, options: list[str], right: int) -> Question:
    return Question([context], options, options, right)


def piqa(row: Row) -> Question:
    return ask(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def social_iqa(row: Row) -> Question:
    answers = [row["answerA"], row["answerB"], row["answerC"]]
    return ask(f"Q: {row['context']} {row['question']}\nA:", answers, int(row["label"]) - 1)


def hellaswag(row: Row) -> Question:
    # str.capitalize also lower-cases all other letters
    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return ask(context, [clean(ending) for ending in row["endings"]], int(row["label"]))


def clean(text: str) -> str:
    """Remove what WikiHow's pages left in HellaSwag: "[title]" begins a sentence, other [words] are marks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def winogrande(row: Row) -> Question:
    before, after = row["sentence"].split("_")
    options = [row["option1"], row["option2"]]
    return Question([before + option for option in options], [after.strip()], options, int(row["answer"]) - 1)


def arc(row: Row) -> Question:
    return ask(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], right_choice(row))


def openbookqa(row: Row) -> Question:
    return ask(row["question_stem"], row["choices"]["text"], right_choice(row))


def right_choice(row: Row) -> int:
    return row["choices"]["label"].index(row["answerKey"])


def boolq(row: Row) -> Question:
    return ask(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], row["label"])


def mmlu(row: Row) -> Question:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
    context = f"{row['question'].strip()}{options}\nAnswer:"
    return Question([context], list("ABCD"), row["choices"], row["answer"])


QUESTIONS: dict[str, Callable[[Row], Question]] = {
    "piqa": piqa,
    "social_iqa": social_iqa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc,
    "arc_challenge": arc,
    "openbookqa": openbookqa,
    "boolq": boolq,
    "mmlu": mmlu,
}
