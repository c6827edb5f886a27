"""Text <-> tokens: nothing is lost, nothing special can be spelled, and `tokenizers` agrees on the same file."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import HOSTILE, any_text, merge_lists, settled_text, tokenizers
from tokenizers import Regex, pre_tokenizers

from nanochameleon import text_tokenizer
from nanochameleon.text_tokenizer import BYTES, TextTokenizer, count_words, merge_word, split_words, train
from nanochameleon.vocab import Vocab
from nanochameleon.weights.tokenizer_json import spell

corpora = st.lists(any_text | st.text("ab \n", max_size=60), max_size=4)


# --- words ---------------------------------------------------------------------------------------------------------


@given(any_text)
def test_words_joined_are_the_text(text):
    assert "".join(split_words(text)) == text


@given(settled_text)
def test_words_are_those_of_the_release(text):
    """The release's five steps one after the other, run by `tokenizers`."""
    steps = [
        pre_tokenizers.Split(Regex("([\\t\\n]|    |  )"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(Regex(r"[\p{P}!-/:-@\[-`{-~]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),  # GPT-2's pattern is inside
    ]
    theirs = pre_tokenizers.Sequence(steps).pre_tokenize_str(text)
    assert [spell(word.encode()) for word in split_words(text)] == [word for word, _ in theirs]


def test_words_of_an_example():
    text = "it's 12 cats;\n\tx+=1   y"
    words = ["it", "'", "s", " ", "1", "2", " cats", ";", "\n", "\t", "x", "+", "=", "1", "  ", " y"]
    assert list(split_words(text)) == words


# --- learning ------------------------------------------------------------------------------------------------------


def naive_train(texts, n_merges):
    """Counts everything anew for each merge."""
    counts = Counter(word for text in texts for word in split_words(text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for pieces, n in words:
            for pair in pairwise(pieces):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        for pieces, _ in words:
            for i in range(len(pieces)):  # pieces shrink on the way: past the end, the slice is no pair
                if tuple(pieces[i : i + 2]) == best:
                    pieces[i : i + 2] = [b"".join(best)]
    return merges


@given(corpora, st.integers(0, 30))
def test_training_always_merges_the_most_frequent_pair(texts, n_merges):
    assert train(texts, n_merges) == naive_train(texts, n_merges)


def test_training_agrees_with_the_naive_one_for_long():
    """Long enough for counts to fall while their entry waits in the queue."""
    texts = [" ".join(f"{chr(97 + i * i % 23)}{chr(97 + i * 7 % 26)}{'on' * (i % 4)}ing" for i in range(600))]
    merges = train(texts, 200)
    assert len(merges) == 200 and merges == naive_train(texts, 200)


@given(corpora, st.randoms())
def test_training_depends_on_counts_alone(texts, random):
    shuffled = random.sample(texts, len(texts))
    assert train(shuffled, 20) == train(texts, 20)


def test_too_small_a_corpus_gives_fewer_merges_and_leaves_tokens_unused():
    vocab = Vocab.toy(4, n_merges=100)
    for texts, n in (([], 0), ([""], 0), (["a", "b"], 0), (["abc abc"], 2)):  # " abc" stands only once
        tokenizer = TextTokenizer.train(texts, vocab, progress=False)
        assert len(tokenizer.merges) == n
        assert tokenizer.decode([vocab.size - 1, *tokenizer.encode("abc")]) == "abc"


def test_a_word_longer_than_the_limit_is_cut_in_training():
    counts = count_words(["é" * 100_000])
    assert max(len(word.decode()) for word in counts) <= text_tokenizer.LONGEST_TRAINING_WORD
    assert sum(len(word) * n for word, n in counts.items()) == 200_000


# --- encoding and decoding -----------------------------------------------------------------------------------------


@given(tokenizers(), any_text)
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(corpora, st.integers(0, 30), any_text)
def test_decode_inverts_encode_after_training(texts, n_merges, text):
    tokenizer = TextTokenizer.train(texts, Vocab.toy(4, n_merges), progress=False)
    for each in (text, *texts):
        assert tokenizer.decode(tokenizer.encode(each)) == each


@given(tokenizers(), st.text(st.characters(categories=["Cs", "Ll"])))
def test_lone_surrogates_become_the_replacement_character(tokenizer, text):
    expected = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@given(tokenizers(), st.data())
def test_tokens_cut_anywhere_still_decode(tokenizer, data):
    """Sampling may stop inside a letter: bytes are exact, text never raises."""
    tokens = tokenizer.encode(data.draw(any_text))
    cut = data.draw(st.integers(0, len(tokens)))
    assert tokenizer.decode_bytes(tokens[:cut]) + tokenizer.decode_bytes(tokens[cut:]) == tokenizer.decode_bytes(tokens)
    assert isinstance(tokenizer.decode(tokens[:cut]), str)


@given(tokenizers())
def test_tokens_that_are_not_text_are_refused(tokenizer):
    vocab = tokenizer.vocab
    for token in (-1, vocab.bos, vocab.boi, vocab.eot, vocab.first_text - 1, vocab.size):
        with pytest.raises(ValueError, match="not text"):
            tokenizer.decode([vocab.first_text, token])


def naive_merge(word, ranks):
    """Looks at the whole word for each merge."""
    pieces = [bytes([b]) for b in word]
    while found := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        _, i = min(found)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


@given(merge_lists(b"abc", 12), st.text("abc", max_size=30))
@example([(b"b", b"c"), (b"a", b"b"), (b"bc", b"a"), (b"a", b"bc")], "abca")  # what was to merge first has changed
def test_merging_takes_the_lowest_rank_first_and_the_leftmost_of_equals(merges, word):
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    assert merge_word(word.encode(), ranks) == naive_merge(word.encode(), ranks)


def test_a_word_of_200_000_letters():
    merges = [(b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a")]
    tokenizer = TextTokenizer(merges, Vocab.toy(4, 3))
    tokens = tokenizer.encode("a" * 200_001)
    assert tokenizer.decode(tokens) == "a" * 200_001
    assert len(tokens) == 50_000  # aaaa 49,999 times, then one of five
    assert not tokenizer.cache


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(text_tokenizer, "CACHED_TEXTS", 10)
    tokenizer = TextTokenizer.train(["abc abcd"] * 2, Vocab.toy(4, 10), progress=False)
    text = " ".join("abcd"[: i % 5] + chr(97 + i % 26) for i in range(200))
    uncached = [tokenizer.tokens[p] for word in split_words(text) for p in merge_word(word.encode(), tokenizer.ranks)]
    first = tokenizer.encode(text)
    assert 0 < len(tokenizer.cache) <= 10
    assert first == tokenizer.encode(text) == uncached
    for _ in range(2):
        tokenizer.encode("abc abcd").clear()  # a caller's list is its own
    assert tokenizer.decode(tokenizer.encode("abc abcd")) == "abc abcd"


# --- no text spells a special id -------------------------------------------------------------------------------------


@given(tokenizers(), st.data())
def test_encode_makes_text_tokens_only(tokenizer, data):
    names = st.sampled_from([*tokenizer.vocab.names(), *HOSTILE])
    text = data.draw(st.lists(names | any_text).map("".join))
    tokens = tokenizer.encode(text)
    assert all(tokenizer.vocab.modality(token) == "text" for token in tokens)
    assert tokenizer.decode(tokens) == text


def test_a_piece_named_like_a_special_token_is_refused():
    with pytest.raises(ValueError, match="<s>"):
        TextTokenizer([(b"<", b"s"), (b"<s", b">")], Vocab.toy(4, 2))


@pytest.mark.parametrize(
    "merges, tokens",
    [
        ([(b"ab", b"c")], None),  # ab has not been made
        ([(b"a", b"b"), (b"b", b"c"), (b"c", b"d")], None),  # no room for three
        ([], {piece: 16 + min(i, 254) for i, piece in enumerate(BYTES)}),  # an id for two bytes
        ([], {piece: i for i, piece in enumerate(BYTES)}),  # text over special tokens
        ([], {piece: 16 + i for i, piece in enumerate(BYTES[1:])}),  # a byte without id
    ],
)
def test_merges_and_tokens_that_cannot_belong_together_are_refused(merges, tokens):
    with pytest.raises(ValueError):
        TextTokenizer(merges, Vocab.toy(4, 2), tokens)
