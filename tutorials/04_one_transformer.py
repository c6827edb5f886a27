# %% [markdown]
# # What had to be added to Llama so that it can draw?
#
# Two small norms in each layer; the tokens did the rest. Llama 2 7B has 6,738,415,616 parameters: this lesson finds
# what Chameleon 7B adds, and builds the model. It takes 30 minutes.
#
# - The count
# - Attention
# - Two kinds of norm
# - Where a token is
# - The model
# - Who hears of a change
# - Six assertions
# - Exercises
# - Where it is in the library

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from checks import check
from small import IMAGE, TEXT, show, show_source

from nanochameleon.config import ModelConfig
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import apply_rotary_emb, attention_reference
from nanochameleon.packing import pack
from nanochameleon.transformer import Block, Chameleon, FeedForward, QKNorm, compute_freqs_cis

# %% [markdown]
# ## The count
#
# On torch's *meta* device a tensor has a shape and no memory. So a model of 7 billion parameters can be counted on any
# machine.


# %%
def n_parameters(**changes):
    with torch.device("meta"):
        return sum(p.numel() for p in Chameleon(ModelConfig(**changes)).parameters())


llama = n_parameters(vocab_size=32_000, qk_norm=False)
vectors = 2 * (65_536 - 32_000) * 4_096  # a token has 4,096 numbers at the input, and at the output
norms = 32 * 2 * 2 * 128  # layers; queries and keys; weight and bias; the width of a head
print(f"{llama:,} + {vectors:,} + {norms:,} = {llama + vectors + norms:,}")
print(f"Chameleon 7B: {n_parameters():,}")

# %% [markdown]
# A larger vocabulary needs more vectors. Beyond those, 16,384 parameters are new: two in a million. No part of the
# network knows what an image is.
#
# ## Attention
#
# The model keeps a vector for each token. *Attention* lets a token read others through three vectors of each: a *query*
# (what it looks for), a *key* (what it offers), a *value* (what it hands over).


# %%
def one_head(q, k, v, mask):  # T tokens, vectors of width E: (T, E) each, mask (T, T)
    scores = q @ k.T / q.shape[1] ** 0.5  # dot products, kept near 1 by sqrt(E)
    scores = scores.masked_fill(~mask, -torch.inf)  # what is not seen gets weight 0
    weights = scores.softmax(-1)  # each row adds up to 1
    return weights @ v  # weighted means of the values


torch.manual_seed(0)
q, k, v = torch.randn(3, 6, 8)
mask = torch.ones(6, 6, dtype=torch.bool).tril()  # itself and earlier tokens, as in lesson 3
library = attention_reference(*(x[None, None] for x in (q, k, v)), mask[None])[0, 0]
fused = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]
to_library, to_fused = ((one_head(q, k, v, mask) - x).abs().max() for x in (library, fused))
print(f"largest difference: {to_library:.0e} to the library, {to_fused:.0e} to torch's fused attention")

# %% [markdown]
# A layer runs several *heads* next to each other, each with vectors of its own of width E. In *grouped-query attention*
# a few query heads share one key and value head: the 34B has 64 query heads on 8 key heads. Here is the real code, for
# any number of heads.

# %%
show_source(attention_reference)

# %% [markdown]
# ## Two kinds of norm
#
# A *norm* rescales a vector and then multiplies each number by a learnt weight. *RMSNorm* divides by the root of the
# mean square; Llama has it before each part of a layer. *QK-norm* is what Chameleon adds: it gives each query and each
# key mean 0 and variance 1, then applies a weight and a bias. Without it scores grow and learning suffers, which lesson
# 6 shows.

# %%
show_source(QKNorm)

# %% [markdown]
# ## Where a token is
#
# A weighted mean has no order, so attention does not know where a token is. *Rotary embedding* adds that. It takes a
# query's or key's numbers in pairs, points in the plane, and rotates pair i by its position times a speed of its own:
# (a, b) becomes (a cos - b sin, a sin + b cos). A dot product depends on the angle *between* points, so a score depends
# on distance alone.

# %%
show_source(compute_freqs_cis)

# %% [markdown]
# The norm comes before the rotation. Weight and bias treat the two numbers of a pair differently, so after the rotation
# they would bend its angle. Break it: put the norm last, and watch a query and a key that stay 3 places apart.

# %%
generator = torch.Generator().manual_seed(0)
query, key = torch.randn(2, 1, 1, 1, 64, generator=generator)  # of width 64
norm = QKNorm(1, 64, eps=1e-5).requires_grad_(False)
norm.weight += 0.5 * torch.randn(1, 64, generator=generator)
norm.bias += 0.5 * torch.randn(1, 64, generator=generator)


def placed(x, position, norm_last):
    angles = compute_freqs_cis(torch.tensor([[position]]), 64, theta=1e4)
    return norm(apply_rotary_emb(x, angles)) if norm_last else apply_rotary_emb(norm(x), angles)


def score(i, j, norm_last=False):
    """The score of the query at position i and the key at position j."""
    return float((placed(query, i, norm_last) * placed(key, j, norm_last)).sum() / 64**0.5)


print(f"norm first: {score(5, 2):.4f} = {score(105, 102):.4f}, and 9 apart {score(11, 2):.4f}")
print(f"norm last:  {score(5, 2, True):.4f}, {score(105, 102, True):.4f}")

# %%
fig, (far, moved) = plt.subplots(1, 2, figsize=(9.6, 3.3), sharey=True)
distances, places = range(61), range(0, 121)
far.plot(distances, [score(d, 0) for d in distances], color=TEXT, label="key at position 0")
far.plot(distances[::3], [score(100 + d, 100) for d in distances[::3]], "o", color=IMAGE, label="key at position 100")
far.set(xlabel="distance of query and key", ylabel="score")
far.set_title("norm first: the distance decides", loc="left")
far.legend()
moved.plot(places, [score(p + 3, p) for p in places], color=TEXT)
moved.plot(places, [score(p + 3, p, norm_last=True) for p in places], color=IMAGE, linestyle="--")
moved.text(62, score(3, 0) + 0.15, "norm first", color=TEXT)
moved.text(2, 1.7, "norm last", color=IMAGE)
moved.set(xlabel="position of the key; the query is 3 after it")
moved.set_title("the same distance, other places", loc="left")
show(
    fig,
    "Left: the score against the distance, a wavy curve; circles for a key at position 100 are on the curve for a key "
    "at position 0. Right: the score at distance 3 against the position: flat with the norm first, and between 0.3 and "
    "2.5 with the norm last.",
)

# %% [markdown]
# Left, the circles are on the curve: moved by 100 places, every score is the same. Right, the solid line is flat; with
# the norm last (dashed) the score of the same distance swings.

# %% [markdown]
# ## The model
#
# A layer is a *block* of two branches: attention, then a *feed-forward* network that works on each token alone.
# *SwiGLU* is its form: two matrices multiply the vector, and one result decides, number by number, how much of the
# other passes; a third matrix leads back. The one that decides first goes through silu(x) = x / (1 + exp(-x)).

# %%
show_source(FeedForward.forward, Block.forward)

# %% [markdown]
# Each branch adds to the token's vector, the *residual stream*. The 7B has its norms in front of the branches (`pre`),
# the 34B after them (`post`). The block passes the sum on as two parts, `x` and `branch`, and `add_norm` returns their
# sum and its norm. `drop` is dropout, off here. Before the blocks, each token becomes its vector; after them come a
# norm and a product with the output's vectors: the logits.

# %%
torch.manual_seed(0)
cfg = ModelConfig(vocab_size=60, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=32)
model = Chameleon(cfg).eval().requires_grad_(False)
documents = [list(range(5, 15)), list(range(20, 28))]  # 10 and 8 tokens
batch = pack(documents, 20, pad=1)
tokens, seen = batch.tokens, Documents.of(batch.doc_ids)  # what the mask is made of

logits = model.logits(model(tokens, batch.positions, seen))[0]
first_loss = F.cross_entropy(logits, batch.targets[0], ignore_index=-100)
print(f"first loss {first_loss:.4f}, ln 60 = {math.log(60):.4f}")

# %% [markdown]
# The output's vectors start at 0, so at first every token is equally likely, and the loss is the logarithm of the
# vocabulary's size.
#
# ## Who hears of a change
#
# The layers' matrices are random already. Now give the vectors at the input and at the output random values, too,
# replace one token at a time, and look at which places' logits move.

# %%
torch.nn.init.normal_(model.output.weight, std=0.125)
torch.nn.init.normal_(model.tok_embeddings.weight)


def changes(documents):
    """(20, 20): the largest change of a logit at a column's place when a row's token is replaced."""
    before = model.logits(model(tokens, batch.positions, documents))[0]
    replaced = tokens.repeat(20, 1)
    replaced[range(20), range(20)] = torch.arange(40, 60)  # in sequence i the token at place i
    ids = None if documents is None else Documents.of(batch.doc_ids.repeat(20, 1))
    after = model.logits(model(replaced, batch.positions.repeat(20, 1), ids))
    return (after - before).abs().amax(-1)


apart, mixed = changes(seen), changes(None)
future = torch.ones(20, 20, dtype=torch.bool).tril(-1)
other = batch.doc_ids[0][:, None] != batch.doc_ids[0]
print(f"earlier places move by {apart[future].max():g}, other documents by {apart[other].max():g}")
print(f"without documents: by {mixed[future].max():g}, and by up to {mixed[other].max():.2f}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True)
for axis, moved, title in zip(axes, (apart, mixed), ("with documents", "without documents"), strict=True):
    picture = axis.imshow(moved.clamp(min=0.01), cmap="Greys", norm="log", vmin=0.01, vmax=5)
    for border in (9.5, 17.5):
        axis.axhline(border, color=IMAGE, linestyle="--", linewidth=1)
        axis.axvline(border, color=IMAGE, linestyle="--", linewidth=1)
    axis.set(xlabel="place whose logits are read", xticks=[0, 10, 18], yticks=[0, 10, 18])
    axis.set_title(title, loc="left")
axes[0].set_ylabel("place of the token replaced")
fig.colorbar(picture, ax=axes, label="largest change of a logit", ticks=[0.01, 0.1, 1], format="%g")
show(
    fig,
    "Two maps of 20 by 20 places. With documents, three dark triangles above the diagonal: each document and the "
    "padding hear their own changes. Without, one triangle covers all above the diagonal. Below it both are white.",
)

# %% [markdown]
# Dashed lines are the borders of two documents and the padding. Left, a change darkens a triangle of its own document:
# later places hear it, earlier ones and neighbours never. Right, without documents, it runs on to the end.
#
# An earlier place never hears of a later token, so its keys and values stay as they are. Generation keeps them in a
# *cache* and runs the model on one new token at a time.

# %%
alone = torch.tensor(documents[:1])
whole = model.logits(model(alone))[0]
cache, steps = model.empty_cache(n_slots=1, max_len=10, dtype=torch.float32), []
for t in range(10):
    position = torch.tensor([[t]])
    view = cache.view(slice(0, 1), position, kv_len=t + 1)
    steps.append(model.logits(model(alone[:, t : t + 1], position, cache=view))[0])
cached = torch.cat(steps)
print(f"one token at a time against all at once: {(cached - whole).abs().max():.0e}")

# %% [markdown]
# ## Six assertions

# %%
assert n_parameters() == llama + vectors + norms == 7_013_158_912
assert max(to_library, to_fused) < 1e-5
assert abs(score(5, 2) - score(105, 102)) < 1e-3 < 0.1 < abs(score(5, 2) - score(11, 2))
assert abs(first_loss - math.log(60)) < 1e-5
assert apart[future].max() == apart[other].max() == 0 and mixed[other].max() > 0.1
assert (cached - whole).abs().max() < 1e-4

# %% [markdown]
# ## Exercises
#
# ### Write: the model, from its weights
#
# Eight functions for one packed sequence, each a few lines; T tokens, D the width, H query heads, G key heads, E the
# width of a head. With those of lesson 3 they are the whole model.


# %%
def rms_norm(x, weight, eps):
    """x (T, D): divided by the root of (mean square + eps), times the weight (D,)."""
    return ...


def qk_norm(x, weight, bias, eps):
    """x (T, heads, E): each head with mean 0, divided by the root of (mean square + eps), times weight, plus bias.

    weight and bias (groups, E): the first heads // groups heads are the first group, and so on.
    """
    return ...


check("one_transformer.rms_norm", rms_norm)
check("one_transformer.qk_norm", qk_norm)


# %%
def rotate(x, positions, theta):
    """x (T, heads, E): the pair (x[2i], x[2i + 1]) rotated by position * theta ** (-2i / E)."""
    return ...


def attend(q, k, v, mask):
    """q (T, H, E), k and v (T, G, E), mask (T, T) -> (T, H, E); query head h reads key head h // (H / G)."""
    return ...


check("one_transformer.rotate", rotate)
check("one_transformer.attend", attend)

# %% [markdown]
# From here on, `w` holds weights by name, as `state_dict` does, and `part` picks those of one component. Print
# `list(model.state_dict())` for the names. A weight of `nn.Linear` is (out, in): `F.linear(x, weight)` applies it. In
# `cfg`, `head_dim` is E, `kv_heads` is G, and `norm_eps` is the eps of every norm.


# %%
def part(w, prefix):  # part(w, "attention.")["wq.weight"] is w["attention.wq.weight"]
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}


def attention(x, w, positions, mask, cfg):
    """x (T, D): wq, wk, wv; q_norm and k_norm if cfg.qk_norm; rotate with cfg.rope_theta; attend; wo."""
    return ...


def feed_forward(x, w):
    """x (T, D): w2(silu(w1(x)) * w3(x))."""
    return ...


check("one_transformer.attention", attention)
check("one_transformer.feed_forward", feed_forward)


# %%
def block(x, w, positions, mask, cfg):
    """x (T, D): both branches, with attention_norm and ffn_norm, in the order cfg.norm_order: pre or post."""
    return ...


def forward(tokens, w, positions, mask, cfg):
    """tokens (T,) -> logits (T, V): tok_embeddings, layers.0, layers.1, ..., norm, output."""
    return ...


check("one_transformer.block", block)
check("one_transformer.forward", forward)

# %% [markdown]
# ### Predict: numbers before you run anything
#
# The 34B has 48 layers, heads of width 128 and 4 groups of heads in each QK-norm. How many parameters do its norms of
# queries and keys have? And if positions count through the whole sequence while the mask still keeps documents apart:
# how much does the largest logit change?

# %%
new_parameters = ...
change_by_positions = ...

check("one_transformer.new_parameters", new_parameters)
check("one_transformer.change_by_positions", change_by_positions)

# %% [markdown]
# ### Break: the law of distance
#
# With the norm last, find two pairs of places, equally far apart, whose scores differ by more than 1.5:
# `score(i, j, norm_last=True)` above.

# %%
equal_distances = ...  # ((i, j), (k, l)) with i - j == k - l

check("one_transformer.equal_distances", equal_distances)

# %% [markdown]
# ## Where it is in the library
#
# The model is [transformer.py](../nanochameleon/transformer.py); attention's formula is in
# [reference.py](../kernels/attention/reference.py), its fast versions next to it. `forward` there takes a batch, a
# cache, dropout and compiled kernels, and gives the same logits. The next lesson, [05_learning](05_learning.ipynb),
# makes the weights learn.
