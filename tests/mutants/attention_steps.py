"""Bugs to plant in attention's ladders."""

from mutants.mutant import Mutant

CPU, CUDA, TEST = "kernels/attention/steps.py", "kernels/attention/steps.cu", "kernels/test_attention_steps.py"

MUTANTS = [
    Mutant("a larger score leaves the sum as it was", CPU, "                total *= rescale\n", "", TEST),
    Mutant(
        "a tile's maximum leaves the values as they were",
        CPU,
        "    for e in range(e_):\n        out[e] *= rescale\n",
        "",
        TEST,
    ),
    Mutant("a tile shows the key after a query's own", CPU, "if j + x <= i and", "if j + x <= i + 1 and", TEST),
    Mutant("a tile shows all documents", CPU, " and docs[j + x] == docs[i] else", " else", TEST),
    Mutant(
        "a tile of two documents is left out for one",
        CPU,
        "if first <= doc_ids[b, i] <= last:",
        "if doc_ids[b, i] == first:",
        TEST,
    ),
    Mutant("a score's gradient without its sum", CPU, "(d_weights[j] - d)", "d_weights[j]", TEST),
    Mutant(
        "a thread walks over the keys of all documents",
        CUDA,
        "  for (int j = doc_start[b * t + i]; j <= i; j++) {\n    const u32 *k_row",
        "  for (int j = 0; j <= i; j++) {\n    const u32 *k_row",
        TEST,
    ),
    Mutant(
        "a warp's sum keeps the scale of an older maximum",
        CUDA,
        "    for (int n = 0; n < E / 32; n++) o.x[n] *= rescale;\n    add(o, p,",
        "    add(o, p,",
        TEST,
    ),
    Mutant(
        "a shared tile is read before it is whole",
        CUDA,
        "    __syncthreads();\n    // 2. A lane",
        "    // 2. A lane",
        TEST,
    ),
    Mutant(
        "a shared tile is overwritten while it is read",
        CUDA,
        "    __syncthreads();  // all have read the tile\n",
        "",
        TEST,
    ),
    Mutant(
        "a lane takes the key before its document",
        CUDA,
        "starts[i] <= from + lane",
        "starts[i] <= from + lane + 1",
        TEST,
    ),
    Mutant("a tile for tensor cores is not waited for", CUDA, "cp_async_wait<0>();", "cp_async_wait<1>();", TEST),
    Mutant("tensor cores see one ahead", CUDA, "key <= q_pos[r]", "key <= q_pos[r] + 1", TEST),
    Mutant("a query's gradient is that of one key", CUDA, "j <= here; j++", "j <= doc_start[b * t + here]; j++", TEST),
]
