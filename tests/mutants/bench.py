"""Bugs to plant in bench/."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "memory is summed, not what is held",
        "bench/memory.py",
        'event["args"]["Bytes"])',
        'abs(event["args"]["Bytes"]))',
        "bench/test_bench_kernels.py",
    ),
    Mutant(
        "ratios upside down", "bench/rows.py", "taken[p] / taken[ours]", "taken[ours] / taken[p]", "bench/test_bench.py"
    ),
    Mutant(
        "norm vectors keep our order of pairs",
        "bench/engine.py",
        "half_split(each.flatten(), heads).view(heads, -1)",
        "each",
        "bench/test_bench.py",
    ),
]
