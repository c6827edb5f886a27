"""Which fields of a `tokenizers` file decide token ids: those that we compute as it does, the others refused by name.

How the file splits text into words is not compared letter by letter, since there are several ways to write the same
rules: its steps split one example, and the words have to be ours.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import regex

from nanochameleon.errors import shown
from nanochameleon.vocab import Vocab

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"
EXAMPLE = (  # without names of special tokens, which a file may set apart: here text never becomes one
    "The cat's 12 mats, isn't it?\n\tdef f(x):    return x**2 + $5  # na\u00efve_ness   <s> 3.14\r\n"
    "\u65e5\u672c\u8a9e\u3002 \u0440\u0443\u0441 image...  we'll  \u2014 \u0663 e\u0301 end  "
)
MOST = 1_000  # characters of a pattern, and added tokens, which become a pattern
SECONDS = 5.0  # for all patterns of a file: one that was made for it may take for ever


def check_fields(content: dict, split_words: Callable[[str], Iterable[str]]) -> None:
    """Raises ValueError naming a field that decides ids and that we do not compute. split_words: text -> our words."""
    for part, name in (
        (content, "normalizer"),
        (content["model"], "dropout"),
        (content["model"], "continuing_subword_prefix"),
        (content["model"], "end_of_word_suffix"),
    ):
        if part.get(name):
            raise ValueError(f"its {name} is {shown(repr(part[name]))}, which is not computed here")
    words, deadline = [EXAMPLE], time.monotonic() + SECONDS
    for pattern in patterns(content.get("pre_tokenizer")):
        words = [part for word in words for part in isolated(pattern, word, deadline)]
    if words != list(split_words(EXAMPLE)):
        raise ValueError("its pre_tokenizer splits text into other words than Chameleon's")


def patterns(pre_tokenizer: dict | None) -> list[str]:
    """The patterns whose matches are words of their own, one step after the other."""
    pre_tokenizer = pre_tokenizer or {"type": None}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kinds = [step["type"] for step in steps]
    if kinds[-1:] != ["ByteLevel"] or len(steps) > 20:
        raise ValueError(f"its pre_tokenizer is {shown(repr(kinds))}, not a few steps of which ByteLevel is the last")
    return [pattern for step in steps if (pattern := pattern_of(step))]


def pattern_of(step: dict) -> str | None:
    """The pattern of one step; None for ByteLevel without its own. Raises ValueError for steps of other kinds."""
    kind = step["type"]
    if kind == "ByteLevel" and step.get("add_prefix_space", True):
        raise ValueError("its add_prefix_space is true, which is not computed here")
    if kind == "ByteLevel":
        return GPT2 if step.get("use_regex", True) else None
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if step.get("behavior") == "Isolated" and not step.get("invert") and kind in ("Split", "Punctuation"):
        pattern = step.get("pattern", {"Regex": PUNCTUATION})
        return pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])
    raise ValueError(f"its pre_tokenizer has the step {shown(repr(step), 80)}, which is not computed here")


def isolated(pattern: str, text: str, deadline: float) -> Iterator[str]:
    """The matches and what is between them. Raises ValueError for a pattern that is broken or takes long."""
    try:
        found = regex.compile(pattern[:MOST]).finditer(text, timeout=max(deadline - time.monotonic(), 0.001))
        spans = [match.span() for match in found if match[0]]
    except (regex.error, TimeoutError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"its pre_tokenizer's pattern {shown(pattern)} cannot be used ({shown(error)})") from None
    cuts = sorted({0, len(text), *(end for span in spans for end in span)})
    yield from (text[a:b] for a, b in pairwise(cuts))


def added_text(tokens: list[dict], vocab: Vocab) -> tuple[dict[str, int], dict[str, int]]:
    """The added tokens that text may become: those that are not special and have text ids. `tokenizers` looks for those
    that are not "normalized" first. Raises ValueError for one that is matched by more than its letters."""
    found = [token for token in tokens if not token.get("special") and token["id"] >= vocab.first_text]
    for token in found:
        if rules := [rule for rule in ("lstrip", "rstrip", "single_word") if token.get(rule)]:
            raise ValueError(f"its added token {shown(token['content'])} has {rules[0]}, which is not computed here")
    if len(found) > MOST:
        raise ValueError(f"it has {len(found):,} added tokens that are text; at most {MOST:,} are computed here")
    first, second = ([t for t in found if t["content"] and bool(t.get("normalized")) == late] for late in (False, True))
    return {t["content"]: t["id"] for t in first}, {t["content"]: t["id"] for t in second}
