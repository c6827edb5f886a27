"""Byte-level BPE: text <-> ids, and learning the merges from a corpus.

It climbs: splitting text into words, learning merges from word counts, merging one word, and then TextTokenizer,
which gives pieces their ids in the Vocab and reads and writes the JSON file of the `tokenizers` library (same ids as
that library gives on the same file).

Left out on purpose: special ids. encode() makes text ids only, whatever the text spells, so nothing that a user types
can begin an image or end a document; those ids come from segments (documents.py). No normalisation either: every
str comes back from decode(encode(s)) as it was, but for lone surrogates, which have no bytes and become U+FFFD.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import regex
from tqdm import tqdm

from nanochameleon.errors import UserError, shown
from nanochameleon.files import read_json, write_file
from nanochameleon.vocab import N_BYTES, Vocab
from nanochameleon.weights.tokenizer_fields import GPT2, added_text, check_fields

Pair = tuple[bytes, bytes]
BYTES = [bytes([b]) for b in range(N_BYTES)]

# ------------------------------------------------------------------------------------------------------------------
# Words: the release's rules. BPE never merges across the border of two words.

# What stands alone: a tab, a line end, 4 or 2 spaces, any single digit, any single punctuation mark. ASCII symbols such
# as $ + < are spelled out because Unicode does not count them as punctuation.
ALONE = r"[\t\n]|    |  |\p{N}|[\p{P}!-/:-@\[-`{-~]"

ALONE_REGEX = regex.compile(f"({ALONE})")
GPT2_REGEX = regex.compile(GPT2)  # for what lies between, so that a word takes the space before it: " the"
SURROGATE_REGEX = regex.compile("[\ud800-\udfff]")


def split_words(text: str) -> Iterator[str]:
    """'The cat, 12' -> 'The', ' cat', ',', ' ', '1', '2'. The words joined are the text, lone surrogates as U+FFFD.

    `tokenizers` carries older Unicode tables than `regex`: letters added since then may split differently there.
    """
    for part in ALONE_REGEX.splititer(SURROGATE_REGEX.sub("\ufffd", text)):
        yield from GPT2_REGEX.findall(part)


# ------------------------------------------------------------------------------------------------------------------
# Learning merges: the most frequent neighbours become one piece, again and again.
# A corpus has far fewer distinct words than words, so it is counted once and only the distinct words are rewritten.

LONGEST_TRAINING_WORD = 256  # characters; longer ones are cut, since each merge inside a word rewrites all of it


def count_words(texts: Iterable[str], progress: bool = False) -> Counter[bytes]:
    """Corpus -> how often each word (UTF-8) stands in it."""
    counts: Counter[str] = Counter()
    for text in tqdm(texts, "counting words", unit=" texts", disable=not progress):
        counts.update(split_words(text))
    cut: Counter[bytes] = Counter()
    for word, n in counts.items():
        for start in range(0, len(word), LONGEST_TRAINING_WORD):
            cut[word[start : start + LONGEST_TRAINING_WORD].encode()] += n
    return cut


def replace_pair(pieces: list[bytes], pair: Pair) -> list[bytes]:
    """[a, b, a, b, c], (a, b) -> [ab, ab, c]; from the left, so [a, a, a], (a, a) -> [aa, a]."""
    (left, right), joined, out, i = pair, pair[0] + pair[1], [], 0
    while i < len(pieces):
        if pieces[i] == left and i + 1 < len(pieces) and pieces[i + 1] == right:
            out.append(joined)
            i += 2
        else:
            out.append(pieces[i])
            i += 1
    return out


class PairCounts:
    """How often each pair of neighbours stands in the corpus, kept up to date while words are rewritten."""

    def __init__(self, word_counts: Counter[bytes]):
        self.times = list(word_counts.values())
        self.words = [[BYTES[b] for b in word] for word in word_counts]
        self.counts: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)  # pair -> words that hold it, or once held it
        for i, pieces in enumerate(self.words):
            for pair in pairwise(pieces):
                self.counts[pair] += self.times[i]
                self.where[pair].add(i)
        # Smallest first: highest count, then the smaller bytes. An entry's count may have fallen since; pop() looks.
        self.queue = [(-n, pair) for pair, n in self.counts.items()]
        heapq.heapify(self.queue)

    def pop(self) -> Pair | None:
        """Takes out the most frequent pair; None when no pair stands twice."""
        while self.queue:
            n, pair = heapq.heappop(self.queue)
            now = self.counts[pair]
            if now == -n:
                return pair if now > 1 else None
            heapq.heappush(self.queue, (-now, pair))
        return None

    def merge(self, pair: Pair) -> None:
        """Rewrites every word that holds the pair. Only pairs with the new piece can gain, so only they are queued."""
        new_piece = pair[0] + pair[1]
        gained: set[Pair] = set()
        for i in self.where.pop(pair):
            old, times = self.words[i], self.times[i]
            new = self.words[i] = replace_pair(old, pair)
            for neighbours in pairwise(old):
                self.counts[neighbours] -= times
            for neighbours in pairwise(new):
                self.counts[neighbours] += times
                if new_piece in neighbours:
                    self.where[neighbours].add(i)
                    gained.add(neighbours)
        for neighbours in gained:
            heapq.heappush(self.queue, (-self.counts[neighbours], neighbours))


def train(texts: Iterable[str], n_merges: int, forbidden: Collection[bytes] = (), progress: bool = False) -> list[Pair]:
    """Corpus -> at most `n_merges` merges in order; fewer when no pair of neighbours stands twice any more.

    Ties go to the pair with the smaller bytes, so the same corpus always gives the same merges. A pair that would make
    one of the `forbidden` pieces is passed over.
    """
    pairs = PairCounts(count_words(texts, progress))
    merges: list[Pair] = []
    with tqdm(desc="learning merges", total=n_merges, disable=not progress) as bar:
        while len(merges) < n_merges and (pair := pairs.pop()):
            if pair[0] + pair[1] not in forbidden:
                pairs.merge(pair)
                merges.append(pair)
                bar.update()
    return merges


# ------------------------------------------------------------------------------------------------------------------
# Using merges.


def merge_word(word: bytes, ranks: dict[Pair, int]) -> list[bytes]:
    """Bytes -> pieces: always the neighbours of lowest rank first, the leftmost of several.

    A queue of candidates over a linked list, O(n log n), so that a word of a million letters does not hang.
    """
    n = len(word)
    pieces = [BYTES[b] for b in word]  # b"" where a piece went into its left neighbour
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    queue = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
    heapq.heapify(queue)
    while queue:
        rank, i = heapq.heappop(queue)
        j = after[i]
        if j == n or ranks.get((pieces[i], pieces[j])) != rank:
            continue  # one of the two has been merged with another since this was queued
        pieces[i], pieces[j] = pieces[i] + pieces[j], b""
        after[i] = after[j]
        if after[i] < n:
            before[after[i]] = i
        for left in (before[i], i):
            if left >= 0 and after[left] < n and (pair := (pieces[left], pieces[after[left]])) in ranks:
                heapq.heappush(queue, (ranks[pair], left))
    return [piece for piece in pieces if piece]


def byte_alphabet() -> list[str]:
    """The visible character that stands for each byte in files, GPT-2's choice: ' ' is written 'Ġ', 'a' is 'a'."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(N_BYTES) if b not in visible]
    return [chr(b) if b in visible else chr(N_BYTES + others.index(b)) for b in range(N_BYTES)]


ALPHABET = byte_alphabet()
BYTE_OF = {char: byte for byte, char in enumerate(ALPHABET)}


def spell(piece: bytes) -> str:
    """b' the' -> 'Ġthe'."""
    return "".join(ALPHABET[b] for b in piece)


def unspell(name: str) -> bytes:
    """Inverse of spell. Raises ValueError for a character that stands for no byte."""
    if stray := set(name) - BYTE_OF.keys():
        raise ValueError(f"{name!r} holds {stray.pop()!r}, which stands for no byte")
    return bytes(BYTE_OF[char] for char in name)


# ------------------------------------------------------------------------------------------------------------------

CACHED_WORDS = 65_536
CACHED_LENGTH = 64  # characters; so the cache stays under some tens of MB whatever is encoded


class TextTokenizer:
    """Text <-> the text ids of a Vocab. Byte b has id first_text + b, merge i has first_text + 256 + i.

    `ids` (piece -> id) overrides that order, for files made elsewhere. Text ids without a piece stay unused: a corpus
    may give fewer merges than there is room for. Raises ValueError for merges or ids that cannot belong together.

    added: texts that are taken out before words are split, with their text ids; two lists, one after the other.
    ignore_merges: a word that is a piece is that piece, whatever merges would make of it.
    """

    def __init__(
        self, merges: list[Pair], vocab: Vocab, ids: dict[bytes, int] | None = None,
        added: tuple[dict[str, int], ...] = ({}, {}), ignore_merges: bool = False,
    ):  # fmt: skip
        self.merges, self.vocab = [(left, right) for left, right in merges], vocab
        if ids is None:
            in_order = dict.fromkeys([*BYTES, *(left + right for left, right in self.merges)])
            ids = {piece: vocab.first_text + i for i, piece in enumerate(in_order)}
        self.ids, self.added, self.ignore_merges = ids, added, ignore_merges
        self.pieces = {token: piece for piece, token in ids.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.cache: dict[str, list[int]] = {}
        longest_first = [sorted(names, key=len, reverse=True) for names in added]
        self.added_regexes = [regex.compile(f"({'|'.join(map(regex.escape, names))})") for names in longest_first]
        self._check()

    def _check(self) -> None:
        needed = {*BYTES, *(piece for pair in self.merges for piece in (*pair, pair[0] + pair[1]))}
        if missing := needed - self.ids.keys():
            raise ValueError(f"{len(missing)} pieces have no id, {shown(min(missing))} among them")
        if len(self.pieces) < len(self.ids):
            raise ValueError("two pieces share an id")
        for name, token in (item for names in self.added for item in names.items()):
            if self.pieces.setdefault(token, name.encode()) != name.encode():
                raise ValueError(f"the added token {shown(name)} has the id of another piece")
        first, size = self.vocab.first_text, self.vocab.size
        if min(self.pieces) < first or max(self.pieces) >= size:
            raise ValueError(f"{len(self.pieces)} pieces do not fit into the text ids {first}..{size - 1}")
        # Inside a file such a piece and the special id of that name would be one entry.
        if taken := self.vocab.names().keys() & {spell(piece) for piece in self.ids}:
            raise ValueError(f"the piece {taken.pop()} has the name of a special id")

    @classmethod
    def train(cls, texts: Iterable[str], vocab: Vocab, progress: bool = True) -> "TextTokenizer":
        """Learns as many merges as the Vocab has room for, or as the texts yield."""
        names = {name.encode() for name in vocab.names()}
        return cls(train(texts, vocab.n_text - N_BYTES, names, progress), vocab)

    def encode(self, text: str) -> list[int]:
        """Text -> text ids; never a special or image id."""
        out: list[int] = []
        for part in self._take_added(text):
            if isinstance(part, int):
                out.append(part)
            else:
                for word in split_words(part):
                    out += self.cache.get(word) or self._encode_word(word)
        return out

    def _take_added(self, text: str) -> list[str | int]:
        """Ids of added tokens, the longest first, and the text between them."""
        parts: list[str | int] = [text]
        for names, pattern in zip(self.added, self.added_regexes, strict=True):
            for at in reversed([at for at, part in enumerate(parts) if names and isinstance(part, str)]):
                split = enumerate(pattern.splititer(parts[at]))
                parts[at : at + 1] = [names[part] if odd % 2 else part for odd, part in split]
        return parts

    def _encode_word(self, word: str) -> list[int]:
        piece = word.encode()
        if self.ignore_merges and piece in self.ids:
            ids = [self.ids[piece]]
        else:
            ids = [self.ids[piece] for piece in merge_word(piece, self.ranks)]
        if len(word) <= CACHED_LENGTH:
            if len(self.cache) >= CACHED_WORDS:
                self.cache.clear()
            self.cache[word] = ids
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Text ids -> bytes; an unused text id gives none. Raises ValueError for an id that is not text."""
        out = []
        for token in map(int, ids):
            if not self.vocab.first_text <= token < self.vocab.size:
                raise ValueError(f"id {token} is not text: those are {self.vocab.first_text}..{self.vocab.size - 1}")
            out.append(self.pieces.get(token, b""))
        return b"".join(out)

    def decode(self, ids: Iterable[int]) -> str:
        """Text ids -> text. Bytes are joined before they are read as UTF-8, as one letter may span several ids;
        what is no UTF-8 becomes U+FFFD. Raises ValueError for an id that is not text."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Writes the JSON file of the `tokenizers` library, whole or not at all."""
        write_file(Path(path), json.dumps(to_json(self), ensure_ascii=False, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path, vocab: Vocab | None = None) -> "TextTokenizer":
        """Reads such a file; the Vocab is in it. Raises UserError for any other file, or one for another `vocab`."""
        try:
            return from_json(read_json(Path(path)), vocab)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"it lacks {shown(error)}" if isinstance(error, KeyError) else shown(error, 140)
            raise UserError(f"{path} is not a usable text tokenizer ({why}); make it again with train.py") from None


# ------------------------------------------------------------------------------------------------------------------
# The JSON of the `tokenizers` library.

NOTE = "nanochameleon"  # a key of ours inside "model", where that library passes over keys it does not know


def to_json(tokenizer: TextTokenizer) -> dict:
    """TextTokenizer -> the file's content. Special names are both in the model and marked special, at their ids."""
    vocab, plain = tokenizer.vocab, dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    names = vocab.names()
    text = {spell(piece): token for piece, token in sorted(tokenizer.ids.items(), key=lambda item: item[1])}
    split = [dict(type="Split", pattern={"Regex": p}, behavior="Isolated", invert=False) for p in (ALONE, GPT2)]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": name, **plain, "special": True} for name, token in names.items()]
        + [
            {"id": token, "content": name, **plain, "normalized": bool(late), "special": False}
            for late, added in enumerate(tokenizer.added)
            for name, token in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": tokenizer.ignore_merges,
            NOTE: {"size": vocab.size, "eot_slot": vocab.eot_slot},
            "vocab": names | text,
            "merges": [[spell(left), spell(right)] for left, right in tokenizer.merges],
        },
    }


def from_json(content: dict, vocab: Vocab | None = None) -> TextTokenizer:
    """Inverse of to_json. Text may have its ids in any order, as in files made elsewhere.

    Raises ValueError, KeyError, TypeError or AttributeError for content of any other form.
    """
    model = content["model"]
    check_fields(content, split_words)
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    ids = model["vocab"] | added
    if model["type"] != "BPE" or not all(type(token) is int for token in ids.values()):
        raise ValueError("its model is not BPE with integer ids")
    found = layout(ids, model.get(NOTE), vocab)
    if vocab not in (None, found):
        raise ValueError(f"it was made for {found}, not for {vocab}")
    for name, token in found.names().items():
        if (name in ids or token <= found.boi) and ids.get(name) != token:  # a reserved name may be missing
            raise ValueError(f"it does not have {name} at id {token}")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]  # "a b" in older files
    pairs = [(unspell(left), unspell(right)) for left, right in merges]
    taken = added_text(content["added_tokens"], found)
    # Special names have no text, unless merges make one.
    hidden = added.keys() - taken[0].keys() - taken[1].keys() - {spell(left + right) for left, right in pairs}
    text = {name: token for name, token in model["vocab"].items() if token >= found.first_text and name not in hidden}
    ids = {unspell(name): token for name, token in text.items()}
    return TextTokenizer(pairs, found, ids, taken, model.get("ignore_merges") is True)


def layout(ids: dict[str, int], note: dict | None, vocab: Vocab | None) -> Vocab:
    """The Vocab that the names in a file imply. Its size and end of turn are in the note; a file made elsewhere has
    none, so there they are those of `vocab`, or all ids and the release's slot (the toy's where that is too far)."""
    n_codes = sum(regex.fullmatch("IMGIMG[A-J]+Z", name) is not None for name in ids)
    last = max((ids[name] for name in ids if regex.fullmatch(r"<reserved\d{5}>", name)), default=0)
    n_reserved = last + 1 - (Vocab.first_code + n_codes)
    if note:
        return Vocab(note["size"], n_codes, n_reserved, note["eot_slot"])
    if vocab:
        return Vocab(vocab.size, n_codes, n_reserved, vocab.eot_slot)
    release, toy = Vocab.eot_slot, 2
    return Vocab(max(ids.values()) + 1, n_codes, n_reserved, release if release < n_reserved else toy)
