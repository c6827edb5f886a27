"""VQA accuracy: an answer is as right as the people who gave the same one.

Ten people answer each question. Leave one of them out: the answer scores min(1, m / 3), where m of the other nine agree
with it. The accuracy is the mean over the person left out. So 0, 1, 2, 3, 4 or more equal answers of ten score
0, 0.3, 0.6, 0.9, 1; the popular min(1, n / 3) says 1 for three.

The rule is Antol et al. 2015 (arXiv 1505.00468). How answers are compared is the official evaluation's way
(github.com/GT-Vision-Lab/VQA, as of 2021). Its oddities are kept, since published figures contain them.
"""

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # ' : % & . are not in the list
FULL_STOP = re.compile(r"\.(?!\d)")
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
NUMBERS = {"none": "0"} | {
    word: str(i)
    for i, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
ARTICLES = {"a", "an", "the"}
# Words whose apostrophes are put back if exactly one is missing: dont -> don't, couldntve stays.
CONTRACTED = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "mightn't",
    "mightn't've",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'll",
    "y'all'd've",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in CONTRACTED for i, c in enumerate(word) if c == "'"} | {
    "somebody'd": "somebodyd"  # the official table has this one the wrong way round
}


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the accuracy, in [0, 1], of an answer among the references: one answer from each of ten people.

    Raises ValueError without references.
    """
    if not references:
        raise ValueError("the question has no references: give one answer from each of ten people")
    answer, references = strip(answer), [strip(reference) for reference in references]
    if len(set(references)) > 1:  # if all people said the same, the official rule compares as written
        answer, references = normalize(answer), [normalize(reference) for reference in references]
    same = [reference == answer for reference in references]
    others = [sum(same) - own for own in same]  # matches among the others, by index: equal answers stay apart
    return sum(min(1.0, m / 3) for m in others) / len(references)


def strip(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, with digits for number words and apostrophes in contractions."""
    words = (NUMBERS.get(word, word) for word in drop_punctuation(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def drop_punctuation(text: str) -> str:
    """Turn each mark into a space. It leaves no space if it is next to one anywhere, or if the text has a 1,000."""
    dropped, has_thousands = text, bool(DIGIT_COMMA_DIGIT.search(text))
    for mark in PUNCTUATION:
        next_to_space = f"{mark} " in text or f" {mark}" in text
        dropped = dropped.replace(mark, "" if next_to_space or has_thousands else " ")
    return FULL_STOP.sub("", dropped)
