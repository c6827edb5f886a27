"""Bugs to plant in kernels for amx."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "on tiles, the diagonal sees one ahead",
        "kernels/cpu/amx/attention.py",
        "return ahead + c if c < nk",
        "return ahead + c - 1 if c < nk",
        "kernels/test_qknorm_rope_attention.py",
    ),
    Mutant(
        "on tiles, keys behind a run's end are seen",
        "kernels/cpu/amx/attention.py",
        "if c < nk else BLOCK",
        "if c < BLOCK else BLOCK",
        "kernels/test_qknorm_rope_attention.py",
    ),
    Mutant(
        "on tiles, an earlier run of the document is forgotten",
        "kernels/cpu/amx/attention.py",
        "if same_document(doc_ids, run, start):",
        "if run == start:",
        "kernels/test_qknorm_rope_attention.py",
    ),
    Mutant(
        "on tiles, scores are trusted to be bounded",
        "kernels/cpu/amx/attention.py",
        "longest_k * longest_q < MAX_SCORE * MAX_SCORE",
        "longest_q >= ZERO",
        "kernels/test_qknorm_rope_attention.py",
    ),
    Mutant(
        "memory behind the last key is not cleared",
        "kernels/cpu/amx/attention.py",
        "for i in range(0, padded(job.t), BLOCK)",
        "for i in range(0, job.t, BLOCK)",
        "kernels/test_qknorm_rope_attention.py",
    ),
    Mutant(
        "pairs hold one row twice",
        "kernels/cpu/amx/tiles.py",
        "b.lshr(_nearest(b, x)",
        "b.lshr(_nearest(b, y)",
        "kernels/test_qknorm_rope_attention.py",
    ),
    Mutant(
        "on tiles, a pair is turned the other way",
        "kernels/cpu/amx/qknorm_rope.py",
        "x * cos - y * sin, y * cos + x * sin",
        "x * cos + y * sin, y * cos - x * sin",
        "kernels/test_qknorm_rope_attention.py",
    ),
    Mutant(
        "on tiles, a bias has its neighbour's gradient",
        "kernels/cpu/amx/qknorm_rope.py",
        "add(bias + 4 * W, h)",
        "add(bias + 4 * W, g)",
        "kernels/test_qknorm_rope_attention.py",
    ),
    Mutant(
        "on tiles, one tile's norm gradients are kept for the next head",
        "kernels/cpu/amx/attention.py",
        "            clear(at.norm, 2 * W * width)\n",
        "",
        "kernels/test_qknorm_rope_attention.py",
    ),
    Mutant(
        "each span of rows starts a weight's gradient anew",
        "kernels/cpu/amx/weight_gradient.py",
        "if k == 0:",
        "if True:",
        "kernels/test_weight_gradient.py",
    ),
    Mutant(
        "the margin of a block holds anything",
        "kernels/cpu/amx/tiles.py",
        "    clear(spare, SQUARE // 4)\n",
        "",
        "kernels/test_weight_gradient.py",
    ),
    Mutant(
        "rows of half words are taken for rows of words",
        "kernels/cpu/amx/tiles.py",
        " and row % 4 == 0:",
        ":",
        "kernels/test_qknorm_rope_attention.py",
    ),
    Mutant(
        "tiles for weights' gradients where nobody asked",
        "kernels/block/linear.py",
        'name == "amx", *weights',
        "True, *weights",
        "kernels/test_weight_gradient.py",
    ),
    Mutant(
        "tiles where there are none",
        "kernels/dispatch.py",
        "if op in AMX_OPS and why_amx_unavailable(device, dtype) is None:",
        "if op in AMX_OPS and dtype == torch.bfloat16:",
        "kernels/test_dispatch.py",
    ),
]
