"""The JSON of the `tokenizers` library <-> TextTokenizer, for files of ours and files made elsewhere.

Files made elsewhere may hold fields that change which tokens a text becomes. The fields that we compute as that library
does are added tokens and ignore_merges (ForeignTokenizer); all others are refused by name.

How a file splits text into words is not compared letter by letter, because the same rules can be written in several
ways: its steps split one example, and the words have to be ours.
"""

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import regex

from nanochameleon.errors import UserError, shown
from nanochameleon.files import read_json, write_file
from nanochameleon.text_tokenizer import ALONE, GPT2, Pair, TextTokenizer, split_words
from nanochameleon.vocab import N_BYTES, Vocab

NOTE = "nanochameleon"  # our key inside "model"; `tokenizers` ignores keys that it does not know

# ---------------------------------------------------------------------------------------------------------------------
# How a file writes the bytes of a piece


def byte_alphabet() -> list[str]:
    """The visible character that files use for each byte, GPT-2's choice: ' ' is written 'Ġ', 'a' is 'a'."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(N_BYTES) if b not in visible]
    return [chr(b) if b in visible else chr(N_BYTES + others.index(b)) for b in range(N_BYTES)]


ALPHABET = byte_alphabet()
BYTE_OF = {char: byte for byte, char in enumerate(ALPHABET)}


def spell(piece: bytes) -> str:
    """b' the' -> 'Ġthe'."""
    return "".join(ALPHABET[b] for b in piece)


def unspell(name: str) -> bytes:
    """Inverse of spell. Raises ValueError for a character that no byte is written as."""
    if stray := set(name) - BYTE_OF.keys():
        raise ValueError(f"{name!r} holds {stray.pop()!r}, which no byte is written as")
    return bytes(BYTE_OF[char] for char in name)


# ---------------------------------------------------------------------------------------------------------------------
# Writing and reading


class ForeignTokenizer(TextTokenizer):
    """A TextTokenizer with what only files made elsewhere have.

    added: texts that are cut out before words are split, with their text tokens; two dictionaries, used in this order.
    ignore_merges: a word that is a piece is that piece, whatever the merges would make of it.
    """

    def __init__(
        self, merges: list[Pair], vocab: Vocab, tokens: dict[bytes, int] | None = None,
        added: tuple[dict[str, int], ...] = ({}, {}), ignore_merges: bool = False,
    ):  # fmt: skip
        super().__init__(merges, vocab, tokens)
        self.added, self.ignore_merges = added, ignore_merges
        longest_first = [sorted(names, key=len, reverse=True) for names in added]
        self.added_regexes = [regex.compile(f"({'|'.join(map(regex.escape, names))})") for names in longest_first]
        for name, token in (item for names in added for item in names.items()):
            if token >= vocab.size:
                raise ValueError(f"the added token {shown(name)} is {token}: the vocabulary has {vocab.size} tokens")
            if self.pieces.setdefault(token, name.encode()) != name.encode():
                raise ValueError(f"the added token {shown(name)} has the token of another piece")

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for part in self._cut_out_added(text):
            tokens += [part] if isinstance(part, int) else super().encode(part)
        return tokens

    def _cut_out_added(self, text: str) -> list[str | int]:
        """Added tokens, the longest match first, and the text between them."""
        parts: list[str | int] = [text]
        for names, pattern in zip(self.added, self.added_regexes, strict=True):
            for at in reversed([at for at, part in enumerate(parts) if names and isinstance(part, str)]):
                split = enumerate(pattern.splititer(parts[at]))
                parts[at : at + 1] = [names[part] if odd % 2 else part for odd, part in split]
        return parts

    def _split_word(self, word: bytes) -> list[bytes]:
        return [word] if self.ignore_merges and word in self.tokens else super()._split_word(word)


def save_text_tokenizer(tokenizer: TextTokenizer, path: Path) -> None:
    """Write the JSON file of the `tokenizers` library, whole or not at all."""
    write_file(path, json.dumps(to_json(tokenizer), ensure_ascii=False, indent=1).encode())


def load_text_tokenizer(path: Path, vocab: Vocab | None = None) -> TextTokenizer:
    """Read such a file; the Vocab is in it. Raises UserError for any other file, or one for another `vocab`."""
    try:
        return from_json(read_json(path), vocab)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it lacks {shown(error)}" if isinstance(error, KeyError) else shown(error, 140)
        raise UserError(f"{path} is not a usable text tokenizer ({why}); make it again with train.py") from None


def to_json(tokenizer: TextTokenizer) -> dict:
    """The content of the file. Special names are in the model and among the added tokens."""
    vocab, foreign = tokenizer.vocab, isinstance(tokenizer, ForeignTokenizer)
    names, added = vocab.names(), tokenizer.added if foreign else ()
    text = {spell(piece): token for piece, token in sorted(tokenizer.tokens.items(), key=lambda item: item[1])}
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    split = [dict(type="Split", pattern={"Regex": p}, behavior="Isolated", invert=False) for p in (ALONE, GPT2)]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": name, **plain, "special": True} for name, token in names.items()]
        + [
            {"id": token, "content": name, **plain, "normalized": bool(late), "special": False}
            for late, tokens in enumerate(added)
            for name, token in tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": foreign and tokenizer.ignore_merges,
            NOTE: {"size": vocab.size, "eot_slot": vocab.eot_slot},
            "vocab": names | text,
            "merges": [[spell(left), spell(right)] for left, right in tokenizer.merges],
        },
    }


def from_json(content: dict, vocab: Vocab | None = None) -> TextTokenizer:
    """Inverse of to_json. Text may have its tokens in any order, as in files made elsewhere.

    Raises ValueError, KeyError, TypeError or AttributeError for content of any other form.
    """
    model, all_added = content["model"], content["added_tokens"]
    check_fields(content)
    special = {token["content"]: token["id"] for token in all_added}
    tokens = model["vocab"] | special
    if model["type"] != "BPE" or not all(type(token) is int for token in tokens.values()):
        raise ValueError("its model is not BPE with integer ids")
    found = find_vocab(tokens, model.get(NOTE), vocab)
    if vocab not in (None, found):
        raise ValueError(f"it was made for {found}, not for {vocab}")
    for name, token in found.names().items():
        if (name in tokens or token <= found.boi) and tokens.get(name) != token:  # a reserved name may be missing
            raise ValueError(f"it does not have {name} at id {token}")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]  # "a b" in older files
    pairs = [(unspell(left), unspell(right)) for left, right in merges]
    added, ignore_merges = added_text(all_added, found), model.get("ignore_merges") is True
    # Special names have no text, unless merges make one.
    hidden = special.keys() - added[0].keys() - added[1].keys() - {spell(left + right) for left, right in pairs}
    text = {name: token for name, token in model["vocab"].items() if token >= found.first_text and name not in hidden}
    pieces = {unspell(name): token for name, token in text.items()}
    if any(added) or ignore_merges:
        return ForeignTokenizer(pairs, found, pieces, added, ignore_merges)
    return TextTokenizer(pairs, found, pieces)


def find_vocab(tokens: dict[str, int], note: dict | None, vocab: Vocab | None) -> Vocab:
    """The Vocab that the names in a file imply.

    Its size and end of turn are in our note. A file made elsewhere has no note: then they are those of `vocab`, or all
    tokens and the release's slot (the toy's slot where the release's is too far).
    """
    n_codes = sum(regex.fullmatch("IMGIMG[A-J]+Z", name) is not None for name in tokens)
    last = max((tokens[name] for name in tokens if regex.fullmatch(r"<reserved\d{5}>", name)), default=0)
    n_reserved = last + 1 - (Vocab.first_code + n_codes)
    if note:
        return Vocab(note["size"], n_codes, n_reserved, note["eot_slot"])
    if vocab:
        return Vocab(vocab.size, n_codes, n_reserved, vocab.eot_slot)
    release, toy = Vocab.eot_slot, 2
    return Vocab(max(tokens.values()) + 1, n_codes, n_reserved, release if release < n_reserved else toy)


# ---------------------------------------------------------------------------------------------------------------------
# Fields that change tokens

PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"
EXAMPLE = (  # without names of special tokens, which a file may cut out: here text never becomes one
    "The cat's 12 mats, isn't it?\n\tdef f(x):    return x**2 + $5  # na\u00efve_ness   <s> 3.14\r\n"
    "\u65e5\u672c\u8a9e\u3002 \u0440\u0443\u0441 image...  we'll  \u2014 \u0663 e\u0301 end  "
)
MOST = 1_000  # characters of a pattern, and added tokens, which become a pattern
SECONDS = 5.0  # for all patterns of a file: a hostile one may take for ever


def check_fields(content: dict) -> None:
    """Raise ValueError naming a field that changes tokens and that we do not compute."""
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
    """The patterns whose matches are words of their own, in the order of the steps."""
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
    """The matches and the text between them. Raises ValueError for a pattern that is broken or takes long."""
    try:
        found = regex.compile(pattern[:MOST]).finditer(text, timeout=max(deadline - time.monotonic(), 0.001))
        spans = [match.span() for match in found if match[0]]
    except (regex.error, TimeoutError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"its pre_tokenizer's pattern {shown(pattern)} cannot be used ({shown(error)})") from None
    cuts = sorted({0, len(text), *(end for span in spans for end in span)})
    yield from (text[a:b] for a, b in pairwise(cuts))


def added_text(tokens: list[dict], vocab: Vocab) -> tuple[dict[str, int], dict[str, int]]:
    """The added tokens that text may become: not special, and with a text token.

    `tokenizers` matches those that are not "normalized" first, hence two dictionaries. Raises ValueError for an added
    token that matches more than its letters.
    """
    found = [token for token in tokens if not token.get("special") and token["id"] >= vocab.first_text]
    for token in found:
        if rules := [rule for rule in ("lstrip", "rstrip", "single_word") if token.get(rule)]:
            raise ValueError(f"its added token {shown(token['content'])} has {rules[0]}, which is not computed here")
    if len(found) > MOST:
        raise ValueError(f"it has {len(found):,} added tokens that are text; at most {MOST:,} are computed here")
    first, second = ([t for t in found if t["content"] and bool(t.get("normalized")) == late] for late in (False, True))
    return {t["content"]: t["id"] for t in first}, {t["content"]: t["id"] for t in second}
