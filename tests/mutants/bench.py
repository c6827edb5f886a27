"""Bugs to plant in bench/."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "memory is summed, not what is held",
        "bench/measure.py",
        'event["args"]["Bytes"])',
        'abs(event["args"]["Bytes"]))',
        "bench/test_bench_kernels.py",
    ),
    Mutant(
        "ratios upside down",
        "bench/rows.py",
        "seconds[peer] / seconds[ours]",
        "seconds[ours] / seconds[peer]",
        "bench/test_bench.py",
    ),
]
