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
    Mutant(
        "only the band before a tensor is looked at",
        "bench/bands.py",
        "torch.cat([buffer[:BAND], buffer[-BAND:]])",
        "buffer[:BAND]",
        "bench/test_prove.py",
    ),
    Mutant(
        "a kernel may change its inputs",
        "bench/gpu_checks.py",
        "if not same(inputs[name], problem.inputs[name]):",
        "if False:",
        "bench/test_prove.py",
    ),
    Mutant(
        "memory starts as zeros",
        "bench/bands.py",
        "POISON = 0xFF",
        "POISON = 0x00",
        "bench/test_prove.py",
    ),
    Mutant(
        "after a failure no other kernel is proven",
        "bench/prove.py",
        "    names = list(names)\n    while names:",
        "    names = list(names)\n    if names:",
        "bench/test_prove.py",
    ),
]
