"""CIDEr-D: do the words of a caption agree with what people wrote about the same image? Rare words count more.

With n-grams x of n = 1 .. 4 words, N images and df(x) of them with x in a reference, a text weighs each n-gram by

    g(x) = (times x is in the text) * ln(N / max(1, df(x)))

and a hypothesis h of l_h words compares with a reference r of l_r words as

    s_n(h, r) = sum_x min(g_h(x), g_r(x)) g_r(x) / (|g_h| |g_r|) * exp(-(l_h - l_r)^2 / (2 * 6^2))

CIDEr-D is 10 times the mean of s_n over n and r: 10 if hypothesis and references are one text of four words or more.
Papers print 100 times the mean over images. The min and the length term are the D: they stop a caption from scoring by
repetition. An n-gram of every image weighs nothing, so a set of one image scores 0, and scores of two sets of images do
not compare.

Source: Vedantam, Zitnick and Parikh 2015 (arXiv 1411.5726), in the details equal to COCO's scorer (pycocoevalcap).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

ORDERS = range(1, 5)
SIGMA = 6.0

Vectors = list[dict[tuple[str, ...], float]]  # for each order, the weight of each n-gram


def cider_d(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Return the mean over images, and the score of each image. references[i]: what people wrote about image i.

    Raises ValueError unless there is one hypothesis, and a reference or more, for each image.
    """
    if len(hypotheses) != len(references) or not all(references):
        counts = f"{len(hypotheses)} hypotheses, {len(references)} images, {sum(map(bool, references))} with references"
        raise ValueError(f"{counts}: give one hypothesis and at least one reference for each image")
    split = [[words(text) for text in texts] for texts in references]
    in_images = Counter(x for texts in split for x in {x for text in texts for x in all_ngrams(text)})
    idf = {x: math.log(len(split) / df) for x, df in in_images.items()}
    unseen = math.log(max(1, len(split)))  # the idf of an n-gram that no reference has
    scores = []
    for hypothesis, texts in zip(map(words, hypotheses), split, strict=True):
        said = weigh(hypothesis, idf, unseen)
        each = [similarity(said, weigh(text, idf, unseen), len(hypothesis) - len(text)) for text in texts]
        scores.append(10 * sum(each) / len(each))
    return sum(scores) / max(1, len(scores)), scores


def ngrams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def all_ngrams(text: Sequence[str]) -> list[tuple[str, ...]]:
    return [x for n in ORDERS for x in ngrams(text, n)]


def weigh(text: Sequence[str], idf: dict[tuple[str, ...], float], unseen: float) -> Vectors:
    """g(x) of each n-gram of a text, by order."""
    return [{x: tf * idf.get(x, unseen) for x, tf in Counter(ngrams(text, n)).items()} for n in ORDERS]


def similarity(hypothesis: Vectors, reference: Vectors, longer_by: int) -> float:
    """The mean of s_n over the orders. An order without weight in either text counts 0."""
    total = 0.0
    for h, r in zip(hypothesis, reference, strict=True):
        norm = math.hypot(*h.values()) * math.hypot(*r.values())
        if norm:
            total += sum(min(weight, r.get(x, 0.0)) * r.get(x, 0.0) for x, weight in h.items()) / norm
    return total / len(ORDERS) * math.exp(-(longer_by**2) / (2 * SIGMA**2))


# ---------------------------------------------------------------------------------------------------------------------
# Words as the Penn Treebank splits them, since published scores are on such words

SAME = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "€": "$", "£": "#", "½": "1/2"})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = {"'", '"', "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
WORD = re.compile(
    r"""
      \.\.\. | --+
    | (?:[a-z]\.){2,} | (?:st|mr|mrs|ms|dr|no|etc|vs|jr|sr)\.(?!\w)     # u.s.   mr.
    | \d+ (?:[.,:/]\d+)+ | \.\d+                                        # 1,000  3:30  1/2  .5
    | \d+ (?:-\w+)+                                                     # 2-year-old
    | '(?:s|m|d|ll|re|ve)\b | n't\b                                     # it|'s   does|n't
    | [^\W_]+? (?=n't\b) | can(?=not\b) | gon(?=na\b)                   # does|n't   can|not   gon|na
    | 'n' | 't(?=(?:is|was)\b) | y'(?=all\b)                  # rock|'n'|roll   't|is   y'|all
    | ma'am\b | o'clock\b | d'oh\b
    | [^\W_]+ (?:[-/.][^\W\d_]+)*                                       # t-shirt   black/white
    | \S
    """,
    re.VERBOSE,
)


def words(text: str) -> list[str]:
    """Split a caption into words as Stanford's PTBTokenizer does, in lower case and without punctuation.

    Known to differ: abbreviations such as Ave. and Sgt., gimme and wanna, the year in '90s, and <tags>.

    Brackets stay as -lrb- and -rrb-: COCO's list of punctuation names them in upper case and so never finds them.
    """
    found = WORD.findall(text.lower().translate(SAME))
    return [BRACKETS.get(word, word) for word in found if word not in DROPPED]
