"""Checks of lesson 1, 01_words."""

import random

from checks import Wrong, close, compare, shown
from nanochameleon import text_tokenizer
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab


def replace_pair(answer):
    """Merging a pair in lists of pieces, short and random ones, gives what the library's replace_pair gives."""
    a, b, c = b"a", b"b", b"c"
    short = [([a, b, c], (a, b)), ([a, a, a], (a, a)), ([a, a, a, a], (a, a)), ([], (a, b)), ([a], (a, a))]
    short += [([a, b, a, b], (a, b)), ([b, a], (a, b)), ([c, a], (a, b)), ([a, a, b], (a, b))]
    rng = random.Random(0)
    long = [(rng.choices([a, b, a + b], k=12), (rng.choice([a, b]), rng.choice([a, b]))) for _ in range(20)]
    compare(answer, text_tokenizer.replace_pair, short + long)


def encode_word(answer):
    """A word is split into the pieces that the library's merge_word gives, with ranks that were learnt from texts."""
    merges = text_tokenizer.train(["abracadabra bar cab", "abba barbara", "cabbage cabs"], 12)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    words = [b"", b"a", b"ab", b"bar", b"cabs", b"abracadabra", b"barbara", b"xyz", b"abbarabra"]
    conflict = {(b"b", b"c"): 0, (b"a", b"b"): 1, (b"ab", b"c"): 2}  # the left pair comes first, the right one wins
    compare(answer, text_tokenizer.merge_word, [(word, ranks) for word in words] + [(b"abc", conflict)])


def merges_of_eight(answer):
    """The number of merges that training on the one text "aaaaaaaa" gives."""
    close(answer, len(text_tokenizer.train(["aaaaaaaa"], 100)), 0)


def unstable(answer):
    """For three tokenizers: encode(decode(tokens)) differs from the text tokens that the answer returns."""
    for corpus in (["aaaa aaaa"], ["the then there"], ["a red circle", "a blue circle"]):
        tokenizer = TextTokenizer.train(corpus, Vocab.toy(4, 8), progress=False)
        given = answer(tokenizer)
        try:
            tokens = [int(token) for token in given]
        except (TypeError, ValueError):
            raise Wrong(f"the answer returns a list of tokens, which are whole numbers, not {shown(given)}") from None
        again = tokenizer.encode(tokenizer.decode(tokens))
        if again == tokens:
            learnt = f"the tokenizer that learnt from {corpus}"
            raise Wrong(f"{learnt} encodes {shown(tokenizer.decode(tokens))} to {tokens} again")
