# %% [markdown]
# # How few tokens can a sentence be?
# A model reads numbers, not letters. This lesson turns text into numbers, called tokens, and back. It builds byte-pair
# encoding (BPE), which almost every language model uses. It takes 20 minutes to read; its cells run in half a minute.
#
# - One number known beforehand
# - The smallest version
# - The library's version
# - How many merges are enough?
# - Break it: merges across words
# - What no tokenizer may lose
# - What this lesson states
# - Exercises
# - Where it is in the library

# %% [markdown]
# ## One number known beforehand
# Every text is a list of bytes already, numbers from 0 to 255, in an encoding called UTF-8. So 256 tokens are enough
# for every text in every language. The price is length: one token a byte. The sentence below therefore takes 33 tokens.
# At the end of this lesson it takes 6.

# %%
sentence = "three small blue circles on white"
print(len(sentence.encode()), "bytes:", list(sentence.encode())[:8], "...")

# %% [markdown]
# ## The smallest version
# BPE repeats one step, called a merge: find the pair of neighbours that occurs most often, and make it one piece. Ties
# go to the pair with the smaller bytes, so the same text always gives the same merges. Here are six merges on our one
# sentence.

# %%
from collections import Counter
from itertools import pairwise

from nanochameleon.text_tokenizer import replace_pair  # the first exercise is to write it


def most_frequent(counts):
    return min(counts, key=lambda pair: (-counts[pair], pair))


pieces = [bytes([b]) for b in sentence.encode()]
for _ in range(6):
    counts = Counter(pairwise(pieces))
    pair = most_frequent(counts)
    pieces = replace_pair(pieces, pair)
    print(f"{counts[pair]} times {pair[0] + pair[1]!r:6} -> {len(pieces)} pieces")

# %% [markdown]
# One sentence teaches little. So we take the texts of a small world: captions of drawn scenes, and questions about them
# with their answers. The training texts come from one set of scenes, the test texts from scenes that no training text
# describes.

# %%
from nanochameleon.data.sources.scenes import World
from nanochameleon.data.sources.shapes import ShapesSource


def texts_of_the_world(form, n, test=False):
    return list(ShapesSource(World(), form, seed=0, test=test).captions(n))


texts = texts_of_the_world("pairs", 2_000) + texts_of_the_world("questions", 2_000)
unseen = texts_of_the_world("pairs", 300, test=True) + texts_of_the_world("questions", 300, test=True)
print(f"{len(texts):,} texts to learn from, {len(unseen):,} to test on")
print(*texts[:2], *unseen[-4:], sep="\n")

# %% [markdown]
# A text is first cut into words, and merges stay inside a word. So each different word has to be rewritten only once,
# however often it occurs; its count says how much its pairs weigh. That gives the whole trainer in a dozen lines.

# %%
from nanochameleon.text_tokenizer import split_words

print(list(split_words("The cat, 12")))


# %%
def learn(texts, n_merges):
    times = Counter(word.encode() for text in texts for word in split_words(text))
    words = {word: [bytes([b]) for b in word] for word in times}
    merges = []
    while len(merges) < n_merges:
        counts = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                counts[pair] += times[word]
        merges.append(most_frequent(counts))
        words = {word: replace_pair(pieces, merges[-1]) for word, pieces in words.items()}
    return merges


mine = learn(texts[:2_000], 40)
print([(left + right).decode() for left, right in mine[:16]])

# %% [markdown]
# A space belongs to the word after it: ` small` is a piece, `small ` is not. Parts of words come first, and whole words
# soon follow.
#
# ## The library's version
# Our trainer counts all pairs again for each merge. The library keeps the counts and changes only those of words that
# hold the merged pair. A heap, a list with its smallest entry in front, finds the next pair. Its entries are negative
# counts.

# %%
from small import show, show_source

from nanochameleon.text_tokenizer import PairCounts, TextTokenizer, train

show_source(PairCounts.pop, PairCounts.merge)

# %% [markdown]
# Both must give the same merges in the same order. That is a check on us and on the library.

# %%
same_merges = mine == train(texts[:2_000], 40)
print("the same 40 merges:", same_merges)

# %% [markdown]
# To encode a text, apply the merges to each word, in the order in which they were learnt. Each piece then has a number.
# A `Vocab` says which: some numbers are kept for images and for special tokens, and text comes after them (lesson 3).

# %%
from nanochameleon.vocab import Vocab

tokenizer = TextTokenizer.train(texts, Vocab.toy(n_codes=64, n_merges=160), progress=False)
tokens = tokenizer.encode(sentence)
print(len(tokens), "tokens:", tokens)
print([tokenizer.pieces[token].decode() for token in tokens])

# %%
show_source(TextTokenizer.encode, TextTokenizer.decode_bytes)

# %% [markdown]
# ## How many merges are enough?
# Each merge makes the vocabulary one larger and texts a little shorter. We count bytes per token on the test texts.


# %%
def bytes_per_token(n_merges):
    short = TextTokenizer.train(texts, Vocab.toy(64, n_merges), progress=False)
    n_tokens = sum(len(short.encode(text)) for text in unseen)
    return len(short.merges), sum(len(text.encode()) for text in unseen) / n_tokens


curve = {n: bytes_per_token(n) for n in (0, 10, 20, 40, 80, 160, 320)}
for n, (learnt, ratio) in curve.items():
    print(f"{n:3} merges wanted, {learnt:3} learnt: {ratio:.2f} bytes per token")

# %%
import matplotlib.pyplot as plt

fig, axes = plt.subplots(2, 1, figsize=(8, 4.6), height_ratios=[3, 1.6])
axes[0].plot(list(curve), [ratio for _, ratio in curve.values()], marker="o")
axes[0].annotate(f"all {curve[320][0]} merges", (320, curve[320][1]), (235, 3.3), arrowprops={"arrowstyle": "->"})
axes[0].set(xlabel="merges wanted", ylabel="bytes per token", ylim=(0, 5))
axes[1].axis("off")
for row, n in enumerate((0, 40, 320)):
    short = TextTokenizer.train(texts, Vocab.toy(64, n), progress=False)
    cut = [short.pieces[token].decode() for token in short.encode(sentence)]
    line = f"{n:3} merges, {len(cut):2} tokens: {'|'.join(cut)}"
    axes[1].text(0, 0.85 - 0.42 * row, line, family="monospace", fontsize=10)
show(
    fig,
    "Bytes per token rise from 1 without merges to 4.35, then stay flat. Below, the sentence is cut into 33, 22 and 6.",
)

# %% [markdown]
# The curve rises to 4.35 bytes per token and then stays flat; below it, the sentence at the start of the lesson falls
# from 33 tokens to 6. Training stopped by itself: after 144 merges each word of this world is one piece, so no pair of
# neighbours occurs twice. Real text never ends like that; Chameleon's vocabulary has 65,536 tokens.

# %% [markdown]
# ## Break it: merges across words
# Why cut texts into words first? Leave it out: let each text be one long word.

# %%
captions = texts_of_the_world("pairs", 1_000)


def pieces_of_merges(words, n_merges):
    pairs, found = PairCounts(words), []
    while len(found) < n_merges and (pair := pairs.pop()):
        pairs.merge(pair)
        found.append((pair[0] + pair[1]).decode())
    return found


inside = pieces_of_merges(Counter(word.encode() for text in captions for word in split_words(text)), 300)
across = pieces_of_merges(Counter(text.encode() for text in captions), 300)
print("the last pieces, inside words:", inside[-3:])
print("the last pieces, across words:", across[-3:])

# %%
names = ["circle", "blue", "white", "small"]
holding = {name: (sum(name in p for p in inside), sum(name in p for p in across)) for name in names}
fig, ax = plt.subplots(figsize=(8, 2.8))
for place, bars in enumerate(holding.values()):
    for side, (n, hatch) in enumerate(zip(bars, ("", "//"), strict=True)):
        ax.barh(place + 0.4 * side, n, 0.36, color=["#2a6fb0", "#e6a27c"][side], hatch=hatch, edgecolor="white")
        ax.text(n + 1, place + 0.4 * side, f"{n} {('inside words', 'across words')[side]}", va="center", fontsize=10)
ax.set(xlabel="pieces that hold the word", xlim=(0, 110))
ax.set_yticks([place + 0.2 for place in range(len(names))], names)
show(fig, f"Bars: pieces that hold each word, for merges inside and across words: {holding}.")

# %% [markdown]
# With merges inside words, one or two pieces hold each word: ` circle` and ` circles`. With merges across words, dozens
# of pieces hold it, such as "a big orange cross on white". Texts become even shorter, but the model would have to learn
# what a circle is once for each of those pieces, and a new combination would be cut differently.

# %% [markdown]
# ## What no tokenizer may lose
# Bytes make it safe: every text comes back, also in languages that no merge has seen. A letter may take several tokens,
# so bytes are joined before they are read as letters.

# %%
samples = [*unseen, "naïve", "变色龙", "a lizard: 🦎", "".join(map(chr, range(0x300)))]
for text in samples[-4:-1]:
    print(f"{len(text)} characters, {len(text.encode())} bytes, {len(tokenizer.encode(text))} tokens: {text}")
lost = [text for text in samples if tokenizer.decode(tokenizer.encode(text)) != text]
print("texts that do not come back:", len(lost))

# %% [markdown]
# A model also has special tokens, for instance "an image begins". No typed text may produce one: a text that spells its
# name gives ordinary text tokens.

# %%
typed = tokenizer.encode("</s><racm3:break>")
print(f"text begins at {tokenizer.vocab.first_text}; the smallest token typed is {min(typed)}")

# %% [markdown]
# ## What this lesson states

# %%
assert same_merges
assert lost == []
assert curve[320][1] > 4  # bytes per token, on texts that training has not seen
assert min(typed) >= tokenizer.vocab.first_text
assert tokenizer.encode("a small") + tokenizer.encode(" star") == tokenizer.encode("a small star")

# %% [markdown]
# ## Exercises
# Put your answer where `...` is. A check prints "right", or the first input on which your answer differs.
#
# ### Write: replace a pair
# `pieces` is a list of bytes objects such as `b"th"`, and `pair` a tuple of two of them. Return the list in which the
# pair is joined wherever it occurs, from the left: `[a, a, a]` with `(a, a)` gives `[aa, a]`.

# %%
from checks import check


def my_replace_pair(pieces, pair):
    return ...


check("words.replace_pair", my_replace_pair)

# %% [markdown]
# ### Write: encode a word
# `word` is a bytes object. `ranks` is a dict from each known pair to its place in the order of learning, from 0. Return
# the list of the word's pieces.


# %%
def my_encode_word(word, ranks):
    return ...


check("words.encode_word", my_encode_word)

# %% [markdown]
# ### Predict: eight letters
# The whole corpus is the one word "aaaaaaaa". How many merges are learnt before no pair occurs twice? A pair that
# overlaps itself counts at each place: "aaa" holds (a, a) two times.

# %%
check("words.merges_of_eight", ...)

# %% [markdown]
# ### Break: tokens that do not come back
# decode(encode(text)) = text, always. Is encode(decode(tokens)) = tokens, too? Return text tokens of this tokenizer for
# which it fails. The list of learnt pairs, `tokenizer.merges`, and the dict from pieces to tokens, `tokenizer.tokens`,
# help.


# %%
def my_unstable(tokenizer):
    return ...


check("words.unstable", my_unstable)

# %% [markdown]
# ## Where it is in the library
# All of it is in [nanochameleon/text_tokenizer.py](../nanochameleon/text_tokenizer.py), in this order: words, merges,
# encoding. `merge_word` there encodes a word of a million letters without hanging. Next: [lesson 2](02_images.ipynb)
# does to images what this one did to text.
#
# `make web` opens a page that talks to a model ([docs/web.md](../docs/web.md)). Its switch **Tokens** shows text pieces
# and image codes in one sequence, each with its number and its probability.
