# %% [markdown]
# # Which of the 65,536 tokens says "an image begins"?
#
# It is 8,197, and you cannot type it. This lesson shows how texts and images become one stream of numbers, how streams
# fill a batch, and what is learnt. It takes about 25 minutes.
#
# - One vocabulary
# - One stream
# - Packed, not padded
# - Documents do not see each other
# - What is learnt
# - The lesson in five assertions
# - Exercises
# - Where it is in the library

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from checks import check
from matplotlib.patches import Patch
from small import FAINT, IMAGE, TEXT, WORLD, PatchTokenizer, show, show_source

from nanochameleon.config import ModelConfig
from nanochameleon.data import Mixture, fuse
from nanochameleon.data.sources.shapes import ShapesSource
from nanochameleon.documents import Image, Text, parse, render, render_segment
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import visible
from nanochameleon.losses import next_token_loss
from nanochameleon.packing import IGNORE, best_fit, collate, pack
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

# %% [markdown]
# ## One vocabulary
#
# A *token* is a whole number that the model reads or writes. Lesson 1 made tokens of text, lesson 2 made codes of
# images. Chameleon gives each kind its own range of one list, its *vocabulary*: image codes, special tokens, text. The
# whole idea fits into three ranges and one function.

# %%
CODES = RESERVED = 8_192  # numbers of image codes, and of special tokens after them
BOS, EOS, FIRST_CODE = 0, 2, 4  # begin and end of a document, image code 0
EOI, BOI = FIRST_CODE + CODES, FIRST_CODE + CODES + 1  # end and begin of an image
FIRST_TEXT = FIRST_CODE + CODES + RESERVED


def small_render(document):
    tokens = [BOS]
    for part in document:  # a str is text, a list is the codes of an image
        if isinstance(part, str):
            tokens += [FIRST_TEXT + byte for byte in part.encode()]
        else:
            tokens += [BOI, *(FIRST_CODE + code for code in part), EOI]
    return tokens + [EOS]


print(small_render(["red", [53, 7]]))

# %% [markdown]
# Here each byte of "red" is a token, without the merges of lesson 1. The begin of an image comes one above its end: the
# released model has it so. The library's `Vocab` holds the same numbers, and `render` makes the same tokens. Special
# tokens have names. What if somebody types one?

# %%
release = Vocab()
bytes_alone = TextTokenizer([], release)
assert render([Text("red"), Image((53, 7))], bytes_alone, release) == small_render(["red", [53, 7]])
for token in (0, 2, 57, 8196, 8197, 8710):
    print(f"{token:>6,}  {release.modality(token):8} {release.name(token)}")

typed = bytes_alone.encode("</s><racm3:break>IMGIMGFDZ")
print(f"typed: {len(typed)} tokens, all from {min(typed):,} up; text begins at {release.first_text:,}")

# %% [markdown]
# The names are the release's own. The text tokenizer gives text tokens alone, so a name is spelt like any word. Special
# tokens come from a document's structure: its begin and end, and its *segments*. A segment is a text, an image or the
# end of a turn, which is all that one speaker of a conversation says at a time. Here is the real code.

# %%
show_source(render_segment, render)

# %% [markdown]
# ## One stream
#
# A *document* is a list of segments in any order. Our small world has images of 32 x 32 pixels with big and small
# circles and squares; `PatchTokenizer` makes 16 codes of each, without loss. Its documents have three forms: image and
# caption, image and questions, or texts and images that alternate.

# %%
images = PatchTokenizer()
vocab = Vocab.toy(n_codes=len(images.codebook), n_merges=120)
forms = ("pairs", "questions", "interleaved")
source = Mixture({form: (ShapesSource(WORLD, form, seed=0), 1.0) for form in forms}, seed=0)
tokenizer = TextTokenizer.train(source.captions(600), vocab, progress=False)

documents = fuse([source.document(i) for i in range(600)], images)  # codes take the place of pixels
streams = [render(document, tokenizer, vocab) for document in documents]
lengths = [len(stream) for stream in streams]
print(f"{len(streams)} documents of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all")


# %%
LOOKS = {
    "text": dict(facecolor=TEXT),
    "image": dict(facecolor="#f3c9a8", edgecolor=IMAGE, hatch="////", lw=0),
    "special": dict(facecolor="black"),
    "padding": dict(facecolor="white", edgecolor=FAINT, hatch="....", lw=0),
}
short = next(i for i, d in enumerate(documents) if isinstance(d[0], Text) and len(d) == 2)
caption, image = documents[short]
print(caption.text)
print(streams[short])

parsed = [parse(stream, tokenizer, vocab) for stream in streams]
n_equal = sum(again == document for again, document in zip(parsed, documents, strict=True))
print(f"{n_equal} documents come back from their tokens")


# %%
def label(token):
    if vocab.is_text(token):
        return tokenizer.decode([token]).strip()
    return vocab.token_to_code(token) if vocab.is_image(token) else NAMES[token]


NAMES = {vocab.bos: "<s>", vocab.boi: "begin", vocab.eoi: "end", vocab.eos: "</s>"}
fig, (picture, strip) = plt.subplots(1, 2, figsize=(9.6, 2.3), width_ratios=[1, 3.6])
picture.imshow(images.decode(torch.tensor([image.codes]))[0])
picture.set(xticks=[7.5, 15.5, 23.5], yticks=[7.5, 15.5, 23.5], xticklabels=[], yticklabels=[])
picture.grid(color=FAINT)
on_white = dict(ha="center", va="center", bbox=dict(facecolor="white", lw=0, pad=1.5))
for i, code in enumerate(image.codes):
    picture.text(3.5 + 8 * (i % 4), 3.5 + 8 * (i // 4), code, **on_white)
for i, token in enumerate(streams[short]):
    strip.barh(-(i // 10), 0.94, left=i % 10, height=0.7, **LOOKS[vocab.modality(token)])
    strip.text(i % 10 + 0.47, -(i // 10), label(token), **on_white)
strip.axis("off")
show(fig, f"Left: '{caption.text}' with its 16 codes. Right: its document as three lines of tokens, text, then codes.")

# %% [markdown]
# Left is an image and the codes of its 8 x 8 patches. Right is the whole document, line by line: plain boxes are text,
# hatched ones codes, black ones special tokens. The model sees the list of tokens printed above and nothing else. There
# code 47 is token 51, since code 0 is token 4. To the model, a code is a token like a word: this is called *early
# fusion*. `parse` goes back from tokens to segments.

# %% [markdown]
# ## Packed, not padded
#
# A batch is a table whose rows, the *sequences*, all have one length; ours is 256. Documents are shorter. One document
# a sequence would fill the rest with `<pad>` tokens, which cost time and teach nothing. So several whole documents
# share a sequence. Three ways to choose them:

# %%
SEQ_LEN = 256
n_sequences = {"one document a sequence": len(lengths)}

n, room = 1, SEQ_LEN
for length in lengths:
    if length > room:  # the document does not fit: close the sequence, open another
        n, room = n + 1, SEQ_LEN
    room -= length
n_sequences["closed at the first misfit"] = n

n_sequences["best fit"] = best_fit(lengths, SEQ_LEN).max() + 1
for way, n in n_sequences.items():
    print(f"{way:27} {n:4} sequences, {sum(lengths) / (n * SEQ_LEN):.0%} of the places used")

# %% [markdown]
# Best fit puts a document where it leaves the least room. The same 600 documents then need a quarter of the sequences.
# No document is cut, so no image is. `pack` chooses by best fit, and `collate` fills the table.

# %%
show_source(collate)


# %%
def draw_band(axis, y, tokens):  # a bar for each run of tokens of one kind
    kinds = ["padding" if token == vocab.pad else vocab.modality(token) for token in tokens.tolist()]
    edges = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    for start, end in pairwise(edges):
        axis.barh(y, end - start, left=start, height=0.55, **LOOKS[kinds[start]])


# %%
batch = pack(streams, SEQ_LEN, vocab.pad)
first, ids = batch[:4], batch.doc_ids[:4]
mask = visible(ids, ids)  # (4, 256, 256)
fig, (bands, square) = plt.subplots(1, 2, figsize=(9.6, 4), width_ratios=[1.6, 1])
for s in range(4):
    draw_band(bands, s, first.tokens[s])
    for start in [0, *((ids[s].diff() > 0).nonzero()[:, 0] + 1).tolist()]:
        bands.text(start, s - 0.33, int(ids[s, start]))
bands.set(xlim=(0, SEQ_LEN), ylim=(3.5, -0.75), yticks=range(4), xlabel="place in the sequence", ylabel="sequence")
bands.set_title("four packed sequences, their documents numbered", loc="left")
patches = [Patch(label=name, **look) for name, look in LOOKS.items()]
bands.legend(handles=patches, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16))
square.imshow(mask[0], cmap="Greys", vmax=1.4)
square.set(xlabel="token that is seen", ylabel="token that sees", xticks=[0, 128, 255], yticks=[0, 128, 255])
square.set_title("who sees whom in sequence 0", loc="left")
alt = """Left: four sequences as bands of 3 to 6 documents, where text and hatched image codes alternate; less than a \
tenth at the end is padding. Right: the mask of sequence 0, dark triangles along the diagonal, one for each document."""
show(fig, alt)

# %% [markdown]
# Left, each band is a sequence: plain text, hatched image codes, black special tokens, dotted padding at the end. Small
# numbers count documents. Right, a dark dot says that the token of its row sees the token of its column: one triangle
# for each document, and a last one for padding.

# %% [markdown]
# ## Documents do not see each other
#
# In the transformer each token looks at other tokens; lesson 4 builds that. A token sees itself and what comes before
# it, since what follows is to be predicted. A neighbour in the sequence is another document by chance: it must stay
# unseen. Break it: a model with random weights reads sequence 0 packed with the mask, packed without it, and each
# document alone. With the mask, company should change nothing.

# %%
torch.manual_seed(0)
model = Chameleon(ModelConfig(vocab_size=vocab.size, dim=96, n_layers=3, n_heads=3, multiple_of=32)).eval()
torch.nn.init.normal_(model.output.weight, std=0.1)  # it starts at 0, and all logits would be 0


@torch.inference_mode()
def logits_of(tokens, positions=None, documents=None):
    return model.logits(model(tokens[None], None if positions is None else positions[None], documents))[0]


tokens, ids, positions = first.tokens[0], first.doc_ids[0], first.positions[0]
alone = torch.cat([logits_of(tokens[ids == d]) for d in ids.unique_consecutive()])
packed = logits_of(tokens, positions, Documents.of(ids[None]))  # with the mask
leaking = logits_of(tokens, positions)  # one triangle over the whole sequence
kept_apart, leaked = ((x - alone).abs().amax(1) for x in (packed, leaking))
print(f"largest change of a logit with the mask: {kept_apart.max():.6f}")
print(f"without it, after document 0: at least {leaked[ids > 0].min():.1f} at every token, {leaked.max():.1f} at most")

# %%
fig, axis = plt.subplots(figsize=(8, 3))
axis.plot(leaked, color=IMAGE, linestyle="--")
axis.plot(kept_apart, color=TEXT)
axis.text(3, leaked.max() * 0.7, "dashed: without the mask", color=IMAGE)
axis.text(3, leaked.max() * 0.05, "solid: with the mask", color=TEXT)
for start in (ids.diff() != 0).nonzero()[:, 0] + 1:
    axis.axvline(start, color=FAINT, linewidth=1, linestyle=":")
axis.set(xlim=(0, SEQ_LEN), xlabel="place in sequence 0; dotted lines are borders", ylabel="largest change of a logit")
show(
    fig,
    "The change of the logits against the place in the sequence. With the mask the line is at 0 everywhere. Without it "
    "the line is at 0 in document 0, jumps above 2 at the first border and stays there.",
)

# %% [markdown]
# The solid line never leaves 0. The dashed one jumps at the first border: without the mask, each later document is read
# together with its neighbours, and every logit vector changes.

# %% [markdown]
# ## What is learnt
#
# The *target* of a place is the next token of the same document. The last token of a document predicts nothing, and
# neither does padding: their target is `IGNORE`. Three documents in a sequence of 12 show the whole table. `positions`
# count from 0 in each document; lesson 4 needs them.

# %%
table = collate([[[40, 41, 42], [50, 51, 52, 53], [60, 61]]], 12, pad=vocab.pad)
for name in ("tokens", "targets", "doc_ids", "positions"):
    print(f"{name:10}", *(f"{x:4}" for x in getattr(table, name)[0].tolist()))

# %% [markdown]
# For each place the model gives a *logit*, a score, to every token of the vocabulary. The *cross-entropy* is log Z
# minus the logit of the target, with Z the sum of exp(logit): small where the target has the highest score. *z-loss*
# adds a little of (log Z)^2, which lesson 6 needs. The loss is a sum over the places that have a target.

# %%
logits, targets = packed, first.targets[0]
by_torch = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
sums = next_token_loss(logits, targets, vocab)
print(
    f"torch {by_torch:.3f}, the library {sums.loss:.3f}, {int(sums.count)} targets, {sums.loss / sums.count:.2f} each"
)

# %% [markdown]
# A target can be left out without changing what is read. *Alignment*, the last stage of training, learns the answers of
# conversations alone: a special token ends each turn, and `collate` with `assistant_eot` ignores the questions.

# %%
answers = pack(streams, SEQ_LEN, vocab.pad, assistant_eot=vocab.eot)
learnt, answered = ((b.targets != IGNORE).sum().item() for b in (batch, answers))
codes = vocab.is_image(batch.targets).sum().item()
print(f"{learnt:,} targets, {codes / learnt:.0%} of them image codes; {answered:,} with answers alone")

# %% [markdown]
# ## The lesson in five assertions

# %%
assert parsed == documents
assert release.boi == 8_197 > release.eoi and min(typed) >= release.first_text

numbered = [(s, d) for s in range(len(batch.tokens)) for d in range(int(batch.doc_ids[s].max()) + 1)]
unpacked = [batch.tokens[s][batch.doc_ids[s] == d].tolist() for s, d in numbered]
assert sorted(unpacked) == sorted(streams)  # every document whole, exactly once

assert kept_apart.max() < 1e-4 and leaked[ids > 0].min() > 0.5
assert learnt == sum(length - 1 for length in lengths)

# %% [markdown]
# ## Exercises
#
# Put your answer where `...` is, then run the cell.
#
# ### Write: what a model needs to know of a packed sequence
#
# `doc_ids` (T,) numbers the documents; padding has -1 and sees padding alone. The model of lesson 4 reads the mask and
# the positions; targets and loss are what it learns from.


# %%
def my_visible(doc_ids):
    """(T,) -> bool (T, T): whether the token of a row sees the token of a column."""
    return ...


def my_positions(doc_ids):
    """(T,) -> (T,): each token's number in its document, from 0; padding has 0."""
    return ...


check("one_stream.visible", my_visible)
check("one_stream.positions", my_positions)


# %%
def my_targets(tokens, doc_ids):
    """(T,), (T,) -> (T,): the next token of the same document, or IGNORE."""
    return ...


def my_loss(logits, targets, z_loss):
    """(N, V), (N,) -> the sum of log Z - logit of the target + z_loss (log Z)^2 over the places with a target."""
    return ...


check("one_stream.targets", my_targets)
check("one_stream.loss", my_loss)

# %% [markdown]
# ### Predict: sizes
#
# The released image tokenizer makes 32 x 32 codes of 512 x 512 pixels. How many such images fit into the 4,096 tokens
# that the model reads at once? And of a document with a caption of 12 tokens and one image, which share of the tokens
# are image codes?

# %%
images_in_context = ...
image_share = ...  # between 0 and 1, within 0.001

check("one_stream.images_in_context", images_in_context)
check("one_stream.image_share", image_share)

# %% [markdown]
# ### Break: a document that does not come back
#
# The first assertion holds for 600 documents, not for all. Find a document of the release's vocabulary that does not
# come back from its tokens as it was. Then find tokens that `parse` refuses, although each is one of the 65,536.

# %%
unequal = ...  # a list of segments, such as [Text("a"), Image((1, 2))]
refused = ...  # a list of tokens, such as [0, 8197, 4, 8196, 2]

check("one_stream.unequal", unequal)
check("one_stream.refused", refused)

# %% [markdown]
# ## Where it is in the library
#
# The ranges are in [vocab.py](../nanochameleon/vocab.py), `render` and `parse` in
# [documents.py](../nanochameleon/documents.py), packing and targets in [packing.py](../nanochameleon/packing.py), the
# forms and the loader of shuffled batches in [data/](../nanochameleon/data/loader.py), the loss in
# [losses.py](../nanochameleon/losses.py). The next lesson, [04_one_transformer](04_one_transformer.ipynb), builds what
# reads the stream.
