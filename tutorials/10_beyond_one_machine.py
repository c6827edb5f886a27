# %% [markdown]
# # Beyond one machine, and is it any good?
#
# You train one model on two processes, count the hours of the 7B and the 34B, and read the paper's results with care.
# It takes 30 minutes.
#
# - Two processes, one gradient
# - The mean of means
# - Half a model each
# - The hours of a large model
# - Captions and answers
# - Votes
# - Rare events
# - What you have seen
# - Exercises
# - Where it is in the library

# %% [markdown]
# The paper's 7B took 856,481 hours of A100 GPUs, 98 years on one of them. So many GPUs must train **one** model. How
# do they agree on its weights? And why that number of hours?
#
# ## Two processes, one gradient
#
# A *rank* is one of several processes that run the same program, one for each GPU. Here are two on a CPU. They need
# one operation, *all-reduce*: every rank gives a tensor, and every rank gets the sum.

# %%
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import on_ranks
from small import WORLD, PatchTokenizer, plt, show, show_source
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from checks import check


def give_and_get(rank, n, data):
    x = torch.tensor([10.0 * (rank + 1)])
    dist.all_reduce(x)
    return x.item()


print("ranks give 10 and 20; they get", on_ranks(2, give_and_get))

# %% [markdown]
# `on_ranks` (in `processes.py`) sends the source of your function to two processes. They meet in a file of a temporary
# folder and talk by *gloo*, PyTorch's collectives for CPUs. On many machines, `torchrun` does the same over a network.
#
# The data: each batch has four captions with images and four captions alone. A *target* is a token that the model must
# predict. The first four sequences have more of them. That will matter.

# %%
from nanochameleon.data import fuse
from nanochameleon.data.sources.shapes import ShapesSource
from nanochameleon.documents import render
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab

STEPS, LENGTH, images = 30, 40, PatchTokenizer()
vocab = Vocab.toy(len(images.codebook), 120)
words = TextTokenizer.train(ShapesSource(WORLD, "text", 0).captions(1_000), vocab, progress=False)


def token_rows(source):
    documents = fuse([source.document(i) for i in range(4 * STEPS)], images)
    rows = [torch.tensor(render(each, words, vocab)) for each in documents]
    return torch.stack([F.pad(row, (0, LENGTH - len(row)), value=-100) for row in rows]).view(STEPS, 4, LENGTH)


batches = torch.cat([token_rows(ShapesSource(WORLD, form, 0)) for form in ("drawings", "text")], 1)
print("targets in step 0, by sequence:", (batches[0, :, 1:] >= 0).sum(1).tolist())  # -100 is padding

# %%
from nanochameleon.config import ModelConfig, ParallelConfig
from nanochameleon.packing import Batch
from nanochameleon.parallel.apply import apply_fsdp, parallelize, wrap
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.training.objective import Objective
from nanochameleon.transformer import Chameleon


def start(n_vocab):
    torch.manual_seed(0)  # the same weights on every rank
    return Chameleon(ModelConfig(n_vocab, dim=64, n_layers=2, n_heads=2, multiple_of=32, rope_theta=100.0))


def loss_sum(model, rows):
    """The sum of the loss over the targets, and their number."""
    tokens, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]
    logits = model.logits(model(tokens)).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum"), (targets >= 0).sum()


# %%
def train_alone():
    model, losses = start(vocab.size), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for rows in batches:
        total, count = loss_sum(model, rows)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append((total / count).item())
    return losses


def distance(losses):
    return np.abs(np.subtract(losses, alone))


alone = train_alone()
data = {"batches": batches, "n_vocab": vocab.size, "n_codes": len(images.codebook), "broken": False}
print(f"loss {alone[0]:.2f} at first, ln {vocab.size} = {np.log(vocab.size):.2f}; {alone[-1]:.2f} at the end")

# %% [markdown]
# That was one process. *Distributed data parallel* (DDP): every rank holds the whole model and half of the batch. A
# gradient is a sum over targets, so the gradient of the batch is the sum of the ranks' gradients. After one all-reduce
# of the gradients, all ranks take the same step.


# %%
def ddp(rank, n, data):
    model, losses = start(data["n_vocab"]), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for rows in data["batches"]:
        total, count = loss_sum(model, rows.chunk(n)[rank])  # this rank's part
        both = torch.stack([total.detach(), count])
        dist.all_reduce(both)  # loss and targets of the whole batch
        normalizer = n * count if data["broken"] else both[1]
        optimizer.zero_grad()
        (total / normalizer).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        losses.append((both[0] / both[1]).item())
    return losses


two = on_ranks(2, ddp, start, loss_sum, data=data)
print(f"the ranks agree: {two[0] == two[1]}; at most {distance(two[0]).max():.0e} from one process")

# %% [markdown]
# ## The mean of means
#
# It is tempting to let each rank take the mean over **its own** targets and to average the ranks: the line with
# `broken`. Nothing crashes. But here rank 0 has nearly three times the targets of rank 1, so each of its targets now
# counts that much less.

# %%
per_rank = (batches[:, :, 1:] >= 0).view(STEPS, 2, -1).sum(2).float().mean(0)
broken = on_ranks(2, ddp, start, loss_sum, data=data | {"broken": True})[0]
print(f"targets a step: rank 0 has {per_rank[0]:.0f}, rank 1 has {per_rank[1]:.0f}")
print(f"at most {distance(broken).max():.3f} from one process")

# %% [markdown]
# ## Half a model each
#
# AdamW keeps 16 bytes for each weight: weight, gradient and two moments. For large models that is too much for one
# GPU. *Fully sharded data parallel* (FSDP) lets each rank keep a *shard*, 1/n of all numbers. *All-gather* puts the
# weights together for a step. *Reduce-scatter* sums the gradients and gives each rank its own shard of the sum. AdamW
# works number by number, so a shard is enough for it.


# %%
def fsdp(rank, n, data):
    model, losses = start(data["n_vocab"]), []
    flat = parameters_to_vector(model.parameters()).detach()  # of a length that n divides
    shard = nn.Parameter(flat.chunk(n)[rank].clone())  # what this rank keeps
    optimizer = torch.optim.AdamW([shard], lr=5e-3)
    for rows in data["batches"]:
        dist.all_gather_into_tensor(flat, shard.detach())
        vector_to_parameters(flat, model.parameters())
        total, count = loss_sum(model, rows.chunk(n)[rank])
        both = torch.stack([total.detach(), count])
        dist.all_reduce(both)
        model.zero_grad()
        (total / both[1]).backward()
        shard.grad = torch.empty_like(shard)
        dist.reduce_scatter_tensor(shard.grad, parameters_to_vector(p.grad for p in model.parameters()))
        optimizer.step()
        losses.append((both[0] / both[1]).item())
    return {"losses": losses, "kept": len(shard), "of": len(flat)}


# %%
sharded = on_ranks(2, fsdp, start, loss_sum, data=data)[0]
print(f"each rank keeps {sharded['kept']:,} of {sharded['of']:,} weights")
print(f"at most {distance(sharded['losses']).max():.0e} from one process")
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.plot(alone, "-", label="one process")
for name, losses, style in (("mean of means", broken, "s-"), ("DDP", two[0], "o:"), ("FSDP", sharded["losses"], "x:")):
    (line,) = left.plot(losses, style[0], markersize=5, fillstyle="none", label=name)
    right.semilogy(np.maximum(distance(losses), 1e-8), style, markersize=4, color=line.get_color())
left.set(xlabel="step", ylabel="loss (nats a token)", title="Four runs")
right.set(xlabel="step", ylabel="difference in loss", title="Distance from one process")
right.annotate("mean of means", (17, 8e-4))
right.annotate("DDP and FSDP", (17, 3e-6))
left.legend()
show(fig, "Left: the losses of one process, DDP, FSDP and the mean of means look like one falling curve. Right, log "
     "axis: DDP and FSDP are within a millionth of one process, the mean of means is at a few hundredths.")  # fmt: skip

# %% [markdown]
# On the left, four runs look like one. That is why this bug survives in real code. On the right, DDP and FSDP differ
# from one process by rounding (1e-8 means no difference). The mean of means differs by thousands of times more:
# it minimises another loss.
#
# The library, too, divides by the whole batch's count. torch's DDP and FSDP2 do the rest. FSDP2 gathers one block at a
# time, so no rank ever holds the whole model:


# %%
def library(rank, n, data):
    grid = dist.init_device_mesh("cpu", (n, 1), mesh_dim_names=("dp", "tp"))
    mesh, how = Mesh(torch.device("cpu"), rank, n, device_mesh=grid), ParallelConfig("fsdp", compile="off")
    objective, losses = Objective(start(data["n_vocab"]), Vocab.toy(data["n_codes"], 120), "fp32"), []
    parallelize(objective, mesh, how)  # cuts every weight into shards
    model, optimizer = wrap(objective, mesh, how), torch.optim.AdamW(objective.parameters(), lr=5e-3)
    for rows in data["batches"]:
        part, count = rows.chunk(n)[rank], (rows[:, 1:] >= 0).sum()
        tokens, targets, zeros = part[:, :-1].clamp(min=0), part[:, 1:], torch.zeros_like(part[:, 1:])
        batch = Batch(tokens, targets, doc_ids=zeros, positions=zeros + torch.arange(zeros.shape[1]))
        optimizer.zero_grad()
        sums = model.wrapped(batch, None, normalizer=count / n).next_token  # FSDP2 averages over ranks
        sums.loss.backward()
        optimizer.step()
        losses.append(mesh.all_reduce_sum(float(sums.cross_entropy))[0] / count.item())
    return losses


# %%
library_losses = on_ranks(2, library, start, data=data)[0]
print(f"the library's FSDP: at most {distance(library_losses).max():.0e} from one process")
show_source(apply_fsdp)

# %% [markdown]
# ## The hours of a large model
#
# Two questions of arithmetic. Memory: what does a GPU need for a whole 7B, and what if 64 GPUs share it? Time: a token
# costs about 6 *FLOPs* (additions and multiplications) for each weight, 2 forward and 4 backward. Attention comes on
# top:

# %%
from nanochameleon.bench.scaling import PAPER_HOURS, TOKENS, Cluster, memory_bytes
from nanochameleon.presets import chameleon_7b, chameleon_34b
from nanochameleon.training.flops import PEAK_FLOPS, flops_per_token

show_source(flops_per_token)
used = {}  # share of the peak
for name, model, n_gpus in (("7B", chameleon_7b().model, 1_024), ("34B", chameleon_34b().model, 3_072)):
    needs = [memory_bytes(model, Cluster(n))["total"] / 2**30 for n in (1, 64)]
    flops = flops_per_token(model, 4_096)
    at_peak, paper = TOKENS * flops / PEAK_FLOPS["A100"] / 3_600, PAPER_HOURS[name]
    used[name] = at_peak / paper
    print(f"{name}: {needs[0]:.0f} GiB on one GPU, {needs[1]:.0f} GiB on each of 64")
    print(f"  {TOKENS:.1e} tokens x {flops / 1e9:.1f} GFLOPs / 312 TFLOP/s = {at_peak:,.0f} hours at the peak")
    print(f"  the paper: {paper:,} hours, {paper / n_gpus / 24:.0f} days on {n_gpus:,}; {used[name]:.1%} of the peak")

# %% [markdown]
# An A100 has 80 GB: DDP cannot train the 7B on it, FSDP can. Tokens times FLOPs over the peak are the hours of a
# perfect GPU. The paper needed 2.4 times as many: 42% of the peak for the 7B and 41% for the 34B.
#
# ## Captions and answers
#
# Is the model any good? *CIDEr-D* compares groups of one to four words with what people wrote about an image. Rare
# groups count more, and a perfect copy gets 10.

# %%
from dataclasses import replace
from nanochameleon.data.sources.scenes import OPPOSITE, draw_scene
from nanochameleon.evaluate.captions import score_caption
from nanochameleon.evaluate.cider import cider_d, similarity


def recoloured(scene):
    first, second = scene.things
    colour = WORLD.colours[(WORLD.colours.index(first.colour) + 1) % len(WORLD.colours)]
    return replace(scene, things=(replace(first, colour=colour), second))


def turned(scene):  # the same from the other side
    return replace(scene, things=scene.things[::-1], relation=OPPOSITE[scene.relation])


show_source(similarity)
scenes = [scene for scene in (draw_scene(WORLD, 0, i) for i in range(400)) if scene.relation][:60]
truth, wrong, other = ([f(scene).caption() for scene in scenes] for f in (lambda x: x, recoloured, turned))
print(f"{truth[0]}\n{wrong[0]}\n{other[0]}")

# %% [markdown]
# The first caption is the only reference. The second has one colour wrong. The third is **true**: it says the same
# from the other side. Which one does CIDEr-D prefer?

# %%
said = {"the reference": truth, "a wrong colour": wrong, "true, other words": other}
cider = {name: cider_d(texts, [[text] for text in truth])[0] for name, texts in said.items()}
facts = {
    name: 10 * np.mean([score_caption(text, scene, WORLD) for text, scene in zip(texts, scenes, strict=True)])
    for name, texts in said.items()
}
fig, axes = plt.subplots(figsize=(8, 2.6))
for shift, scores, label, hatch in ((-0.2, cider, "CIDEr-D", ""), (0.2, facts, "facts right, of 10", "//")):
    bars = axes.barh(np.arange(3) + shift, list(scores.values()), 0.36, label=label, hatch=hatch, alpha=0.6)
    axes.bar_label(bars, fmt="%.1f", padding=4)
axes.set(yticks=range(3), yticklabels=list(said), xlim=(0, 15))
axes.invert_yaxis()
axes.legend(loc="lower right")
show(fig, "Bars. The reference has 10 in CIDEr-D and in facts. A wrong colour has 6.6 in CIDEr-D and 6.7 in facts. The "
     "true caption in other words has 3.8 in CIDEr-D and 10 in facts.")  # fmt: skip

# %% [markdown]
# CIDEr-D prefers the wrong colour (6.6) to the truth in other words (3.8), which has every fact right. It measures
# whether a caption **sounds** like the references. Five references by different people help; it still knows no truth.
#
# For questions, ten people answer. *VQA accuracy* leaves out each of them in turn. It gives 1/3 for each of the others
# who says what the model says, at most 1, and takes the mean:

# %%
from nanochameleon.evaluate.vqa import accuracy

for n in range(6):
    print(f"{n} of 10 people agree: {accuracy('red', ['red'] * n + ['blue'] * (10 - n)):.1f}")
print("'Yes.' where ten say 'yes':", accuracy("Yes.", ["yes"] * 10))
print("'Yes.' where nine do:      ", accuracy("Yes.", ["yes"] * 9 + ["no"]))

# %% [markdown]
# Three people give 0.9: in the three turns without one of them, two remain, which is 2/3. The last two lines are
# an oddity of the official rule: it strips capitals and full stops only where people differ.
#
# ## Votes
#
# For 1,048 prompts, three people compared Chameleon's answer with another model's. The majority decides, and without
# one the pair is a tie. A tie is half a win. Gemini+ and GPT-4V+ are given images by another model, DALL-E 3.

# %%
from nanochameleon.evaluate.agreement import krippendorff_alpha, win_rate, win_rate_interval

# wins, ties, losses
VOTES = {"Gemini+": (435, 362, 251), "GPT-4V+": (375, 331, 342), "Gemini": (561, 327, 160), "GPT-4V": (482, 329, 237)}
rates = {name: (win_rate(*votes)[0], *win_rate_interval(*votes)) for name, votes in VOTES.items()}
for name, (rate, low, high) in rates.items():
    print(f"against {name:8} {rate:.1%}, 95% interval {low:.1%} to {high:.1%}")
MIXED, TEXT = 441 / 1_048, 607 / 1_048  # of the prompts ask for images, and do not
print(f"Gemini+: 60.4% of the mixed prompts and 57.6% of the rest are {60.4 * MIXED + 57.6 * TEXT:.1f}% of all")
print(f"Table 10, tasks fulfilled: 55.3% and 57.7% are {55.3 * MIXED + 57.7 * TEXT:.1f}% of all")

# %% [markdown]
# The paper contradicts itself twice. Its abstract gives 60.4% against Gemini+ for all prompts; its own counts give
# 58.8%, and 60.4% is the rate on mixed prompts alone. By Table 10, 56.7% of the tasks are fulfilled; the text says
# 55.2%.
#
# Do the three people agree at all? *Krippendorff's alpha* is 1 for perfect agreement, and 0 for as much as chance
# gives.

# %%
rng = np.random.default_rng(0)
lazy = np.where(rng.random((3, 1_000)) < 0.02, "unsafe", "safe").tolist()  # three people who do not look
same = np.mean([len(set(votes)) == 1 for votes in zip(*lazy, strict=True)])
alpha = krippendorff_alpha(lazy)
print(f"all three say the same of {same:.0%} of the answers; alpha is {alpha:.2f}")

# %% [markdown]
# Three people who press "safe" without looking agree nearly always, and alpha sees through it. The paper reports 0.34
# for fulfilled tasks, so people agree only somewhat on what a good answer is.
#
# ## Rare events
#
# Of 20,000 answers, 78 were unsafe with the 7B and 19 with the 34B. Of 445 attacks on the 34B, 7 succeeded. The 95%
# *Clopper-Pearson interval* holds every rate for which so many, or so few, have a chance of 2.5% or more.

# %%
from nanochameleon.evaluate.intervals import clopper_pearson

RARE = {"7B": (78, 20_000), "34B": (19, 20_000), "34B, attacked": (7, 445), "if none of 445": (0, 445)}
rare = {name: (k / n, *clopper_pearson(k, n)) for name, (k, n) in RARE.items()}
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8))
for ax, shares in zip(axes, (rates, rare), strict=True):
    for y, (share, low, high) in enumerate(shares.values()):
        ax.plot([100 * max(low, 2e-4), 100 * high], [y, y], "C0-")  # a log axis has no 0
        ax.plot(100 * max(share, 2e-4), y, "C0o")
    ax.set(yticks=range(4), yticklabels=list(shares), ylim=(3.5, -0.5))
axes[0].plot(60.4, 0, "kx", markersize=9, markeredgewidth=2)
axes[0].annotate("abstract: 60.4", (61.4, 0.35))
axes[0].axvline(50, linestyle=":", color="black")
axes[0].set(title="Chameleon against ...", xlabel="% of wins")
axes[1].set(title="Unsafe answers", xscale="log", xlabel="% (log; the left edge is 0)")
axes[1].set(xticks=[0.1, 1], xticklabels=["0.1", "1"])
show(fig, "Left: win rates with intervals. Only the one against GPT-4V+ crosses 50%; the abstract's 60.4 is right of "
     "the 58.8 against Gemini+. Right: unsafe shares. The intervals of the 7B and the 34B are apart, and that of "
     "none in 445 starts at 0.")  # fmt: skip
print(*(f"{name}: {a:.3%}, interval {b:.3%} to {c:.3%}" for name, (a, b, c) in rare.items()), sep="\n")

# %% [markdown]
# Left: three intervals are clear of 50%. The one against GPT-4V+ is not, so that lead may be luck. Right: the 7B's and
# the 34B's intervals are apart, so the 34B is safer on these prompts. Even no success in 445 attacks would allow a
# rate of 0.8%.
#
# ## What you have seen

# %%
assert max(distance(losses).max() for losses in (two[0], sharded["losses"], library_losses)) < 1e-4
assert distance(broken).max() > 0.02
assert all(0.35 < share < 0.5 for share in used.values())
assert cider["a wrong colour"] > 1.3 * cider["true, other words"]
assert same > 0.85 and abs(alpha) < 0.2
assert rates["GPT-4V+"][1] < 0.5 < rates["Gemini+"][1] and rare["34B"][2] < rare["7B"][1]

# %% [markdown]
# ## Exercises
#
# ### Write: reduce-scatter
#
# `parts[r]` is the list that rank r gives. Return what each rank holds afterwards: rank 0 the first shard of the sum,
# and so on. The number of ranks divides the length.


# %%
def reduce_scatter(parts):
    return ...


check("beyond_one_machine.reduce_scatter", reduce_scatter)

# %% [markdown]
# ### Predict: days and answers
#
# How many days do 64 H100s (989 TFLOP/s) take for the 7B at 40% of their peak, within three days?
#
# You have seen n answers, none of them unsafe. For which n does the interval end at 0.1%, within 50?

# %%
days_on_64_gpus = ...
check("beyond_one_machine.days_on_64_gpus", days_on_64_gpus)
answers_needed = ...
check("beyond_one_machine.answers_needed", answers_needed)

# %% [markdown]
# ### Break: agreement means care
#
# Give the ratings of three people for at least ten answers, `[[...], [...], [...]]`. All three agree on 80% of the
# answers or more, yet alpha is at most 0.

# %%
agreement_without_alpha = ...
check("beyond_one_machine.agreement_without_alpha", agreement_without_alpha)

# %% [markdown]
# ## Where it is in the library
#
# `nanochameleon/parallel/` spreads a model over ranks, and `train.py` has the loop.
# [docs/scaling.md](../docs/scaling.md) has the arithmetic with networks. The measures are in
# `nanochameleon/evaluate/`: `cider.py`, `vqa.py`, `agreement.py` and `intervals.py`, each tested on published numbers.
#
# This was the last lesson. Next, train your own: `python train.py toy`.
