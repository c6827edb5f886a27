r"""Find the answer in a written solution, and decide whether it is the right one.

    GSM8K:  text -> number -> Decimal                    equal: the same value, so 18 = 18.00
    MATH:   text -> what the last \boxed{} holds -> one spelling for several           equal: the same spelling
    k samples -> majority

No function here raises for any text; None is no answer. A figure depends on how answers are read, so the published
strict rules are here, too: GSM8K's "####" (2110.14168) and Minerva's "Final Answer: ..." (2206.14858).
MATH's equality is that of its authors (2103.03874): rules about spelling, no algebra, so 2/4 is not 1/2.
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from decimal import Decimal
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def majority(answers: Sequence[T | None]) -> T | None:
    """Return the most frequent answer; of several, the one that was seen first.

    A sample without an answer does not vote: it has not said anything that others could agree with. (lm-eval counts
    all such samples as one answer.) None if no sample has an answer.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K

NEXT_QUESTION = re.compile(r"\b(?:Question|Q):")
# A minus after a digit, a letter or a bracket is a subtraction.
NUMBER = re.compile(r"(?:(?<![\w)\]])-)?\$?(?:[0-9](?:,?[0-9])*(?:\.[0-9]+)?|\.[0-9]+)", re.ASCII)
MARK = re.compile(r"####|answer is", re.IGNORECASE)
STRICT = re.compile(r"#### (-?[0-9.,]+)")


def plain(number: str) -> str:
    """'$1,000.' -> '1000'."""
    return number.replace(",", "").replace("$", "").removesuffix(".")


def strict(text: str) -> str | None:
    """Return the number after the first '#### ', as the authors of GSM8K read it. Compared as text: 18.00 is not 18."""
    match = STRICT.search(text)
    return (plain(match[1]) or None) if match else None


def last_number(text: str) -> str | None:
    """Return the last number of a text, as in lm-eval's flexible reading."""
    numbers = NUMBER.findall(text)
    return plain(numbers[-1]) if numbers else None


def number(text: str) -> Decimal | None:
    """Our own rule: the number after the last '####' or 'answer is', else the last one, before the next question."""
    own = NEXT_QUESTION.split(text)[0]
    after = NUMBER.search(MARK.split(own)[-1]) if MARK.search(own) else None
    found = plain(after[0]) if after else last_number(own)
    return None if found is None else Decimal(found)


# ---------------------------------------------------------------------------------------------------------------------
# MATH: where the answer is

BOXED = re.compile(r"\\boxed(?![A-Za-z])\s*")
BEFORE, AFTER = "Final Answer: The final answer is ", ". I hope it is correct."


def boxed(text: str) -> str | None:
    r"""Return what the last \boxed of a text holds: a group whose braces balance, or all up to the next $."""
    starts = [match.end() for match in BOXED.finditer(text)]
    if not starts:
        return None
    rest, depth = text[starts[-1] :], 0
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    for i, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:i]
    return None


def final_answer(text: str) -> str | None:
    """Return X of Minerva's 'Final Answer: The final answer is X. I hope it is correct.', the first one."""
    answer, after, _ = text.partition(BEFORE)[2].partition(AFTER)
    return answer if after else None


# ---------------------------------------------------------------------------------------------------------------------
# MATH: one spelling for several

SPELLINGS: list[tuple[str, str]] = [  # in this order
    (r"\n|\\!", ""),
    (r"\\\\", r"\\"),
    (r"\\[td]frac", r"\\frac"),
    (r"\\left|\\right", ""),  # before a bracket
    (r"\^\\circ|\^\{\\circ\}", ""),
    (r"\\\$", ""),
    (r"\\text\{ .*", ""),  # a unit; without the space it may be the answer
    (r"\\%", ""),
    (r"(^|[ {])\.(?=[0-9])", r"\g<1>0."),
    (r"^[^=]{0,2}=([^=]*)$", r"\1"),  # x=5
    (r"\\sqrt([^{])", r"\\sqrt{\1}"),
    (r"\s", ""),
    (r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}"),  # \frac12
    (r"\\frac([^{\\])(?=\{)", r"\\frac{\1}"),  # \frac1{72}, but not \frac{72}1
    (r"^0\.5$", r"\\frac{1}{2}"),  # this decimal alone
    (r"^(-?[0-9]+)/(-?[0-9]+)$", r"\\frac{\1}{\2}"),  # so -3/4 is \frac{-3}{4}, and not -\frac{3}{4}
]
SPELLING = [(re.compile(pattern, re.DOTALL | re.ASCII), new) for pattern, new in SPELLINGS]


def spelling(answer: str) -> str:
    r"""Return one spelling for several of the same answer: \dfrac12, 1/2 and .5 -> \frac{1}{2}."""
    for pattern, new in SPELLING:
        answer = pattern.sub(new, answer)
    return answer


def same_spelling(a: str, b: str) -> bool:
    """The equality of MATH's authors. Where their code fails, as on a/b of letters, it compares texts as they are."""
    return spelling(a) == spelling(b)


# Minerva also drops what a sentence has around its answer.
UNITS = (
    "square|cubic|units?|dollars?|cents?|degrees?|points?|hours?|minutes?|seconds?|days?|mph|inch(?:es)?|feet|foot|ft"
    "|yards?|miles?|[kcm]m|meters?|kg|grams?|pounds?|people|students|children|ways|digits|integers"
)
MINERVA = [
    (r"^.*?(?<!\\)\$([^$]+)\$.*", r"\1"),  # the formula in a sentence
    (r"^.*=", ""),
    (r"\\(?:text|textbf|mbox|overline)\{([^{}]*)\}", r"\1"),
    (rf"(?<=[0-9}}])(?:\s*(?:{UNITS})(?![A-Za-z]))+", ""),
    (r"\\?\$", ""),
]
MINERVA_SPELLING = [(re.compile(pattern, re.DOTALL), new) for pattern, new in MINERVA]
THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+")


def minerva_spelling(answer: str) -> str:
    """Return one spelling for several, with the formula alone and without units: 'so $x=3$' -> '3'."""
    answer = boxed(answer) or answer
    for pattern, new in MINERVA_SPELLING:
        answer = pattern.sub(new, answer)
    answer = spelling(answer)
    return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer
