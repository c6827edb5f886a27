# %% [markdown]
# # What does a GPU's kernel do, when there is no GPU?
# This lesson reads and runs kernels in CUDA C on a CPU. An emulator runs their threads one by one and reports who
# disturbs whom. It takes 25 minutes to read; its cells run in half a minute.
#
# - One number known beforehand
# - The smallest kernel
# - Break it: a barrier removed
# - Which thread reads which number
# - The loss, rung by rung
# - Attention, rung by rung
# - The same on a GPU
# - What this lesson states
# - Exercises
# - Where it is in the library

# %% [markdown]
# ## One number known beforehand
# Adding 256 numbers one by one takes 255 additions, one after the other. A GPU has thousands of threads. Let 128 of
# them add one pair each, then 64 add the pairs of those sums, and so on. How many rounds does it take? Each round
# halves the numbers, and 256 = 2^8.

# %%
import shutil

if shutil.which("g++") is None:
    print("This lesson compiles kernels with g++, which is missing here: install it first.")

numbers, rounds = 256, 0
while numbers > 1:
    numbers, rounds = numbers // 2, rounds + 1
print(rounds, "rounds instead of 255 additions in a row")

# %% [markdown]
# ## The smallest kernel
# A kernel is one function that many threads run at once. Threads come in blocks. `threadIdx.x` is a thread's number in
# its block, and `blockIdx.x` the block's number. The threads of a block have some fast memory in common, marked
# `__shared__`. At `__syncthreads()`, a barrier, each thread waits until all of the block are there.

# %%
SUM = """
extern "C" __global__ void tree_sum(const float* x, float* sum) {
  __shared__ float part[256];
  int t = threadIdx.x;
  part[t] = x[t];
  for (int half = blockDim.x / 2; half; half /= 2) {
    __syncthreads();
    if (t < half) part[t] += part[t + half];
  }
  if (t == 0) sum[0] = part[0];
}
"""

# %% [markdown]
# `emulated_kernel` compiles this text with g++ and takes the same call as CuPy, the package that runs kernels on a
# GPU: blocks, threads a block, arguments. The numbers 0 to 255 sum to 255 * 256 / 2 = 32,640.

# %%
import torch

from nanochameleon.kernels.gpu.emulator.kernel import emulated_kernel
from nanochameleon.kernels.gpu.emulator.source import EmulatorError

x, total = torch.arange(256.0), torch.zeros(1)
emulated_kernel(SUM, "tree_sum")((1,), (256,), (x, total))
print(total.item(), 255 * 256 // 2)

# %%
import matplotlib.pyplot as plt
from small import show

fig, axes = plt.subplots(figsize=(8, 3.2))
for step, half in enumerate((4, 2, 1)):
    for t in range(half):
        axes.plot([t, t], [-step, -step - 1], "-", color="#2a6fb0")
        axes.plot([t + half, t], [-step, -step - 1], "--", color="#d2622a")
for step, width in enumerate((8, 4, 2, 1)):
    for t in range(width):
        axes.text(t, -step, f"part[{t}]", ha="center", va="center", bbox={"fc": "white", "ec": "#8a8a8a"})
    if step:
        axes.text(7.6, -step + 0.5, f"round {step}", va="center")
axes.set(xlim=(-0.6, 8.6), ylim=(-3.4, 0.4))
axes.axis("off")
show(fig, "A tree over eight numbers: in round 1 threads 0 to 3 add the number four places on, then two, then one.")

# %% [markdown]
# The figure has 8 numbers: solid is a thread's own, dashed the one that it adds. Round 2 reads what others wrote in
# round 1, so a barrier must separate them.
#
# ## Break it: a barrier removed
# Without it a GPU may still give 32,640. A fault that depends on who is first is a *race*. The emulator notes
# who wrote and read each byte last, and whether a barrier came between. It also runs the threads in two orders.


# %%
def report(source, name, *arguments, threads=256):
    try:
        emulated_kernel(source, name)((1,), (threads,), arguments)
        return "no mistake found"
    except EmulatorError as mistake:
        return str(mistake)


broken = SUM.replace("    __syncthreads();\n", "")
race = report(broken, "tree_sum", x, total)
print(race.replace(", and", ",\nand"))

# %% [markdown]
# The report names two threads, the byte, and both lines. A float has 4 bytes, so byte 4 is part[1]. Three other
# mistakes are reported in the same way. The last of them needs two terms: the hardware runs 32 threads together, a
# *warp*, and each of them is a *lane*. `__syncwarp()` is a barrier of one warp. The tree's first rounds add numbers of
# other warps, so that barrier is not enough.

# %%
faults = {
    "wrong index": SUM.replace("= x[t]", "= x[t + 1]"),
    "never written": SUM.replace("part[t] = x[t]", "if (t < 100) part[t] = x[t]"),
    "one warp's barrier": SUM.replace("__syncthreads", "__syncwarp"),
}
found = {name: report(source, "tree_sum", x, total) for name, source in faults.items()}
for name, sentence in found.items():
    print(f"{name}: {sentence.split(': ', 1)[1]}\n")

# %% [markdown]
# ## Which thread reads which number
# Memory comes in pieces of 32 bytes, 8 floats. A warp that reads 32 neighbouring floats needs 4 pieces: its reads are
# *coalesced*. If each thread has a row of its own, neighbours read addresses a row apart, and each read brings a piece
# of which one float is used: the reads are *strided*.


# %%
def pieces(floats):
    """How many pieces of 32 bytes hold these floats, given by their index."""
    return len({i * 4 // 32 for i in floats})


lanes, row = range(32), 1_000
coalesced, strided = pieces(lanes), pieces(lane * row for lane in lanes)
print("neighbours:", coalesced, "pieces;  a row apart:", strided, "pieces")

# %%
fig, axes = plt.subplots(2, 1, figsize=(8, 2.8))
for ax, step, name in zip(
    axes, (1, 8), ("coalesced: thread t reads x[t]", "strided: thread t reads x[8 t]"), strict=True
):
    for i in range(32):
        read = i % step == 0 and i // step < 4
        ax.add_patch(plt.Rectangle((i, 0), 1, 1, fc="#2a6fb0" if read else "white", ec="#8a8a8a"))
        if read:
            ax.text(i + 0.5, 0.5, i // step, ha="center", va="center", color="white")
    for i in range(0, 33, 8):
        ax.plot([i, i], [-0.25, 1.25], "k-", linewidth=2)
    ax.set(xlim=(-0.2, 32.2), ylim=(-0.4, 1.4), title=name)
    ax.axis("off")
show(fig, "Two rows of 32 floats in four pieces. Coalesced: threads 0 to 3 share a piece. Strided: each has its own.")

# %% [markdown]
# A box is a float, a number in it its reader, a thick line a piece's border. Four coalesced threads touch one piece,
# four strided ones four.
#
# ## The loss, rung by rung
# A kernel has a ladder, as in lesson 8: versions from plain to fast. The loss is cross-entropy with z-loss (lesson 6):
# log Z of a row of logits, minus the right token's logit. Rung 1 gives each thread a row, so its reads are strided.

# %%
from IPython.display import Markdown, display

from nanochameleon.kernels import ladder
from nanochameleon.kernels.zloss import steps as zloss


def show_cuda(rung, first, last):
    """Show lines of a rung, from the one that holds `first` to the one that holds `last`."""
    lines = rung.source.splitlines()
    begin = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i in range(begin, len(lines)) if last in lines[i])
    display(Markdown("```cpp\n" + "\n".join(lines[begin : end + 1]) + "\n```"))


thread_a_row, block_a_row, warps, _ = zloss.on_gpu(ladder.emulator_kernel, torch.device("cpu")).rungs
show_cuda(thread_a_row, "int row", "log_z[row]")

# %% [markdown]
# `accumulate` keeps m, the largest logit so far, and s, the sum of exp(x - m): lesson 8's online softmax. Rung 2
# gives a row to a whole block. Thread t takes logits t, t + 256, and so on: coalesced. Then comes our tree.

# %%
show_cuda(block_a_row, "float m = LOWEST", "float z")

# %% [markdown]
# Rung 3 replaces most of the tree. In a shuffle, the lanes of a warp exchange registers without shared memory. With
# `__shfl_xor_sync(mask, value, 16)` lane t receives the value of lane t XOR 16. The mask names the lanes that take
# part: ~0u is all 32. Five shuffles later, each lane has the whole warp's result.

# %%
show_cuda(warps, "__device__ void merge_warp", "}")

fig, axes = plt.subplots(figsize=(8, 2.6))
for step, distance in enumerate((4, 2, 1)):
    for t in range(8):
        axes.plot([t, t], [-step, -step - 1], "-", color="#2a6fb0")
        axes.plot([t ^ distance, t], [-step, -step - 1], "--", color="#d2622a", linewidth=1)
    axes.text(7.5, -step - 0.5, f"XOR {distance}", va="center")
for step in range(4):
    for t in range(8):
        axes.text(t, -step, f"lane {t}", ha="center", va="center", bbox={"fc": "white", "ec": "#8a8a8a"})
axes.set(xlim=(-0.6, 8.4), ylim=(-3.4, 0.4))
axes.axis("off")
show(
    fig, "Eight lanes exchange with the lane 4 away, then 2, then 1; after three shuffles each lane has seen all eight."
)

# %% [markdown]
# In the figure, with 8 lanes, a solid line is a lane's own value, a dashed line the one that it receives. After three
# shuffles each lane has met all eight. All three rungs run in the emulator and agree with the formula in float64:


# %%
def error(rung, problem, reference):
    results = rung.function(*ladder.each_tensor(problem, torch.Tensor.clone))
    truth = reference(*ladder.in_float64(problem))
    return max((a.double() - b).abs().max().item() for a, b in zip(results, truth, strict=True))


problem = zloss.inputs(5, 1_000)
loss_errors = [error(rung, problem, zloss.formula) for rung in (thread_a_row, block_a_row, warps)]
print("largest error of each rung:", *(f"{e:.1e}" for e in loss_errors))

# %% [markdown]
# ## Attention, rung by rung
# Rung 1 gives a thread one query, and rung 2 a warp. In rung 3, 16 warps share tiles of 32 keys in shared memory. Each
# lane scores a whole key. Then the warp takes one maximum and one sum for all 32: the online softmax again, with powers
# of 2. A word holds two bfloat16 numbers, low and high. They have 8 bits of precision, so errors near 0.01 are
# rounding.

# %%
from nanochameleon.kernels.attention import steps as attention

forward = attention.on_gpu(ladder.emulator_kernel, torch.device("cpu"))[0]
show_cuda(forward.rungs[2], "// 2. A lane", "row_sum =")
problem = max(forward.problems(), key=lambda inputs: inputs[0].numel())
print("q, k, v:", *(tuple(x.shape) for x in problem[:3]))
attention_errors = [error(rung, problem, forward.reference) for rung in forward.rungs[:4]]
for rung, e in zip(forward.rungs, attention_errors, strict=False):
    print(f"{rung.name:15} {e:.1e}   {rung.change}")

# %% [markdown]
# Rung 4 hands tiles to tensor cores, which multiply 16 x 16 numbers by 16 x 8 in one instruction, `mma`. The 32 lanes
# hold each matrix together. Which lane holds which number of the result? Multiply the identity by the numbers 0 to
# 127, and let each lane say what it has got:

# %%
WHO = """#include "bf16.cuh"
extern "C" __global__ void who(float* holder) {
  int group = threadIdx.x / 4, k = threadIdx.x % 4 * 2;
  auto one = [&](int row, int column) { return pack_bf16(row == column, row == column + 1); };
  auto number = [&](int row) { return pack_bf16(8 * row + group, 8 * (row + 1) + group); };
  u32 a[4] = {one(group, k), one(group + 8, k), one(group, k + 8), one(group + 8, k + 8)};
  float c[4] = {};
  mma(c, a, number(k), number(k + 8));
  for (int i = 0; i < 4; i++) holder[(int)c[i]] = threadIdx.x;
}"""
holder = torch.zeros(16, 8)
emulated_kernel(WHO, "who")((1,), (32,), (holder,))
fig, axes = plt.subplots(figsize=(6, 4.2))
for n, lane in enumerate(holder.flatten().int().tolist()):
    axes.text(n % 8, n // 8, lane, ha="center", va="center")
axes.set(xlim=(-0.5, 7.5), ylim=(15.5, -0.5), xlabel="column", ylabel="row", yticks=range(16))
show(fig, "The lane of each number of 16 x 8: lane 0 has columns 0 and 1 of rows 0 and 8; four lanes share a row.")

# %% [markdown]
# The figure shows each number's lane: two neighbours in a row, and two in the row 8 below. Four lanes share a row, so
# its maximum takes two shuffles.
#
# A query sees its own document up to itself (lesson 3). What if that mask is wrong? No thread disturbs another, and
# each address is right. So the emulator has nothing to report. The comparison finds it: here a query also sees the
# documents before its own.

# %%
from functools import partial

file = ladder.launch.KERNELS / "attention" / "steps.cu"
wrong = file.read_text().replace("int j = doc_start[b * t + i]; j <= i", "int j = 0; j <= i")
kernels = {"right mask": file, "wrong mask": wrong}
q, k, v = (torch.randn(1, 8, 1, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3))
starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3]], dtype=torch.int32)  # documents 0-2 and 3-7
outs = {}
for name, source in kernels.items():
    kernel = emulated_kernel(source, "thread_a_query_64")
    launch = partial(attention.forward_on_gpu, {64: kernel}, 64, 64, 0)
    outs[name] = launch(q, k, v, starts)[0].float()
differs = (outs["right mask"] - outs["wrong mask"]).abs().amax((0, 2, 3)) > 0.05
print("queries that differ:", differs.nonzero().flatten().tolist())

# %% [markdown]
# ## The same on a GPU
# This cell needs a GPU and CuPy. The same files, with the same call, go through CuPy, and the table shows
# what each rung buys there. The emulator knows nothing of time.

# %%
missing = ladder.why_no_gpu()
if missing is None:
    ladder.climb(zloss.on_gpu(ladder.gpu_kernel, torch.device("cuda")), torch.cuda.get_device_name())
else:
    print(f"Not run, since {missing}. Otherwise this cell prints the ladder's table.")

# %% [markdown]
# ## What this lesson states

# %%
assert total.item() == 32_640 and rounds == 8 and strided == 8 * coalesced
assert "race" in race and "part[t + half]" in race
assert all(word in found[name] for name, word in zip(found, ("out of bounds", "uninitialised", "race"), strict=True))
assert max(loss_errors) < 1e-4 and max(attention_errors) < 0.05
assert not differs[:3].any() and differs[3:].all()

# %% [markdown]
# ## Exercises
# ### Write: the largest number
# Write a kernel `largest(const float* x, float* y)` for one block of 256 threads: y[0] becomes the largest of the 256
# numbers of x. Return its text. The check runs it in the emulator, so a race does not pass. `fmaxf(a, b)` is the
# larger of two.


# %%
def my_largest():
    return ...


from checks import check

check("kernels_on_a_gpu.largest", my_largest)

# %% [markdown]
# ### Predict: five apart
# Thread t of a warp reads float 5 t. How many pieces of 32 bytes does the warp touch? The array starts at a piece.

# %%
check("kernels_on_a_gpu.five_apart", ...)

# %% [markdown]
# ### Break: a tree that loses numbers
# `tree_sum` is right for 256 threads. Give a number of threads, from 2 to 256, for which the emulator finds no mistake
# and the sum is wrong.

# %%
check("kernels_on_a_gpu.lost_numbers", ...)

# %% [markdown]
# ## Where it is in the library
# [kernels/README.md](../kernels/README.md) says how to read the kernels, and [its emulator's
# page](../kernels/gpu/emulator/README.md) how to run your own. The ladders are
# [zloss/steps.cu](../kernels/zloss/steps.cu) and [attention/steps.cu](../kernels/attention/steps.cu). Next: [lesson
# 10](10_beyond_one_machine.ipynb) leaves the one machine.
