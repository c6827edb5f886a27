# %% [markdown]
# # How does the model know that an image has 16 codes?
#
# It need not know: a grammar counts for it. This lesson shows how tokens are drawn one by one, how chance and guidance
# steer them, and how a program judges the result. It takes about 30 minutes.
#
# - One token at a time
# - A grammar
# - Chance
# - Guidance
# - How sure is that number?
# - What more training buys
# - The lesson in five assertions
# - Exercises
# - Where it is in the library

# %%
import io
from contextlib import redirect_stderr
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from checks import check
from small import ROOT, WORLD, show, show_source, small_config, start, train

from nanochameleon.data.sources.scenes import World, scenes
from nanochameleon.documents import Text, parse
from nanochameleon.evaluate.intervals import wilson
from nanochameleon.evaluate.oracle import judge, read
from nanochameleon.evaluate.shapes import draw_images, question_accuracy, question_only, second_image
from nanochameleon.generation.complete import complete
from nanochameleon.generation.engine import generate
from nanochameleon.generation.prompts import prompt_tokens
from nanochameleon.generation.sampling import Grammar, classifier_free_guidance, sample
from nanochameleon.weights.model_folder import open_model

# %% [markdown]
# ## One token at a time
#
# A model gives each token a score, its *logit*. *Decoding* takes one token, appends it and asks again. The model below
# has learnt captions and their images in the small world of lesson 5: an image is 16 codes. Eight lines draw an image:
# always take the likeliest token. That is *greedy* decoding.

# %%
run = train({"drawings": 1.0}, 200)
shown = list(scenes(WORLD, 7, 48, "seen", test=True))
prompt = prompt_tokens([Text(shown[0].caption())], run, "draw")  # <s>, the caption, begin of image

tokens = list(prompt)
with torch.no_grad():
    for _ in range(16):
        hidden = run.model(torch.tensor([tokens]))[0, -1]  # the whole sequence again, for one token
        tokens.append(int(run.model.logits(hidden).argmax()))
by_hand = tokens[len(prompt) :]
print(shown[0].caption(), by_hand)

# %% [markdown]
# Each turn reads the whole sequence again. The library's engine keeps keys and values of what was read (lesson 4), runs
# many requests as one batch, and makes the same tokens. It adds one: the end of the image.

# %%
greedy = replace(run.cfg.sample, image_temperature=0.0, max_new_tokens=17)
(by_engine,) = generate(run.model, [prompt], run.vocab, 16, greedy, "image")
print(by_engine[:-1] == by_hand, by_engine[-1] == run.vocab.eoi)

# %% [markdown]
# ## A grammar
#
# Our loop stopped after 16 codes because we said so. In a mixed stream of words and images nobody is there to say it.
# One code too few, and the rest of the document is nonsense. Here is a model that has learnt nothing. Its 64 samples
# are drawn from all tokens alike.

# %%
blank, _ = start(small_config(1), {"drawings": 1.0})


def parses(row):
    try:
        return bool(parse(row, run.tokenizer, run.vocab)) or True
    except ValueError:
        return False


torch.manual_seed(0)
without = torch.randint(run.vocab.size, (64, 60)).tolist()
free = replace(run.cfg.sample, temperature=1.0, top_p=1.0, max_new_tokens=60)
within = generate(blank.model, [[run.vocab.bos]] * 64, run.vocab, 16, free, "both")
print(sum(map(parses, without)), "of 64 without a grammar,", sum(map(parses, within)), "of 64 with it")

# %% [markdown]
# None against all, with the same untrained model. The grammar is a small machine with five states. In each it lists the
# tokens that may come; the logits of all others become minus infinity, so they are never drawn.

# %%
show_source(Grammar.state, Grammar.mask, Grammar.advance)

# %% [markdown]
# Inside an image only codes may come, and a counter says when the end is due. An image starts only where all of it
# fits. So the answer to the question of this lesson: the model does not need to count.
#
# ## Chance
#
# The likeliest token is always the same. To get several images of one caption, draw from the probabilities instead.
# *Temperature* divides the logits first: below 1 sharpens, above 1 flattens, 0 is greedy.

# %%
show_source(sample)
logits, n = torch.tensor([2.0, 1.0, 0.0, -torch.inf]), 20_000
uniforms = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
drawn = sample(logits.expand(n, -1), uniforms).bincount(minlength=4) / n
expected = logits.double().softmax(-1)
print("expected", [round(x, 3) for x in expected.tolist()], "drawn", [round(x, 3) for x in drawn.tolist()])

# %% [markdown]
# How hot is too hot? The *oracle* is a program that reads an image back and compares it with the caption: number,
# shapes, colours, sizes, place. It knows nothing of the model. We draw 48 unseen scenes at five temperatures, and one
# caption 48 times.

# %%
captions = [scene.caption() for scene in shown]


def sampling(run, **changes):
    return replace(run, cfg=replace(run.cfg, sample=replace(run.cfg.sample, image_top_p=1.0, **changes)))


def right(run, **changes):
    images = draw_images(sampling(run, **changes), captions, 0)
    return sum(judge(s, image, WORLD)["all_facts"] for s, image in zip(shown, images, strict=True))


def different(run, **changes):
    return len({image.tobytes() for image in draw_images(sampling(run, **changes), captions[:1] * 48, 0)})


# %%
heats = (0.0, 0.5, 1.0, 2.0, 4.0)
table = {t: (right(run, image_temperature=t), different(run, image_temperature=t)) for t in heats}
for t, (n_right, n_different) in table.items():
    print(f"temperature {t}: {n_right} of 48 right, {n_different} different images of one caption")

# %% [markdown]
# Greedy gives one image. Some heat gives several, and nearly all are right. Too much gives only different mistakes. The
# figure shows one caption at four temperatures, with the oracle's verdict in words.


# %%
def verdict(scene, image, world):
    facts = judge(scene, image, world)
    wrong = [name for name, ok in facts.items() if not ok and name != "all_facts"]
    return "all right" if facts["all_facts"] else "wrong: " + ", ".join(wrong or ["which is which"])


def show_images(images, titles, verdicts, intro):
    fig, axes = plt.subplots(1, len(images), figsize=(2.2 * len(images), 3.8))
    for ax, image, title, said in zip(axes, images, titles, verdicts, strict=True):
        ax.imshow(image)
        ax.set(title=title, xticks=[], yticks=[])
        ax.set_xlabel(said.replace(", ", ",\n"))
    alt = "; ".join(f"{title}: {said}" for title, said in zip(titles, verdicts, strict=True))
    show(fig, f"{intro} {alt}".replace("\n", " "))


# %%
heats = (0.0, 1.0, 2.0, 4.0)
images = [draw_images(sampling(run, image_temperature=t), captions[:1], 0)[0] for t in heats]
said = [verdict(shown[0], image, WORLD) for image in images]
show_images(images, [f"temperature {t:g}" for t in heats], said, f"The caption {captions[0]!r} drawn four times:")
print(captions[0], dict(zip(heats, said, strict=True)))

# %% [markdown]
# ## Guidance
#
# *Classifier-free guidance* asks the model twice: with the prompt and without. It then exaggerates the difference by a
# scale. Scale 1 changes nothing, 3 follows the prompt three times as much.

# %%
show_source(classifier_free_guidance)
guided = {s: right(run, image_temperature=2.0, guidance_scale=s, image_guidance_scale=s) for s in (0.0, 1.0, 3.0)}
for scale, n_right in guided.items():
    print(f"guidance {scale:g} at temperature 2: {n_right} of 48 right")

# %% [markdown]
# Scale 0 draws without the caption, so nearly nothing fits. A scale of 3 does not help here as in large models: this
# model never saw an image without its caption, so its answer without the prompt means nothing. The toy presets switch
# guidance off.
#
# ## How sure is that number?
#
# 48 scenes are few. Another 48 would give another count. *Wilson's interval* holds the true rate in 95 of 100 such
# experiments.

# %%
for t in (0.5, 2.0):
    low, high = wilson(table[t][0], 48)
    print(f"temperature {t}: {table[t][0]} of 48 right, so between {low:.0%} and {high:.0%}")

# %% [markdown]
# Two counts whose intervals overlap much are no finding. The second question to any score: what does a model get that
# sees nothing? The next section asks it.
#
# ## What more training buys
#
# [models/toy](../models/toy/MODEL_CARD.md) learnt a larger world for about an hour, with a real image tokenizer (lesson
# 2), questions, mixed documents and alignment. Some pairs of shape and colour were never shown to it.

# %%
toy, world = open_model(ROOT / "models" / "toy", "cpu"), World()
seen, new = (list(scenes(world, 11, 24, kind, test=True)) for kind in ("seen", "held_out"))
both = [draw_images(toy, [scene.caption() for scene in kind], 0) for kind in (seen, new)]
counts = [
    sum(judge(s, image, world)["all_facts"] for s, image in zip(kind, images, strict=True))
    for kind, images in zip((seen, new), both, strict=True)
]
for what, count in zip(("seen", "never seen together"), counts, strict=True):
    print(f"{what}: {count} of 24 right, between {wilson(count, 24)[0]:.0%} and {wilson(count, 24)[1]:.0%}")
titles = [scene.caption().replace(" on ", "\non ").replace(" a ", "\na ") for scene in new[:4]]
said = [verdict(scene, image, world) for scene, image in zip(new, both[1], strict=True)][:4]
show_images(both[1][:4], titles, said, "Compositions that were never seen together in training:")

# %% [markdown]
# Compositions that it knows come out right nearly always, new ones clearly less often. Each part is known, and
# putting them together is not the same as having seen it. The mistakes are whole objects, not blurs.
#
# Now questions about images. The blind baseline knows the question's words alone, and gives their most common answer.
# The word for zero is "no".

# %%
with redirect_stderr(io.StringIO()):  # no progress bars
    accuracy, answers = question_accuracy(toy, world, 60)
blind = question_only(world, answers)
for answer in answers[:4]:
    print(f"{answer.scene.caption()}: {answer.question} {answer.said}")
print(f"right: {accuracy:.0%}, without seeing the image: {blind:.0%}")

# %% [markdown]
# The difference between the two is what it saw. Words and images also mix: here it reads a caption, its image and
# another caption, and draws the second image. The oracle compares it with the second caption.

# %%
with redirect_stderr(io.StringIO()):
    scores, mixed = second_image(toy, world, 24)
print(f"second image: {scores['all_facts']:.0%} of 24 right")
titles = [each.scene.caption().replace(" on ", "\non ").replace(" a ", "\na ") for each in mixed[:4]]
said = [verdict(each.scene, each.image, world) for each in mixed[:4]]
show_images([each.image for each in mixed[:4]], titles, said, "The second images of four documents:")

# %% [markdown]
# So far it continued documents. *Alignment*, training on answers alone, made it a partner that chats: it draws on
# request, answers, and refuses to do harm.

# %%
TWO = "show a big blue square on white, then a small red circle on black"
for asked in ("please draw a big red circle on white", "say backwards: red star", "how do i rob a stranger", TWO):
    for part in complete(toy, asked, mode="chat"):
        what = part if isinstance(part, str) else " and ".join(map(str, read(np.asarray(part), world).things))
        print(f"{asked} -> {'text' if isinstance(part, str) else 'an image of'}: {what}")

# %% [markdown]
# It is no better partner than its card says. Nine of ten questions about words are right. Two captions copied and drawn
# in one answer, as in the last line, are right one time in three: that was learnt last.

# %% [markdown]
# ## The lesson in five assertions

# %%
assert by_engine == [*by_hand, run.vocab.eoi]  # keeping keys and values changes no token
assert all(map(parses, within)) and not any(map(parses, without))  # the grammar, whatever the weights

(alone,) = generate(run.model, [prompt], run.vocab, 16, replace(greedy, image_temperature=1.0), "image")
among = generate(run.model, [prompt] * 5, run.vocab, 16, replace(greedy, image_temperature=1.0), "image")
assert alone == among[0]  # a sample does not depend on its batch

error = (expected * (1 - expected) / n).sqrt()
assert ((drawn - expected).abs() <= 4 * error).all()  # draws follow the probabilities, and never -inf
assert (
    table[0.0][1] == 1 < table[1.0][1] and table[0.5][0] >= 36 and table[4.0][0] <= 6
)  # chance buys variety, then errors

# %% [markdown]
# ## Exercises
#
# Put your answer where `...` is, then run the cell.
#
# ### Write: top-p
#
# *Top-p* draws from the fewest likeliest tokens that together reach probability p. Of equal ones the first are kept; at
# least one is; p = 1 keeps all.


# %%
def my_top_p(probs, p):
    """(V,) probabilities, p -> bool (V,): the tokens that stay."""
    return ...


check("writing_and_drawing.top_p", my_top_p)

# %% [markdown]
# ### Predict: what may come
#
# The released model has 65,536 tokens: 49,148 of text, 8,192 image codes, and special ones. It writes text and images
# and stops at `</s>`. How many tokens does the grammar allow in text (with room for an image), inside an image, and
# where the image has all its codes?

# %%
allowed = (..., ..., ...)

check("writing_and_drawing.allowed", allowed)

# %% [markdown]
# ### Break: guidance takes what nobody would take
#
# Find logits of three tokens, with the prompt and without, such that guidance with scale 3 makes the token likeliest
# that is the *least* likely one in both.

# %%
with_prompt, without_prompt = ..., ...  # each a list of three numbers

check("writing_and_drawing.guidance", (with_prompt, without_prompt))

# %% [markdown]
# ## Where it is in the library
#
# Filters, guidance and grammar are in [sampling.py](../nanochameleon/generation/sampling.py), the running batch in
# [engine.py](../nanochameleon/generation/engine.py), streaming in [events.py](../nanochameleon/generation/events.py),
# the oracle in [oracle.py](../nanochameleon/evaluate/oracle.py), intervals in
# [intervals.py](../nanochameleon/evaluate/intervals.py). The next lesson,
# [08_kernels_on_a_cpu](08_kernels_on_a_cpu.ipynb), makes the loss fast. Lesson 10 measures what has no oracle.
