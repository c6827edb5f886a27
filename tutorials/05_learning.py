# %% [markdown]
# # How low can the loss get?
#
# No lower than what the data leave open. In a small world that limit is known beforehand: 0.545 nats a text token,
# 0.068 an image token. This lesson trains down to it, in about 30 minutes.
#
# - What a guess costs
# - The floor
# - The loop
# - Sums, not means
# - Rate and clipping
# - Muon
# - Two hundred steps
# - Below the floor
# - Five assertions
# - Exercises
# - In the library

# %% [markdown]
# ## What a guess costs
#
# A model gives each possible next token a probability. Its *loss* for the token that comes is minus the natural
# logarithm of that token's probability. The unit is the *nat*. Our output layer starts at zero, so at first all V
# tokens of the vocabulary are equally likely, and each costs ln V.

# %%
import itertools
import math
from collections import Counter
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from checks import check
from small import IMAGE, MUON, TEXT, WORLD, show, show_source, small_config, start, train_loop

from nanochameleon.data.sources.scenes import RELATIONS, SIZES, Scene, Thing, scenes
from nanochameleon.evaluate.oracle import judge
from nanochameleon.evaluate.shapes import SCENE_SEED, draw_images
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.losses import next_token_loss
from nanochameleon.optim import clip_gradients, learning_rate, orthogonalize
from nanochameleon.packing import IGNORE, ignore_targets
from nanochameleon.training.objective import Objective
from nanochameleon.transformer import Chameleon

# %%
untrained, loader = start(small_config(steps=200), {"drawings": 1.0})
vocab, model = untrained.vocab, untrained.model
first_batch = loader.batch(0)  # 4 sequences of 256 tokens: captions, each followed by its image
sums = Objective(model, vocab, "fp32")(first_batch, None).next_token  # added up over all targets; None: no dropout
first_loss = float(sums.cross_entropy / sums.count)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, V = {vocab.size}")
print(f"loss {first_loss:.4f}, ln V {math.log(vocab.size):.4f}")

# %% [markdown]
# ## The floor
#
# The world is that of lesson 3. A scene shows one object, two of a kind, or a pair with a relation; there are 2 sizes,
# 3 colours, 2 shapes and 4 cells. We can list every scene with its probability.


# %%
things = [Thing(size, colour, shape) for size in SIZES for colour in WORLD.colours for shape in WORLD.shapes]
cells = [(0, 0), (0, 1), (1, 0), (1, 1)]


def every_scene():
    """Each scene with its probability, as the library's random_scene draws it."""
    for a in things:
        for cell in cells:  # a quarter of the scenes: one object, in one of 4 cells
            yield 1 / 4 / 12 / 4, Scene("white", (a,), (cell,))
        for two in itertools.combinations(cells, 2):  # a quarter: two of a kind, in 2 of 4 cells
            yield 1 / 4 / 12 / 6, Scene("white", (a, a), two)
        for b, (p, q) in itertools.product(things, itertools.permutations(cells, 2)):  # half: a pair
            for relation, offset in RELATIONS.items():  # 4 relations, each in 2 rows or columns
                if a != b and (p[0] - q[0], p[1] - q[1]) == offset:
                    yield 1 / 2 / 12 / 11 / 4 / 2, Scene("white", (a, b), (p, q), relation)


listed = list(every_scene())
print(f"{len(listed):,} scenes, probabilities add up to {sum(p for p, _ in listed):.6f}")
assert {scene for _, scene in listed} >= set(scenes(WORLD, 0, 500))  # drawn at random, each is in the list

# %% [markdown]
# The *entropy* of a random thing is the mean of -ln p over its outcomes. No model can pay less on average (Gibbs'
# inequality). Scenes of the test split are never trained on, so they are left out. One caption in three does not
# mention the background. Three tokens count as text and cost nothing: the begin and the end of the image, and `</s>` at
# the end of the document.

# %%
total = sum(p for p, scene in listed if not scene.for_test)
p_caption, p_both, n_text = Counter(), Counter(), 0.0
for p, scene in listed:
    for with_background, part in ((True, 2 / 3), (False, 1 / 3)):
        if not scene.for_test:
            words = scene.caption(with_background)
            p_caption[words] += p / total * part
            p_both[words, scene.cells] += p / total * part  # words and cells decide the image
            n_text += p / total * part * (len(untrained.tokenizer.encode(words)) + 3)


def entropy(p):
    return -sum(x * math.log(x) for x in p.values())


of_caption, of_image = entropy(p_caption), entropy(p_both) - entropy(p_caption)
floor = {"text": of_caption / n_text, "image": of_image / 16}
print(f"a caption {of_caption:.3f} nats, then its image {of_image:.3f}")
print(f"floor: {floor['text']:.3f} a text token, {floor['image']:.3f} an image token")

# %% [markdown]
# Given its caption, an image leaves only one thing open: which cells. So 16 image tokens together cost about one nat. A
# model that ignores the caption cannot get near that.
#
# ## The loop
#
# Here is all of training, in torch alone. *AdamW* moves each number of the model against its gradient, scaled by that
# gradient's usual size.

# %%
torch.manual_seed(0)
model = Chameleon(untrained.cfg.model)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(30):
    batch = loader.batch(step)
    documents = Documents.of(batch.doc_ids)  # attention stays within a document
    logits = model.logits(model(batch.tokens, batch.positions, documents))  # (4, 256, V)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())  # ignores -100: padding
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 in (0, 9):
        print(f"step {step}: {loss:.2f} nats")

# %% [markdown]
# The lessons use the following loop, and `train.py` has the same steps with checkpoints, logs and many machines. Four
# lines are new: `mask_targets` drops images that no words precede, the loss is a sum divided by the number of targets,
# gradients are clipped, and the rate changes with the step. `t.z_loss` is for lesson 6.

# %%
show_source(train_loop)

# %% [markdown]
# ## Sums, not means
#
# A batch that is too large for memory is cut into *micro-batches*, whose gradients add up. The tempting way takes the
# mean loss of each and averages the means. We try both ways on the model of the loop. Let micro-batch 1 have three
# sequences. Let micro-batch 2 have one sequence, in which images are not learnt.

# %%
parts = [first_batch[:3], ignore_targets(first_batch[3:], range(vocab.first_code, vocab.eoi))]
counts = [int((part.targets != IGNORE).sum()) for part in parts]
whole = replace(first_batch, targets=torch.cat([part.targets for part in parts]))
objective = Objective(model, vocab, "fp32")
with torch.no_grad():
    of_whole = float(objective(whole, None, normalizer=sum(counts)).next_token.loss)
    of_sums = sum(float(objective(part, None, normalizer=sum(counts)).next_token.loss) for part in parts)
    means = [float(objective(p, None, normalizer=n).next_token.loss) for p, n in zip(parts, counts, strict=True)]
print(f"targets {counts}, mean losses {means[0]:.3f} and {means[1]:.3f}")
print(f"whole batch {of_whole:.6f}, sums {of_sums:.6f}, mean of means {np.mean(means):.6f}")

# %% [markdown]
# The mean of means is another number: a target counts more if its micro-batch has few of them. Sums are exact. So the
# library's loss is a sum over tokens, and the caller says what to divide by.

# %%
show_source(next_token_loss)

# %% [markdown]
# ## Rate and clipping
#
# The *learning rate* says how far an update goes. It rises for some steps, the warm-up, since the first gradients
# mislead. Then it falls along a cosine, so that the last steps settle. *Clipping* scales a gradient down to length 1
# if it is longer, so that one odd batch cannot throw the model off. Below are the rates of some steps with Muon; the
# first exercise is to write them.

# %%
show_source(clip_gradients)
print({step: round(learning_rate(step, 200, MUON), 5) for step in (0, 7, 15, 100, 199)})

# %% [markdown]
# ## Muon
#
# A gradient matrix is a sum of directions, and its *singular values* say how strong each is. A few are strong, and
# AdamW mostly follows those. *Muon* makes all equally strong: `orthogonalize` brings the singular values close to 1
# with fifteen matmuls.

# %%
show_source(orthogonalize)
torch.manual_seed(0)
gradient = torch.randn(96, 8) @ torch.randn(8, 256) + 0.3 * torch.randn(96, 256)  # 8 strong directions
before = torch.linalg.svdvals(gradient)
after = torch.linalg.svdvals(orthogonalize(gradient[None])[0])
print(f"singular values: {before.min():.1f} to {before.max():.1f}, then {after.min():.2f} to {after.max():.2f}")
assert after.min() > 0.6 and after.max() < 1.3 and before.max() > 20 * before.min()

# %% [markdown]
# ## Two hundred steps
#
# Now both, from the same weights, on the same batches. On the way each draws a scene that it is never trained on, from
# its caption. `watch` is called after each step.

# %%
unseen = list(scenes(WORLD, SCENE_SEED, 96, test=True))
wanted = next(scene for scene in unseen if scene.relation)


# %%
def learn(optim, loader, steps=200):
    """Train from scratch. Returns the run, losses (steps, 2) of text and image, and drawings by step."""
    torch.manual_seed(0)
    cfg = replace(untrained.cfg, optim=optim, train=replace(untrained.cfg.train, steps=steps))
    run = replace(untrained, cfg=cfg, model=Chameleon(cfg.model).eval())
    losses, drawings = [], {0: draw_images(run, [wanted.caption()], seed=0)[0]}

    def watch(step, sums):
        s = sums.next_token
        text, n_text = s.cross_entropy - s.image_cross_entropy, s.count - s.image_count
        losses.append((float(text / n_text), float(s.image_cross_entropy / s.image_count)))
        if step + 1 in (50, 100, 200):
            drawings[step + 1] = draw_images(run, [wanted.caption()], seed=0)[0]

    return train_loop(run, loader, watch), np.array(losses), drawings


by_muon, muon, drawings = learn(MUON, loader)
by_adamw, adamw, _ = learn(replace(MUON, name="adamw", lr=5e-3), loader)

# %%
end = {name: dict(zip(floor, losses[-10:].mean(0), strict=True)) for name, losses in (("Muon", muon), ("AdamW", adamw))}
for name, run in (("Muon", by_muon), ("AdamW", by_adamw)):
    images = draw_images(run, [scene.caption() for scene in unseen], seed=0)
    end[name]["right"] = np.mean([judge(s, x, WORLD)["all_facts"] for s, x in zip(unseen, images, strict=True)])
    text, image, right = end[name].values()
    print(f"{name}: text {text:.3f}, image {image:.3f} nats a token; {right:.0%} of 96 new scenes drawn right")

# %% [markdown]
# Text is close to its floor with both. With AdamW, images are far above theirs, even at the best of four rates between
# 3e-3 and 2e-2. That says something about two hundred steps, not about AdamW: the paper
# trained with it, for weeks. The library uses Muon where there are minutes.
#
# ## Below the floor
#
# A floor also finds bugs. Let us forget the shift: each token is its own target, so the model only has to repeat it.


# %%
class Unshifted:
    """The same batches, with the bug."""

    def batch(self, step):
        batch = loader.batch(step)
        return replace(batch, targets=batch.tokens.masked_fill(batch.doc_ids < 0, IGNORE))


_, bug, _ = learn(MUON, Unshifted(), steps=30)
print(f"with the bug, after 30 steps: text {bug[-1, 0]:.4f}, image {bug[-1, 1]:.4f} nats a token")

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for panel, (what, level), colour, column in zip(panels, floor.items(), (TEXT, IMAGE), (0, 1), strict=True):
    for losses, style, name in ((muon, "-", "Muon"), (adamw, "--", "AdamW"), (bug, ":", "bug")):
        panel.plot(losses[:, column], color=colour, linestyle=style, label=name)
    panel.axhline(level, color="black", linewidth=0.8)
    panel.text(200, 0.85 * level, f"floor {level:.3f}", va="top", ha="right")
    panel.set(title=f"{what} tokens", xlabel="step", yscale="log", ylim=(1e-3, 9), xlim=(0, 200))
    panel.legend()
panels[0].set_ylabel("nats a token")
show(
    figure,
    "Two panels, loss by step on a log scale. Text: Muon and AdamW both come down to the floor. Image: Muon comes "
    "close to the floor, AdamW stays well above it. With the bug both losses fall far through the floor.",
)

# %% [markdown]
# Text comes down to its floor with both optimizers, images come close only with Muon. The dotted line looks like the
# best training of all. It falls through the floor, which nothing honest can.
#
# The next figure shows what Muon's model draws on the way. The *oracle* reads an image back into a scene (lesson 7).

# %%
figure, panels = plt.subplots(1, 4, figsize=(9, 3.3))
for panel, (step, image) in zip(panels, drawings.items(), strict=True):
    facts = judge(wanted, image, WORLD)
    wrong = [name for name, holds in facts.items() if not holds and name != "all_facts"]
    panel.imshow(image)
    panel.set(title=f"after {step} steps", xticks=[], yticks=[])
    verdict = f"wrong: {', '.join(wrong)}" if len(wrong) < 3 else f"{len(wrong)} facts wrong"
    panel.set_xlabel("right" if facts["all_facts"] else verdict)
figure.suptitle(wanted.caption(), fontsize=11)
show(
    figure,
    f"One caption drawn after 0, 50, 100 and 200 steps: {wanted.caption()}. First random patches, then two whole "
    "objects that are not yet the right ones or not in the right places, at the end the scene of the caption.",
)

# %% [markdown]
# Random patches come first, then whole objects, at last the scene of the caption. A fact such as "colours" compares
# lists: it is right if the image has the caption's colours, on whichever object. No image that the model learnt from
# shows this scene: the model combines what it knows.
#
# ## Five assertions

# %%
assert abs(first_loss - math.log(vocab.size)) < 1e-3  # a guess costs ln V
assert abs(of_sums - of_whole) < 1e-5 < 0.005 < abs(np.mean(means) - of_whole)  # sums are exact, means are not
assert all(0.9 < run["text"] / floor["text"] < 1.1 for run in end.values())
assert 0.9 < end["Muon"]["image"] / floor["image"] < 1.6 < 2 < end["AdamW"]["image"] / floor["image"]
assert end["AdamW"]["right"] < 0.6 < 0.8 < end["Muon"]["right"] and bug[-1, 1] < 0.5 * floor["image"]  # too good

# %% [markdown]
# ## Exercises
#
# ### Write: warm-up and cosine
#
# Return the rate of `step`, which is in 0 .. `total` - 1. It rises linearly: step 0 already moves, and step `warmup`
# has the peak. Then it falls along half a cosine to `last` times the peak in the very last step. A run shorter than its
# warm-up never gets there.


# %%
def warmup_cosine(step, total, peak, warmup, last):
    return ...


check("learning.warmup_cosine", warmup_cosine)

# %% [markdown]
# ### Predict: a second background
#
# Let the world have white and black backgrounds, equally likely, and no test split. Captions still name the background
# two times in three. By how many nats does the floor of a whole image rise?

# %%
check("learning.second_background", ...)

# %% [markdown]
# ### Break: singular values near 1
#
# Give a matrix, at most 64 x 64, that is not all zeros and whose largest singular value `orthogonalize` brings near 1,
# but not its smallest. What does Muon do with such a gradient?

# %%
check("learning.stays_small", ...)

# %% [markdown]
# ## In the library
#
# The loop is `train_loop` in [train.py](../train.py). The loss is [losses.py](../nanochameleon/losses.py), optimizers
# and rates are [optim.py](../nanochameleon/optim.py), and what is learnt of an image is
# [image_targets.py](../nanochameleon/training/image_targets.py).
#
# Next: [lesson 6](06_staying_stable.ipynb), on what keeps a large model from falling apart.
