# %% [markdown]
# # What is left of an image in 64 codes?
# Lesson 1 turned text into tokens. Here an image becomes tokens: 64 whole numbers, called codes, from which a network
# draws the image again. This is vector quantization (VQ), and the network is a VQGAN. Its GAN part, a second network
# that judges what is drawn, stays switched off here. Reading takes 25 minutes; the cells run in a minute.
#
# - One number known beforehand
# - The smallest version
# - A gradient for a step function
# - A network around the codes
# - Three trainings
# - Break it: an encoder that sees everything
# - What this lesson states
# - Exercises
# - Where it is in the library

# %% [markdown]
# ## One number known beforehand
# An image of 32 x 32 pixels has three colours of 8 bits a pixel: 24,576 bits. We want 64 codes, each one of 64 values,
# so 6 bits each: 384 bits. That is 1/64 of the image. It can only work because the images that we care about are few
# among all that are possible.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from small import WORLD, show, show_source

from nanochameleon.data.sources.scenes import draw, scenes

shown = list(scenes(WORLD, seed=7, n=64, test=True))
images = np.stack([draw(scene, WORLD) for scene in shown])
print(images.shape, "an image has", images[0].size * 8, "bits, 64 codes have", 64 * 6)
print(*(scene.caption() for scene in shown[:3]), sep="\n")

# %% [markdown]
# ## The smallest version
# Take 200 points in the plane, and a codebook: a list of 4 more points, numbered from 0 to 3. The nearest of them
# replaces each point, so one number stands for two coordinates. Both that number and its point are called a code.

# %%
from nanochameleon.images.quantizer import nearest_code  # the first exercise is to write it

generator = torch.Generator().manual_seed(0)
corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
points = corners.repeat(50, 1) + 0.3 * torch.randn(200, 2, generator=generator)
codebook = torch.tensor([[-0.9, 0.0], [-0.3, 0.1], [0.3, -0.1], [0.9, 0.0]])  # a bad start: between the clouds
codes = nearest_code(points, codebook)
print("codes of the first points:", codes[:8].tolist())

# %% [markdown]
# A codebook improves in two steps that repeat: assign each point to its nearest code, then move each code to the mean
# of its points. This is k-means. The error, the mean squared distance to the code, can only fall.


# %%
def k_means_step(codebook):
    codes = nearest_code(points, codebook)
    return torch.stack([points[codes == k].mean(0) for k in range(len(codebook))])


def error(codebook):
    return (points - codebook[nearest_code(points, codebook)]).square().sum(1).mean().item()


errors, history = [error(codebook)], [codebook]
for _ in range(5):
    history.append(k_means_step(history[-1]))
    errors.append(error(history[-1]))
print("error:", *(f"{e:.3f}" for e in errors))

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharex=True, sharey=True)
for ax, book, title in zip(axes, (history[0], history[-1]), ("at the start", "after 5 rounds"), strict=True):
    codes = nearest_code(points, book)
    for k, marker in enumerate("o^s+"):
        ax.scatter(*points[codes == k].T, s=18, marker=marker, alpha=0.5)
        ax.annotate(str(k), book[k].tolist(), fontsize=14, weight="bold", ha="center", va="center",
                    bbox={"boxstyle": "circle", "facecolor": "white"})  # fmt: skip
    ax.set(title=f"{title}: error {error(book):.2f}", aspect="equal")
show(fig, "Four clouds of points. At the start the four codes are in a line between them; then each is in one cloud.")

# %% [markdown]
# After five rounds each code sits in the middle of one cloud, and the error has fallen from 1.149 to 0.162.

# %% [markdown]
# ## A gradient for a step function
# In a network, the points come from an encoder. Choosing the nearest code has no useful gradient: a small move of the
# point changes nothing, or jumps. The straight-through estimator uses the code's value on the way forward and
# pretends, on the way back, that the code were the point.

# %%
from nanochameleon.images.quantizer import commitment_loss, straight_through

show_source(straight_through, commitment_loss)

vectors = torch.randn(5, 3, generator=generator, requires_grad=True)
quantized, upstream = torch.randn(5, 3, generator=generator), torch.arange(15.0).view(5, 3)
passed = straight_through(vectors, quantized)
(passed * upstream).sum().backward()
print("largest difference of values:", (passed - quantized).abs().max().item())
print("gradient copied exactly:", torch.equal(vectors.grad, upstream))

# %% [markdown]
# The commitment loss pulls each vector towards its code, so that pretending stays nearly true. The codes move towards
# their vectors by a running mean, which is k-means spread over many batches. A code that nobody uses for long is dead;
# it is moved onto a random vector. In the code below `lerp_` takes one step of a running mean.

# %%
from nanochameleon.images.quantizer import Quantizer

show_source(Quantizer.update_averages)

# %% [markdown]
# ## A network around the codes
# The encoder halves the image twice, so each of 8 x 8 = 64 vectors speaks for a window of 4 x 4 pixels. The vectors are
# called latents. Their nearest codes go to the decoder, which doubles twice. Both are convolutions; group normalization
# keeps their numbers at a common scale.

# %%
from dataclasses import replace

from nanochameleon.config import OptimConfig, TokenizerTraining, VQGANConfig
from nanochameleon.images.tokenizer import ImageTokenizer, to_pixels
from nanochameleon.images.vqgan import VQGAN

sizes = VQGANConfig(resolution=32, ch=8, ch_mult=(1, 2, 4), n_res_blocks=1, z_channels=32, embed_dim=32, n_codes=64,
                    n_groups=4, mid_attention=False, window=4)  # fmt: skip
print(f"{sum(p.numel() for p in VQGAN(sizes).parameters()):,} parameters")
drawn, latents, _, codes = VQGAN(sizes)(to_pixels(images[:2]))
print("latents", tuple(latents.shape), "codes", tuple(codes.shape), "drawn", tuple(drawn.shape))

# %% [markdown]
# ## Three trainings
# Training asks for the same image back. For 40 steps there is no codebook, so the encoder learns what matters; then
# k-means on its vectors makes the codebook, and 80 steps follow with it.

# %%
from nanochameleon.images.losses import PerceptualLoss
from nanochameleon.optim import learning_rate, make_optimizer
from nanochameleon.training.train_tokenizers import reconstruction_loss, start_codebook, tokenizer_loss

show_source(tokenizer_loss)
# an optimizer: lesson 5 explains it
muon = OptimConfig("muon", lr=3e-3, eps=1e-8, weight_decay=0.0, warmup_steps=10, schedule="cosine")
settings = TokenizerTraining(steps=120, warmup_steps=40, batch_size=16, optim=muon)
pixels = to_pixels(np.stack([draw(scene, WORLD) for scene in scenes(WORLD, seed=0, n=120 * 16)]))
edges = PerceptualLoss()  # compares edges, not only pixels


# %%
def train_tokenizer(kmeans, window):
    torch.manual_seed(0)
    vqgan, generator = VQGAN(replace(sizes, window=window)), torch.Generator().manual_seed(0)
    vqgan.quantize.embedding.requires_grad_(False)  # running means move it
    optimizer, losses = make_optimizer(vqgan, muon), []
    for step, x in enumerate(pixels.split(16)):
        if kmeans and step == settings.warmup_steps:
            start_codebook(vqgan, pixels[:256], generator)
        loss, latents, codes, _ = tokenizer_loss(
            vqgan, x, step >= settings.warmup_steps, lambda a, b: reconstruction_loss(a, b, edges, settings), settings
        )
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, muon)
        optimizer.step()
        losses.append(loss.item())
        if codes is not None and step < 96:  # then the codebook rests, and the decoder learns it
            vqgan.quantize.update_averages(latents.detach(), codes, 0.95, 0.03, generator)
    return ImageTokenizer(vqgan), sum(losses[-10:]) / 10


# %% [markdown]
# We train three times: as the library does; with a random codebook in place of k-means; and with an encoder that sees
# the whole image instead of one window. The oracle, a program that knows this world, reads each drawn image and says
# whether all facts of its caption are right.

# %%
from nanochameleon.evaluate.oracle import judge

trained = {"k-means": train_tokenizer(True, 4), "random start": train_tokenizer(False, 4),
           "whole image": train_tokenizer(True, None)}  # fmt: skip
used, loss, again = {}, {}, {}
for name, (tokenizer, last_loss) in trained.items():
    codes = tokenizer.encode(images)
    loss[name], used[name], again[name] = last_loss, len(codes.unique()), tokenizer.decode(codes)
    right = np.mean([judge(s, image, WORLD)["all_facts"] for s, image in zip(shown, again[name], strict=True)])
    print(f"{name:12} loss {loss[name]:.3f}, {used[name]:2} of 64 codes used, oracle: {right:.0%} right")

# %%
fig, axes = plt.subplots(4, 7, figsize=(8, 4.7))
rows = {"original": images, **again}
for line, (name, row) in zip(axes, rows.items(), strict=True):
    for ax, image in zip(line[1:], row, strict=False):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color="#8a8a8a")
    line[0].axis("off")
    line[0].text(1.0, 0.5, name, ha="right", va="center", fontsize=11)
show(fig, "Six scenes and three reconstructions of each. K-means and the random start draw things red or blue, with "
     "soft edges; green comes out blue. An encoder of the whole image draws all things dark gray.")  # fmt: skip

# %% [markdown]
# After so few steps all are blurred, and green is still drawn as blue. With k-means, edges are sharp enough for the
# oracle to read more than half of the scenes. The random start leaves most codes unused, so there is less to draw with:
# 80 steps are too few to find and move dead codes. The whole-image encoder uses all 64 codes and has lost every colour.
# The next section shows why. `make demo` trains four times as long.

# %%
code_map = trained["k-means"][0].encode(images[:1]).view(8, 8)
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6))
axes[0].imshow(images[0])
axes[0].set(xticks=np.arange(3.5, 31, 4), yticks=np.arange(3.5, 31, 4), xticklabels=[], yticklabels=[])
axes[1].imshow(torch.ones(8, 8), cmap="gray", vmin=0, vmax=1)
for (y, x), code in np.ndenumerate(code_map.numpy()):
    axes[1].text(x, y, code, ha="center", va="center", fontsize=11)
axes[1].set(xticks=np.arange(0.5, 7), yticks=np.arange(0.5, 7), xticklabels=[], yticklabels=[])
for ax in axes:
    ax.grid(color="#8a8a8a")
    ax.spines[:].set(visible=True, color="#8a8a8a")
    ax.tick_params(length=0)
show(fig, f"The scene '{shown[0].caption()}' in 8 x 8 windows, and their codes: every empty window has the same code.")

# %% [markdown]
# Left are the image's windows, right their codes. Windows that look the same have the same code. The empty ground is
# one number, repeated. A model that has to predict these numbers has an easy task where nothing happens.

# %% [markdown]
# ## Break it: an encoder that sees everything
# Invert one window of 4 x 4 pixels, and count how many of the 64 vectors move. An encoder of single windows must move
# one. The released Chameleon's encoder sees the whole image.


# %%
def moved(window):
    torch.manual_seed(0)
    vqgan = VQGAN(replace(sizes, window=window)).eval()
    before, after = to_pixels(images[:1]), to_pixels(images[:1])
    after[:, :, 8:12, 8:12] *= -1
    with torch.no_grad():
        change = (vqgan.latents(before) - vqgan.latents(after)).abs().amax(1)
    return int((change > 1e-6).sum())


print("latents that move:", moved(4), "with windows,", moved(None), "without")

# %% [markdown]
# Without windows all 64 move: normalization averages over the whole image, so a change anywhere reaches every vector.
# The same empty corner then has many codes, which depend on things far away. A code becomes harder to predict and says
# less. In return it can describe context, which photographs need.

# %% [markdown]
# ## What this lesson states

# %%
assert errors[-1] < errors[0] / 2
assert used["k-means"] >= 2 * used["random start"]
assert loss["k-means"] < min(loss["random start"], loss["whole image"])
assert (moved(4), moved(None)) == (1, 64)
assert torch.equal(vectors.grad, upstream)

# %% [markdown]
# ## Exercises
# ### Write: the nearest code
# `vectors` is (N, E), `codebook` (K, E), both float32. Return the index of the nearest code for each vector, (N,).
# Take care: |v|² - 2 v·c + |c|² loses its digits where all numbers share a large offset.

# %%
from checks import check


def my_nearest_code(vectors, codebook):
    return ...


check("images.nearest_code", my_nearest_code)

# %% [markdown]
# ### Write: cut an image into windows
# `x` is (B, C, H, W). Return its windows of `side` x `side` pixels in raster order, image by image: (B · H/side ·
# W/side, C, side, side).


# %%
def my_windows(x, side):
    return ...


check("images.windows", my_windows)

# %% [markdown]
# ### Predict: a codebook without loss
# This world has 2 shapes, 3 colours and 2 sizes, on one background. A thing fills a cell of 16 x 16 pixels, cut into
# four patches of 8 x 8. How many different patches are there? Lessons 3 to 7 use exactly these as codes.

# %%
check("images.patches", ...)

# %% [markdown]
# ### Break: a code depends on its own pixels
# Change an image (uint8, 32 x 32 x 3) outside its upper left quarter, so that the first latent of an encoder without
# windows moves by at least a tenth of its length.


# %%
def my_far_change(image):
    return ...


check("images.far_change", my_far_change)

# %% [markdown]
# ## Where it is in the library
# [images/quantizer.py](../nanochameleon/images/quantizer.py) has the codes,
# [images/vqgan.py](../nanochameleon/images/vqgan.py) the network,
# [images/tokenizer.py](../nanochameleon/images/tokenizer.py) the way from files to codes, and
# [training/train_tokenizers.py](../nanochameleon/training/train_tokenizers.py) the training. Next: [lesson
# 3](03_one_stream.ipynb) puts words and codes into one stream.
