# %% [markdown]
# # PyTorch has a softmax. Why write one?
#
# A loss over 2,097,152 numbers must move 16,777,216 bytes, like a copy. How near does code come? 25 minutes.
#
# - One row by hand
# - The least it can cost
# - Loops
# - Where exp ends
# - One pass instead of two
# - Registers and a polynomial
# - In place
# - The whole ladder
# - The lesson in five assertions
# - Exercises
# - Where it is in the library

# %%
import math
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from checks import check
from small import FAINT, IMAGE, TEXT, show, show_source

from nanochameleon.bench.measure import peak_bytes
from nanochameleon.kernels import explain, ladder
from nanochameleon.kernels.cpu import exp2, simd
from nanochameleon.kernels.zloss import cpu, steps

torch.set_num_threads(1)
CPU = torch.device("cpu")

# %% [markdown]
# ## One row by hand
#
# For each position the transformer gives one number for each token of the vocabulary, a *logit* x. The *softmax* makes
# probabilities of them: p = exp(x) / Z, where Z is the sum of all exp(x). If y is the token that came, the loss is
# log Z - x[y]. The *z-loss* of lesson 6 adds a little of (log Z)².

# %%
x, y, z_loss = [2.0, -1.0, 0.5], 0, 0.1
log_z = math.log(sum(math.exp(value) for value in x))
loss = log_z - x[y] + z_loss * log_z**2
gradient = [(1 + 2 * z_loss * log_z) * math.exp(value - log_z) - (v == y) for v, value in enumerate(x)]
print(f"loss {loss:.4f}, gradient", [f"{g:+.4f}" for g in gradient])

by_torch = steps.formula(torch.tensor([x]), torch.tensor([y]), z_loss, 1.0)
print("by autograd        ", [f"{g:+.4f}" for g in by_torch[2][0].tolist()])
show_source(steps.formula)

# %% [markdown]
# Training needs the *gradient*: how much the loss grows with each logit. It is p (1 + 2 z log Z), less 1 at y. The same
# exponentials make loss and gradient, so one function can return both. This lesson climbs a *ladder*: each rung
# computes the same, and changes one thing to be faster. `formula` is the first rung. It takes the gradient by autograd,
# and multiplies the whole loss by `scale`.

# %% [markdown]
# ## The least it can cost
#
# Take 1,024 positions and a vocabulary of 2,048. Whatever a program does, it must read the logits from memory and write
# the gradient. A copy of the logits does just that, so a copy's time is the limit. And how much memory does each way
# hold on top of the logits?

# %%
inputs = steps.inputs(1_024, 2_048)
logits = inputs[0]
print(f"logits: {logits.numel():,} numbers, {logits.nbytes:,} bytes; read and write: {2 * logits.nbytes:,}")
rungs = {rung.name: rung for rung in steps.on_cpu().rungs}
for name in ("formula", "loops", "in place"):
    own = ladder.each_tensor(inputs, torch.Tensor.clone)
    held = peak_bytes(partial(rungs[name].function, *own), CPU)
    print(f"{name:9} holds {held / logits.nbytes:.2f} times the logits")

# %% [markdown]
# The formula holds 4.00 times the logits: PyTorch writes an array for each operation, and the next one reads it. Memory
# is slow. A *kernel* is one function that does all steps on a number while it is at hand.
#
# ## Loops
#
# Three loops over a row are left: the largest logit (why: see below), the sum, the gradient. `njit`, of the compiler
# Numba, turns Python loops into machine code.

# %%
show_source(steps.zloss_loops.py_func)

# %%
few = ladder.each_tensor(inputs, lambda x: x[:8].clone())
compiled = steps.loops("compiled", "", steps.zloss_loops).function
python = steps.loops("Python", "", steps.zloss_loops.py_func).function
results = compiled(*few), python(*few)
print(f"largest difference {max((a - b).abs().max() for a, b in zip(*results, strict=True)):.0e}")
times = [ladder.seconds_of(partial(function, *few), CPU) for function in (compiled, python)]
print(f"8 rows: compiled {1e3 * times[0]:.2f} ms, Python {1e3 * times[1]:.0f} ms")

# %% [markdown]
# ## Where exp ends
#
# A float32 ends at 3.4e+38, and exp(89) is larger. As a rule logits are small, but nothing keeps them so: the softmax
# does not change if all logits shift. So add the same number to a row and look at log Z, which should shift by as much.

# %%
print(f"float32 ends at {torch.finfo(torch.float32).max:.1e}, and exp(89) is {math.exp(89):.1e}")
row = torch.randn(1_000, generator=torch.Generator().manual_seed(0))
offsets = torch.arange(-200.0, 201.0, 2.0)
moved = row + offsets[:, None]
plain = moved.exp().sum(1).log() - offsets
largest = moved.amax(1)
shifted = largest + (moved - largest[:, None]).exp().sum(1).log() - offsets
low, high = (edge.item() for edge in offsets[plain.isfinite()][[0, -1]])
print(f"plain formula: finite from {low:.0f} to {high:.0f}")
print(f"shifted: all finite {shifted.isfinite().all()}, spread {shifted.max() - shifted.min():.0e}")

# %%
fig, axes = plt.subplots(figsize=(8, 2.8))
axes.plot(offsets, shifted, color=TEXT, linestyle="-")
axes.plot(offsets, plain.where(plain.isfinite(), torch.nan), color=IMAGE, linestyle="--", linewidth=4, alpha=0.7)
for edge, side, word in ((low - 4, "right", "exp gives 0"), (high + 4, "left", "exp gives infinity")):
    axes.axvline(edge, color=FAINT, linestyle=":")
    axes.text(edge + (4 if side == "left" else -4), 7.0, word, ha=side)
axes.text(-8, 7.55, "plain formula", color=IMAGE, ha="center")
axes.text(150, 7.55, "largest logit taken off", color=TEXT, ha="center")
axes.set(xlabel="added to every logit", ylabel="log Z less what was added", ylim=(6.8, 7.7))
show(
    fig,
    "log Z less the number added to every logit, from -200 to 200. With the largest logit taken off, the line is "
    f"flat. The plain formula's line falls steeply and ends at {low:.0f}, where exp gives 0. On the other side it ends "
    f"at {high:.0f}, where exp is infinite.",
)

# %% [markdown]
# The figure shows that the plain formula has values only in the middle, and falls at the left end, where the powers
# are too small for float32. The shifted one is flat everywhere. With m, the largest logit, log Z = m + log of the sum
# of exp(x - m). No power exceeds 1, and one of them is 1.

# %% [markdown]
# ## One pass instead of two
#
# But m is known only after a pass over the row, and the sum takes another. The *online softmax* needs one. It keeps the
# largest logit so far and the sum so far. When a larger logit comes, it scales the sum down.

# %%
largest, total = -math.inf, 0.0
for value in (2.0, 1.0, 4.0, 3.0):
    if value > largest:
        total *= math.exp(largest - value)
        largest = value
    total += math.exp(value - largest)
    print(f"logit {value}: largest {largest}, sum {total:.4f}, log Z so far {largest + math.log(total):.4f}")
online = largest + math.log(total)
print("by torch:", f"{torch.tensor([2.0, 1.0, 4.0, 3.0]).logsumexp(0):.4f}")
show_source(steps.zloss_online.py_func)

# %% [markdown]
# Two parts of a row can be merged the same way, in any order. That is what lets lesson 9 give a row to 256 threads, and
# what lets attention take its keys in tiles. `zloss_online` is the rung: one loop fewer than before.

# %% [markdown]
# ## Registers and a polynomial
#
# A *register* is where the processor computes. With AVX-512 it is 512 bits wide, and one instruction adds 16 pairs of
# float32. But `math.exp` is a call for one number. So the kernels make their own: exp(x) = 2^(x log2 e), and
# 2^x = 2^n 2^f, where n is the nearest integer and f between -1/2 and 1/2. The first factor is an exponent's bits. The
# second is a polynomial.

# %%
f = np.linspace(-0.5, 0.5, 1_001)
errors = {}
for degree in range(1, 7):
    coefficients = np.array(exp2.polynomial(degree, 0.0))
    errors[degree] = np.abs(np.vander(f, degree + 1, increasing=True) @ coefficients / np.exp2(f) - 1).max()
    print(f"degree {degree}: largest relative error {errors[degree]:.1e}")
print(f"float32 rounds to {np.finfo(np.float32).eps:.1e}; this processor's registers hold {simd.W} float32")

# %%
fig, axes = plt.subplots(figsize=(8, 2.6))
axes.semilogy(list(errors), list(errors.values()), color=TEXT, marker="o")
axes.axhline(np.finfo(np.float32).eps, color=FAINT, linestyle=":")
axes.text(1, 2e-7, "one unit of float32", va="bottom")
axes.text(5.05, 5e-7, "the library's")
axes.set(xlabel="degree of the polynomial", ylabel="largest error of 2^f", xticks=list(errors))
show(
    fig,
    "The largest relative error of the polynomial falls by more than ten times with each degree, on a logarithmic "
    "axis. At degree 5 it meets one unit of float32 rounding, and degree 6 is below what float32 can hold.",
)

# %% [markdown]
# The line falls steeply and meets float32's rounding at degree 5. A higher degree would be computed for nothing. The
# next rung takes four registers a step, compares the maximum once for all four, and keeps four sums. `p` is a row's
# address, and `W` is how many float32 a register holds. `load_four` loads four registers, `splat` fills one with a
# number, and `hmax` and `hsum` reduce one to a number.

# %%
show_source(steps.power.py_func, steps.zloss_registers.py_func)

# %% [markdown]
# ## In place
#
# Up to here the gradient goes into another array. A training step never reads the logits again, so the gradient may
# overwrite them: memory is read once and written once. The row stays in the *cache*, the small fast memory near the
# processor, while three loops walk over it. The powers overwrite the row, so each is computed once.

# %%
show_source(steps.zloss_in_place.py_func)

# %% [markdown]
# ## The whole ladder
#
# The last rung is the kernel that ships. It spares the pass for the largest logit: it takes off the target's logit, and
# looks for a larger one only where the sum of a block of logits comes near to overflow. First every rung is checked
# against float64. An error may be twice that of PyTorch's own operations, and a few units of rounding.

# %%
on_cpu = replace(steps.on_cpu(), timed=lambda: inputs)
worst = ladder.check(on_cpu)
print(
    f"largest error: {worst:.2f} of what is allowed. Blocks of {cpu.BLOCK:,}, whose sums stay below {cpu.LIMIT:.2g}\n"
)
times, limit = ladder.measure(on_cpu, inputs)
print(ladder.table(on_cpu, times, limit))

# %%
names, ms = [rung.name for rung in on_cpu.rungs], [1e3 * seconds for seconds in times]
fig, axes = plt.subplots(figsize=(8, 2.8))
axes.barh(names, ms, color=TEXT, height=0.6)
axes.axvline(1e3 * limit, color=IMAGE, linestyle="--")
axes.text(1e3 * limit, -0.7, f"a copy: {1e3 * limit:.2f} ms", color=IMAGE)
for number, value in enumerate(ms):
    axes.text(max(value, 1e3 * limit), number, f" {value:.3g} ms", va="center")  # right of the line
axes.set(xlabel="milliseconds of one thread", xlim=(0, 1.15 * max(ms)))
axes.invert_yaxis()
show(
    fig,
    "Bars of time: "
    + ", ".join(f"{n} {m:.3g} ms" for n, m in zip(names, ms, strict=True))
    + f"; a line marks a copy of the logits at {1e3 * limit:.2g} ms.",
)

# %% [markdown]
# Each bar is a rung, and the dashed line is the copy. Compiled loops alone are no gain: they compute one exponential at
# a time, which PyTorch does not. Registers are the largest step. The copy loads what it overwrites, so a rung in place
# may pass it. The last rung also takes bfloat16 and several threads; here it may gain nothing. Your times differ.
#
# The library decides which kernel runs, and explains it:

# %%
print(explain(CPU, torch.float32))
show_source(cpu.overwrite.function)

# %% [markdown]
# ## The lesson in five assertions
#
# None of them is about time, because machines differ.

# %%
# 1. Every rung is right, far from zero and with ignored rows, too
assert worst < 1
# 2. The plain formula ends where exp does; the shifted one does not
assert not plain.isfinite().all() and shifted.isfinite().all() and shifted.max() - shifted.min() < 1e-3
# 3. One pass finds what two passes find
assert abs(online - (4 + math.log(sum(math.exp(v - 4) for v in (2.0, 1.0, 4.0, 3.0))))) < 1e-12
# 4. An ignored row is exactly zero, whatever its logits
hard = torch.tensor([[1e4, -1e4], [-1e4, 1e4]]), torch.tensor([-1, 0]), 0.1, 1.0
for rung in on_cpu.rungs:
    cross_entropy, log_z, gradient = rung.function(*ladder.each_tensor(hard, torch.Tensor.clone))
    assert not any(v[0].any() for v in (cross_entropy, log_z, gradient)) and cross_entropy[1] == 2e4
# 5. The fast rungs need no memory but the logits'
place = logits.clone()
assert rungs["shipped"].function(place, *inputs[1:])[2].data_ptr() == place.data_ptr()

# %% [markdown]
# ## Exercises
#
# ### Write: the log of a sum in one pass
#
# `logits` is an iterable of floats that can be read once. Return the log of the sum of their exponentials. Some are
# -infinity, maybe the first, maybe all; some are as large as 10,000.


# %%
def log_sum_exp(logits):
    return ...


check("kernels_on_a_cpu.log_sum_exp", log_sum_exp)

# %% [markdown]
# ### Write: merge two parts of a row
#
# A part is (m, s): its largest logit, and the sum of exp(x - m). Return the (m, s) of two parts together. An empty part
# is (-infinity, 0).


# %%
def merge(a, b):
    return ...


check("kernels_on_a_cpu.merge", merge)

# %% [markdown]
# ### Predict: how many bytes?
#
# The library also has the loss as two functions: `forward` reads the logits, and later, when they have left the cache,
# `backward` reads them again and writes the gradient over them. For 4,096 rows of 65,536 bfloat16 logits (2 bytes
# each), how many bytes are read and written for the logits and their gradient in these two? How many in `overwrite`?

# %%
bytes_of_two_functions, bytes_of_overwrite = ..., ...
check("kernels_on_a_cpu.bytes_moved", (bytes_of_two_functions, bytes_of_overwrite))

# %% [markdown]
# ### Break: any shift will do
#
# "A shift need not be the largest logit, only near it. So take the first." On `row` that works. Find a list of at most
# 100 finite logits for which it is wrong, although the library's kernel is right.


# %%
def by_first(logits):
    x = torch.tensor(logits, dtype=torch.float32)
    return (x[0] + (x - x[0]).exp().sum().log()).item()


assert abs(by_first(row.tolist()) - row.logsumexp(0)) < 1e-4
bad_row = ...
check("kernels_on_a_cpu.bad_row", bad_row)

# %% [markdown]
# ## Where it is in the library
#
# `kernels/zloss/steps.py` is this ladder, `kernels/attention/steps.py` the one of attention, and `python` runs either.
# `kernels/zloss/cpu.py` ships; `kernels/cpu/simd.py` and `kernels/cpu/exp2.py` hold registers and the polynomial.
# `kernels/dispatch.py` decides which kernel runs. [docs/results/kernels.md](../docs/results/kernels.md) has times.
#
# Next: [lesson 9](09_kernels_on_a_gpu.ipynb) climbs the same ladder on a GPU, without one.
