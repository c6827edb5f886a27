"""Answers to the exercises of lesson 1."""

from itertools import pairwise


def replace_pair(pieces, pair):
    out = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece  # the left one is in the list already; it becomes the merged piece
        else:
            out.append(piece)
    return out  # a merged piece is longer than pair[0], so it is never the left half of the same pair


def encode_word(word, ranks):
    pieces = [bytes([b]) for b in word]
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        pieces = replace_pair(pieces, min(known, key=ranks.get))  # the merge that was learnt first
    return pieces


merges_of_eight = 2  # aa (7 times), then aaaa (3 times); now there are two pieces, and their pair occurs once


def unstable(tokenizer):
    left, right = tokenizer.merges[0]
    # encode() would never leave these two apart. A byte that is no letter alone, such as 0xFF, breaks it, too.
    return [tokenizer.tokens[left], tokenizer.tokens[right]]
