"""Byte-level BPE: text <-> tokens, and learning the merges from a corpus.

From top to bottom: split text into words, learn merges from word counts, and merge one word. Then TextTokenizer gives
each piece its token in the Vocab. weights/tokenizer_json.py saves it as JSON for the `tokenizers` library, which then
encodes to the same tokens.

Left out on purpose: special tokens. encode() returns text tokens only, whatever the text spells, so nothing that a user
types can begin an image or end a document; special tokens come from segments (documents.py). There is no normalisation
either: decode(encode(s)) == s for every str, except that a lone surrogate, which has no bytes, becomes U+FFFD.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise

import regex
from tqdm import tqdm

from nanochameleon.errors import shown
from nanochameleon.vocab import N_BYTES, Vocab

Pair = tuple[bytes, bytes]
BYTES = [bytes([b]) for b in range(N_BYTES)]

# ---------------------------------------------------------------------------------------------------------------------
# Words, by the release's rules. BPE never merges across the border of two words.

# Words of their own: a tab, a line end, 4 or 2 spaces, any single digit, any single punctuation mark. ASCII symbols
# such as $ + < are spelled out because Unicode does not count them as punctuation.
ALONE = r"[\t\n]|    |  |\p{N}|[\p{P}!-/:-@\[-`{-~]"
# GPT-2's pattern splits the text between them, so that a word takes the space before it: " the".
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

ALONE_REGEX = regex.compile(f"({ALONE})")
GPT2_REGEX = regex.compile(GPT2)
SURROGATE_REGEX = regex.compile("[\ud800-\udfff]")


def split_words(text: str) -> Iterator[str]:
    """'The cat, 12' -> 'The', ' cat', ',', ' ', '1', '2'. Joined, the words are the text, lone surrogates as U+FFFD.

    `tokenizers` has older Unicode tables than `regex`: letters added since then may split differently there.
    """
    for part in ALONE_REGEX.splititer(SURROGATE_REGEX.sub("\ufffd", text)):
        yield from GPT2_REGEX.findall(part)


# ---------------------------------------------------------------------------------------------------------------------
# Learning merges: the most frequent pair of neighbours becomes one piece, again and again. A corpus has far fewer
# distinct words than words, so words are counted once and only the distinct ones are rewritten.

LONGEST_TRAINING_WORD = 256  # characters; longer words are cut, since each merge inside a word rewrites all of it


def count_words(texts: Iterable[str], progress: bool = False) -> Counter[bytes]:
    """Count how often each word (UTF-8) occurs in the corpus."""
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
    """How often each pair of neighbours occurs in the corpus, kept up to date while words are rewritten."""

    def __init__(self, word_counts: Counter[bytes]):
        self.times = list(word_counts.values())
        self.words = [[BYTES[b] for b in word] for word in word_counts]
        self.counts: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)  # pair -> words that hold it, or once held it
        for i, pieces in enumerate(self.words):
            for pair in pairwise(pieces):
                self.counts[pair] += self.times[i]
                self.where[pair].add(i)
        # A heap puts the smallest entry first: the highest count, then the smaller bytes.
        self.queue = [(-n, pair) for pair, n in self.counts.items()]
        heapq.heapify(self.queue)

    def pop(self) -> Pair | None:
        """Take out the most frequent pair; None when no pair occurs twice."""
        while self.queue:
            n, pair = heapq.heappop(self.queue)
            now = self.counts[pair]
            if now == -n:
                return pair if now > 1 else None
            heapq.heappush(self.queue, (-now, pair))  # its count has fallen since it was queued
        return None

    def merge(self, pair: Pair) -> None:
        """Rewrite every word that holds the pair. Only pairs with the new piece can gain, so only they are queued."""
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
    """Corpus -> at most `n_merges` merges in order; fewer when no pair of neighbours occurs twice any more.

    Ties go to the pair with the smaller bytes, so the same corpus always gives the same merges. A pair that would make
    one of the `forbidden` pieces is skipped.
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


# ---------------------------------------------------------------------------------------------------------------------
# Using merges


def merge_word(word: bytes, ranks: dict[Pair, int]) -> list[bytes]:
    """Bytes -> pieces: always merge the neighbours of lowest rank first; among equal ranks, the leftmost.

    A queue of candidates over a linked list, O(n log n), so that a word of a million letters does not hang.
    """
    n = len(word)
    pieces = [BYTES[b] for b in word]  # b"" where a piece went into its left neighbour
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))  # the neighbours of each piece
    queue = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
    heapq.heapify(queue)
    while queue:
        # 1. the best candidate: the piece at i and its right neighbour at j
        rank, i = heapq.heappop(queue)
        j = after[i]
        if j == n or ranks.get((pieces[i], pieces[j])) != rank:
            continue  # one of the two has been merged with another since this was queued
        # 2. merge j into i and unlink j
        pieces[i], pieces[j] = pieces[i] + pieces[j], b""
        after[i] = after[j]
        if after[i] < n:
            before[after[i]] = i
        # 3. the new piece makes a new pair on each side
        for left in (before[i], i):
            if left >= 0 and after[left] < n and (pair := (pieces[left], pieces[after[left]])) in ranks:
                heapq.heappush(queue, (ranks[pair], left))
    return [piece for piece in pieces if piece]


CACHED_TEXTS = 65_536  # words, and texts of several
CACHED_LENGTH = 64  # characters; the two together bound the cache to some tens of MB


class TextTokenizer:
    """Text <-> the text tokens of a Vocab. Byte b is token first_text + b, merge i is token first_text + 256 + i.

    `tokens` (piece -> token) overrides that order, for files made elsewhere. Text tokens without a piece stay unused: a
    corpus may give fewer merges than there is room for. Raises ValueError for merges and tokens that do not fit.
    """

    def __init__(self, merges: list[Pair], vocab: Vocab, tokens: dict[bytes, int] | None = None):
        self.merges, self.vocab = [(left, right) for left, right in merges], vocab
        if tokens is None:
            in_order = dict.fromkeys([*BYTES, *(left + right for left, right in self.merges)])
            tokens = {piece: vocab.first_text + i for i, piece in enumerate(in_order)}
        self.tokens = tokens
        self.pieces = {token: piece for piece, token in tokens.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.cache: dict[str, list[int]] = {}
        self._check()

    def _check(self) -> None:
        needed = {*BYTES, *(piece for pair in self.merges for piece in (*pair, pair[0] + pair[1]))}
        if missing := needed - self.tokens.keys():
            raise ValueError(f"{len(missing)} pieces have no token, {shown(min(missing))} among them")
        if len(self.pieces) < len(self.tokens):
            raise ValueError("two pieces share a token")
        first, size = self.vocab.first_text, self.vocab.size
        if min(self.pieces) < first or max(self.pieces) >= size:
            raise ValueError(f"{len(self.pieces)} pieces do not fit into the text tokens {first}..{size - 1}")
        # In a file such a piece and the special token of that name would be one entry.
        if taken := {name for name in self.vocab.names() if name.encode() in self.tokens}:
            raise ValueError(f"the piece {taken.pop()} has the name of a special token")

    @classmethod
    def train(cls, texts: Iterable[str], vocab: Vocab, progress: bool = True) -> "TextTokenizer":
        """Learn as many merges as the Vocab has room for, or as the texts yield."""
        names = {name.encode() for name in vocab.names()}
        return cls(train(texts, vocab.n_text - N_BYTES, names, progress), vocab)

    def encode(self, text: str) -> list[int]:
        """Text -> text tokens; never a special or image token."""
        # A short text is cached whole, too: prompts and the questions of a drawn world repeat theirs.
        if known := self.cache.get(text):
            return known.copy()
        tokens: list[int] = []
        for word in split_words(text):
            tokens += self.cache.get(word) or self._cached(word, self._encode_word(word))
        return self._cached(text, tokens).copy()

    def _encode_word(self, word: str) -> list[int]:
        return [self.tokens[piece] for piece in self._split_word(word.encode())]

    def _cached(self, text: str, tokens: list[int]) -> list[int]:
        if len(text) <= CACHED_LENGTH:
            if len(self.cache) >= CACHED_TEXTS:
                self.cache.clear()
            self.cache[text] = tokens
        return tokens

    def _split_word(self, word: bytes) -> list[bytes]:
        """A word's pieces. tokenizer_json.py overrides this, for files that look up whole words first."""
        return merge_word(word, self.ranks)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Text tokens -> bytes; an unused text token gives none. Raises ValueError for a token that is not text."""
        out = []
        for token in map(int, tokens):
            if not self.vocab.first_text <= token < self.vocab.size:
                raise ValueError(f"token {token} is not text: {self.vocab.first_text}..{self.vocab.size - 1} are")
            out.append(self.pieces.get(token, b""))
        return b"".join(out)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text tokens -> text; bytes that are not UTF-8 become U+FFFD. Raises ValueError for a token that is not text.

        Bytes are joined before they are read as UTF-8, because one letter may span several tokens.
        """
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")
