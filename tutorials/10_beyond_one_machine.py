# %% [markdown]
# # Beyond one machine, and is it any good?
#
# You train one model on two processes with nothing but sums, count the hours of the 7B and the 34B, and read the paper's own results with care. It takes 30 minutes.
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

# %% [markdown]
# The paper's 7B took 856,481 hours of A100 GPUs. That is 98 years on one of them, so many GPUs must train **one** model. How do they agree on its weights? And three multiplications should explain that number. Do they?
#
# ## Two processes, one gradient
#
# A *rank* is one of several processes that run the same program, one for each GPU. Here are two on a CPU. All they need is one operation, *all-reduce*: every rank gives a tensor, every rank gets the sum.


# %%
def give_and_get(rank, n, data):
    x = torch.tensor([10.0 * (rank + 1)])
    dist.all_reduce(x)
    return x.item()


print("ranks give 10 and 20; they get", on_ranks(2, give_and_get))

# %% [markdown]
# `on_ranks` (in `processes.py`) sends the source of your function to two processes. They meet in a file of a temporary folder. On many machines `torchrun` does this over a network.
#
# Now the data: in each batch, four captions with images and four captions alone. The sequences with images are longer. That will matter.

# %%
from nanochameleon.data import fuse
from nanochameleon.data.sources.shapes import ShapesSource
from nanochameleon.documents import render
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.vocab import Vocab

STEPS, LENGTH, images = 30, 40, PatchTokenizer()
vocab = Vocab.toy(len(images.codebook), 120)
drawings, captions = (ShapesSource(WORLD, form, seed=0) for form in ("drawings", "text"))
words = TextTokenizer.train(captions.captions(1_000), vocab)


def token_rows(source):
    documents = fuse([source.document(i) for i in range(4 * STEPS)], images)
    rows = [torch.tensor(render(each, words, vocab)) for each in documents]
    return torch.stack([F.pad(row, (0, LENGTH - len(row)), value=-100) for row in rows]).view(STEPS, 4, LENGTH)


batches = torch.cat([token_rows(drawings), token_rows(captions)], 1)  # (steps, 8 sequences, tokens), -100 is padding
print("targets in step 0, by sequence:", (batches[0, :, 1:] >= 0).sum(1).tolist())

# %% [markdown]
# One process first. The loss is a *sum* over targets, divided by their count.


# %%
def start(n_vocab):
    from nanochameleon.config import ModelConfig
    from nanochameleon.transformer import Chameleon

    torch.manual_seed(0)  # the same weights on every rank
    cfg = ModelConfig(n_vocab, dim=64, n_layers=2, n_heads=2, multiple_of=32, rope_theta=100.0)
    return Chameleon(cfg)


def loss_sum(model, rows):
    tokens, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]
    logits = model.logits(model(tokens))
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, (targets >= 0).sum()


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


alone = train_alone()
print(f"loss {alone[0]:.2f} at first, ln {vocab.size} = {np.log(vocab.size):.2f}; {alone[-1]:.2f} after {STEPS} steps")

# %% [markdown]
# *Distributed data parallel* (DDP): every rank holds the whole model and half of the batch. A gradient is a sum over targets, so the gradient of the batch is the sum of the ranks' gradients. One all-reduce before each update, and all ranks take the same step.


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


def distance(losses):
    return np.abs(np.subtract(losses, alone))


data = {"batches": batches, "n_vocab": vocab.size, "broken": False}
two = on_ranks(2, ddp, start, loss_sum, data=data)
print(f"the ranks agree: {two[0] == two[1]}; at most {distance(two[0]).max():.0e} from one process")

# %% [markdown]
# ## The mean of means
#
# It is tempting to let each rank take the mean over **its own** targets and to average the ranks: the line with `broken`. Nothing crashes. But here rank 0 has more than twice the targets of rank 1, so each of its targets now counts less than half as much.

# %%
per_rank = (batches[:, :, 1:] >= 0).view(STEPS, 2, -1).sum(2).float().mean(0)
broken = on_ranks(2, ddp, start, loss_sum, data=data | {"broken": True})[0]
print(f"targets a step: rank 0 has {per_rank[0]:.0f}, rank 1 has {per_rank[1]:.0f}")
print(f"at most {distance(broken).max():.3f} from one process")

# %% [markdown]
# ## Half a model each
#
# A 7B with AdamW keeps 16 bytes for each weight: weight, gradient and two moments. No 80 GB card holds that. *Fully sharded data parallel* (FSDP) lets each rank keep a *shard*, 1/n of all numbers. *All-gather* puts the weights together for a step. *Reduce-scatter* sums gradients and gives each rank its own shard of the sum. AdamW works on single numbers, so a shard is enough for it.


# %%
def fsdp(rank, n, data):
    model, losses = start(data["n_vocab"]), []
    flat = parameters_to_vector(model.parameters()).detach()
    flat = F.pad(flat, (0, -len(flat) % n))  # so that n divides it
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
        gradient = parameters_to_vector(p.grad for p in model.parameters())
        shard.grad = torch.empty_like(shard)
        dist.reduce_scatter_tensor(shard.grad, F.pad(gradient, (0, len(flat) - len(gradient))))
        optimizer.step()
        losses.append((both[0] / both[1]).item())
    return {"losses": losses, "kept": len(shard), "of": len(flat)}


# %%
sharded = on_ranks(2, fsdp, start, loss_sum, data=data)[0]
print(f"each rank keeps {sharded['kept']:,} of {sharded['of']:,} weights")
print(f"at most {distance(sharded['losses']).max():.0e} from one process")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
curves = {"mean of means": (broken, "s-"), "DDP": (two[0], "o:"), "FSDP": (sharded["losses"], "x:")}
left.plot(alone, "-", label="one process")
for name, (losses, style) in curves.items():
    left.plot(losses, style[0], markersize=5, fillstyle="none", label=name)
    right.semilogy(np.maximum(distance(losses), 1e-8), style, markersize=4, label=name)
left.set(xlabel="step", ylabel="loss (nats a token)", title="Four runs")
right.set(xlabel="step", ylabel="difference in loss", title="Distance from one process")
right.annotate("mean of means", (18, 2e-3))
right.annotate("DDP and FSDP", (18, 2e-6))
left.legend()
show(fig, "Left: the losses of one process, DDP, FSDP and the mean of means look like one falling curve. Right, on a log "
     "axis: DDP and FSDP stay below a millionth from one process, the mean of means is at a hundredth.")  # fmt: skip

# %% [markdown]
# On the left, four runs look like one: that is why this bug survives in real code. On the right, DDP and FSDP differ from one process by rounding, and the mean of means by thousands of times more. It minimises another loss.
#
# The library divides by the count of the whole batch, too, and leaves the rest to torch's DDP and FSDP2. FSDP2 gathers one block at a time, so that no rank ever holds the whole model:

# %%
from nanochameleon.parallel.apply import apply_fsdp

show_source(apply_fsdp)


# %%
def library(rank, n, data):
    from nanochameleon.config import ParallelConfig
    from nanochameleon.packing import Batch
    from nanochameleon.parallel.apply import parallelize, wrap
    from nanochameleon.parallel.mesh import Mesh
    from nanochameleon.training.objective import Objective
    from nanochameleon.vocab import Vocab

    grid = dist.init_device_mesh("cpu", (n, 1), mesh_dim_names=("dp", "tp"))
    mesh, how = Mesh(torch.device("cpu"), rank, n, device_mesh=grid), ParallelConfig("fsdp", compile="off")
    objective = Objective(start(data["n_vocab"]), Vocab.toy(*data["vocab"]), "fp32")
    parallelize(objective, mesh, how)  # cuts every weight into shards
    model = wrap(objective, mesh, how)
    return fit(model, torch.optim.AdamW(model.model.parameters(), lr=5e-3), data["batches"], Batch)


def fit(model, optimizer, batches, Batch):
    losses = []
    for rows in batches:
        mine = rows.chunk(model.mesh.world_size)[model.mesh.rank]
        tokens, targets, zeros = mine[:, :-1].clamp(min=0), mine[:, 1:], torch.zeros_like(mine[:, 1:])
        count = (rows[:, 1:] >= 0).sum()
        batch = Batch(tokens, targets, zeros, zeros + torch.arange(zeros.shape[1]))
        optimizer.zero_grad()
        sums = model.wrapped(batch, None, normalizer=count / model.mesh.world_size).next_token  # FSDP averages
        sums.loss.backward()
        optimizer.step()
        losses.append(model.mesh.all_reduce_sum(float(sums.cross_entropy))[0] / count.item())
    return losses


library_losses = on_ranks(2, library, fit, start, data=data | {"vocab": [len(images.codebook), 120]})[0]
print(f"the library's FSDP: at most {distance(library_losses).max():.0e} from one process")

# %% [markdown]
# ## The hours of a large model
#
# Memory first: what does one GPU need for the 7B if it holds the whole model, and if 64 GPUs share it?

# %%
from nanochameleon.bench.scaling import PAPER_HOURS, TOKENS, Cluster, memory_bytes
from nanochameleon.presets import chameleon_7b, chameleon_34b

MODELS = {"7B": chameleon_7b().model, "34B": chameleon_34b().model}
for name, model in MODELS.items():
    needs = [memory_bytes(model, Cluster(n))["total"] / 2**30 for n in (1, 64)]
    print(f"{name}: {needs[0]:.0f} GiB on one GPU, {needs[1]:.0f} GiB on each of 64")

# %% [markdown]
# So DDP cannot train the 7B on 80 GB cards, and FSDP can. Now time. A token costs about 6 *FLOPs* (multiplications and additions) for each weight: 2 forward, 4 backward. Attention comes on top.

# %%
from nanochameleon.training.flops import PEAK_FLOPS, flops_per_token

show_source(flops_per_token)

# %%
N_GPUS, utilisation = {"7B": 1_024, "34B": 3_072}, {}
for name, model in MODELS.items():
    flops = flops_per_token(model, 4_096)
    at_peak = TOKENS * flops / PEAK_FLOPS["A100"] / 3_600
    utilisation[name] = at_peak / PAPER_HOURS[name]
    days = PAPER_HOURS[name] / N_GPUS[name] / 24
    print(
        f"{name}: {TOKENS:.1e} tokens x {flops / 1e9:.1f} GFLOPs / {PEAK_FLOPS['A100'] / 1e12:.0f} TFLOP/s = {at_peak:,.0f} hours"
    )
    print(
        f"     the paper: {PAPER_HOURS[name]:,}, {days:.0f} days on {N_GPUS[name]:,}; utilisation {utilisation[name]:.1%}"
    )

# %% [markdown]
# Tokens times FLOPs over the peak give the hours of a perfect GPU. The paper needed 2.4 times as many: it used 42% of the peak for the 7B and 41% for the 34B, a usual rate for such runs. The number we began with is no mystery.
#
# ## Captions and answers
#
# A model was trained. Is it any good? *CIDEr-D* scores a caption against what people wrote about the image. It compares groups of one to four words, and rare groups count more. A perfect copy gets 10.

# %%
from nanochameleon.evaluate.cider import cider_d, similarity

show_source(similarity)

# %%
from dataclasses import replace

from nanochameleon.data.sources.scenes import OPPOSITE, draw_scene
from nanochameleon.evaluate.captions import score_caption

scenes = [scene for scene in (draw_scene(WORLD, 0, i) for i in range(400)) if scene.relation][:60]


def recoloured(scene):
    first, second = scene.things
    colour = WORLD.colours[(WORLD.colours.index(first.colour) + 1) % len(WORLD.colours)]
    return replace(scene, things=(replace(first, colour=colour), second))


def turned(scene):
    return replace(scene, things=scene.things[::-1], relation=OPPOSITE[scene.relation])


truth, wrong, other = ([change(scene).caption() for scene in scenes] for change in (lambda s: s, recoloured, turned))
print("\n".join((truth[0], wrong[0], other[0])))

# %% [markdown]
# The first caption is the reference. The second has one colour wrong. The third is **true**: it says the same from the other side. Whom does CIDEr-D prefer?

# %%
rows = {"the reference": truth, "a wrong colour": wrong, "true, other words": other}
cider = {name: cider_d(said, [[each] for each in truth])[0] for name, said in rows.items()}
facts = {
    name: 10 * np.mean([score_caption(a, s, WORLD) for a, s in zip(said, scenes, strict=True)])
    for name, said in rows.items()
}
fig, axes = plt.subplots(figsize=(8, 2.6))
for shift, scores, label, hatch in ((0.2, cider, "CIDEr-D", ""), (-0.2, facts, "facts right, of 10", "//")):
    bars = axes.barh(np.arange(3) + shift, list(scores.values()), 0.36, label=label, hatch=hatch, alpha=0.6)
    axes.bar_label(bars, fmt="%.1f", padding=4)
axes.set(yticks=range(3), yticklabels=list(rows), xlim=(0, 13))
axes.invert_yaxis()
axes.legend(loc="lower right")
show(fig, "Bars. The reference has 10 in CIDEr-D and in facts. A wrong colour has 6.6 in CIDEr-D and 6.7 in facts. The "
     "true caption in other words has 3.8 in CIDEr-D and 10 in facts.")  # fmt: skip

# %% [markdown]
# CIDEr-D prefers the lie (6.6) to the truth in other words (3.8), which has every fact right. It measures whether a caption sounds like the references. With five references by different people that is useful; alone it is not truth.
#
# Answers to questions have a similar measure. Ten people answer, and *VQA accuracy* asks how many of them say what the model says:

# %%
from nanochameleon.evaluate.vqa import accuracy

for n in range(6):
    print(f"{n} of 10 people agree: {accuracy('red', ['red'] * n + ['blue'] * (10 - n)):.1f}")
print(
    "'Yes.' where all ten say yes:",
    accuracy("Yes.", ["yes"] * 10),
    "and where nine do:",
    accuracy("Yes.", ["yes"] * 9 + ["no"]),
)

# %% [markdown]
# Three people give 0.9, since each of the three has only two others to agree with. The last line is an oddity of the official rule: it strips punctuation only where people differ.
#
# ## Votes
#
# The paper asked three people to compare two models' answers to 1,048 prompts. The majority decides; without one, the pair is a tie. A tie is half a win.

# %%
from nanochameleon.evaluate.agreement import krippendorff_alpha, win_rate, win_rate_interval

VOTES = {"Gemini+": (435, 362, 251), "GPT-4V+": (375, 331, 342), "Gemini": (561, 327, 160), "GPT-4V": (482, 329, 237)}
rates = {name: (win_rate(*votes)[0], *win_rate_interval(*votes)) for name, votes in VOTES.items()}
for name, (rate, low, high) in rates.items():
    print(f"against {name:8} {rate:.1%}, 95% interval {low:.1%} to {high:.1%}")
MIXED, TEXT_ONLY = 441, 607  # prompts with images, and without
print(
    f"Gemini+, 60.4% of mixed prompts and 57.6% of the rest: {(0.604 * MIXED + 0.576 * TEXT_ONLY) / 1_048:.1%} of all"
)
print(f"Table 10, tasks fulfilled: 55.3% and 57.7%, so {(0.553 * MIXED + 0.577 * TEXT_ONLY) / 1_048:.1%} of all")

# %% [markdown]
# The paper contradicts itself twice. Its abstract gives 60.4% against Gemini+ as the overall rate; its own counts give 58.8%, and 60.4% is the rate on mixed prompts alone. Table 10's two parts make 56.7% of fulfilled tasks; the text says 55.2%.
#
# Do the three people agree at all? *Krippendorff's alpha* is 1 for perfect agreement and 0 for what chance gives.

# %%
rng = np.random.default_rng(0)
lazy = np.where(rng.random((3, 1_000)) < 0.02, "unsafe", "safe").tolist()  # three people who do not look
same = np.mean([len(set(votes)) == 1 for votes in zip(*lazy, strict=True)])
print(f"all three say the same of {same:.0%} of the answers; alpha is {krippendorff_alpha(lazy):.2f}")

# %% [markdown]
# Three people who press "safe" without looking agree nearly always, and alpha sees through it. The paper reports 0.34 for fulfilled tasks: people agree only somewhat on what a good answer is.
#
# ## Rare events
#
# Of 20,000 answers, 78 were unsafe with the 7B and 19 with the 34B. Of 445 attacks on the 34B, 7 succeeded. How sure are such small numbers? The *Clopper-Pearson interval* holds every rate that does not make the count a surprise.

# %%
from nanochameleon.evaluate.intervals import clopper_pearson

RARE = {"7B": (78, 20_000), "34B": (19, 20_000), "34B, attacked": (7, 445), "none of 445": (0, 445)}
rare = {name: clopper_pearson(*counts) for name, counts in RARE.items()}
for name, (low, high) in rare.items():
    print(f"{name:14} {RARE[name][0] / RARE[name][1]:7.3%}, 95% interval {low:.3%} to {high:.3%}")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
for y, (name, (rate, low, high)) in enumerate(rates.items()):
    left.plot([100 * low, 100 * high], [y, y], "-", color="C0")
    left.plot(100 * rate, y, "o", color="C0")
left.plot(60.4, 0, "x", color="C1", markersize=9, markeredgewidth=2)
left.annotate("abstract: 60.4", (60.9, 0.28))
left.axvline(50, linestyle=":", color="C2")
left.set(yticks=range(4), yticklabels=list(rates), xlabel="% of wins", title="Chameleon against", ylim=(3.5, -0.5))
for y, (name, (low, high)) in enumerate(rare.items()):
    right.plot([max(100 * low, 0.02), 100 * high], [y, y], "-", color="C0")
    right.plot(max(100 * RARE[name][0] / RARE[name][1], 0.02), y, "o", color="C0")
right.set(
    xscale="log", yticks=range(4), yticklabels=list(rare), xlabel="% unsafe (log; left edge: 0)", ylim=(3.5, -0.5)
)
show(fig, "Left: win rates with intervals; only the one against GPT-4V+ crosses 50%, and the abstract's 60.4 lies right of "
     "the 58.8 against Gemini+. Right: unsafe shares; the 7B's and the 34B's intervals are apart.")  # fmt: skip

# %% [markdown]
# Left: three intervals are clear of 50%. The one against GPT-4V+ is not, so that lead may be luck. Right: the 7B and the 34B do not overlap, so the larger one is safer on these prompts. And no success in 445 attacks would still allow 0.8%.
#
# ## What you have seen

# %%
assert max(distance(losses).max() for losses in (two[0], sharded["losses"], library_losses)) < 1e-4
assert distance(broken).max() > 0.02
assert all(0.35 < share < 0.5 for share in utilisation.values())
assert cider["a wrong colour"] > 1.3 * cider["true, other words"]
assert rates["GPT-4V+"][1] < 0.5 < rates["Gemini+"][1] and rare["34B"][1] < rare["7B"][0]

# %% [markdown]
# ## Exercises
#
# ### Write: reduce-scatter
#
# `parts[r]` is the list that rank r gives. Return what each rank holds afterwards: rank 0 the first shard of the sum, and so on. The number of ranks divides the length.


# %%
def reduce_scatter(parts):
    return ...


check("beyond_one_machine.reduce_scatter", reduce_scatter)

# %% [markdown]
# ### Predict: days on 64 GPUs
#
# How many days do 64 H100s (989 TFLOP/s) take for the 7B at a utilisation of 40%? Within three days is right.

# %%
days_on_64_gpus = ...
check("beyond_one_machine.days_on_64_gpus", days_on_64_gpus)

# %% [markdown]
# ### Predict: how many answers
#
# You have seen n answers, none of them unsafe. How large must n be, so that the interval above ends below 0.1%? Within 50 is right.

# %%
answers_needed = ...
check("beyond_one_machine.answers_needed", answers_needed)

# %% [markdown]
# ### Break: agreement without alpha
#
# Give the ratings of three people for at least ten answers, `[[...], [...], [...]]`. All three must agree on 80% of the answers or more, and alpha must be at most 0.

# %%
agreement_without_alpha = ...
check("beyond_one_machine.agreement_without_alpha", agreement_without_alpha)

# %% [markdown]
# ## Where it is in the library
#
# `nanochameleon/parallel/` spreads a model over ranks, `train.py` has the loop, and docs/scaling.md the full arithmetic with networks. The measures are `cider.py`, `vqa.py`, `agreement.py` and `intervals.py` in `nanochameleon/evaluate/`, each tested on published numbers.
#
# This was the last lesson. Train your own model next: `python train.py toy`.
