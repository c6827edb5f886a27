"""Wrong answers to the exercises of lesson 1."""


def overlapping(pieces, pair):
    """Joins neighbours that overlap: [a, a, a] -> [aa, aa]."""
    out, i = [], 0
    while i < len(pieces):
        joined = i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == pair
        out.append(pieces[i] + pieces[i + 1] if joined else pieces[i])
        i += 1 + (joined and pair[0] != pair[1])
    return out


def loses_the_last(pieces, pair):
    out, i = [], 0
    while i + 1 < len(pieces):
        joined = (pieces[i], pieces[i + 1]) == pair
        out.append(pieces[i] + pieces[i + 1] if joined else pieces[i])
        i += 2 if joined else 1
    return out


def from_the_left(word, ranks):
    """Merges the first pair that is known, not the one that was learnt first."""
    pieces = [bytes([b]) for b in word]
    while known := [i for i in range(len(pieces) - 1) if (pieces[i], pieces[i + 1]) in ranks]:
        i = known[0]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def one_pass(word, ranks):
    """Goes through the merges once, in order, and joins one pair for each."""
    pieces = [bytes([b]) for b in word]
    for pair in ranks:
        for i in range(len(pieces) - 1):
            if (pieces[i], pieces[i + 1]) == pair:
                pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
                break
    return pieces


WRONG = {
    "replace_pair": [overlapping, loses_the_last],
    "encode_word": [from_the_left, one_pass],
    "merges_of_eight": [3, 7],  # until one piece is left; one for each pair
    "unstable": [
        lambda tokenizer: tokenizer.encode("a red circle"),
        lambda tokenizer: [tokenizer.vocab.first_text + 97] * 2,  # a merge of some corpora alone
    ],
}
