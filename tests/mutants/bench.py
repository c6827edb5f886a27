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
        "the host waits for the GPU after each job",
        "bench/measure.py",
        "times[name].append(timed(job, device))",
        "times[name].append(lambda seconds=timed(job, device)(): seconds)",
        "bench/test_bench.py",
    ),
    Mutant(
        "packed sequences are compared with transformers' unpacked ones",
        "bench/train.py",
        'name.startswith("nano") and "packed" not in name',
        'name.startswith("nano")',
        "bench/test_bench_train.py",
    ),
    Mutant(
        "a part that failed counts as finished",
        "bench/gpu/run.py",
        'or state[name]["result"] != "done"',
        "",
        "bench/test_gpu_command.py",
    ),
    Mutant(
        "a part that hangs is waited for",
        "bench/gpu/run.py",
        "process.wait(seconds)",
        "process.wait()",
        "bench/test_gpu_command.py",
    ),
    Mutant(
        "no part gets the time that later ones do not need",
        "bench/gpu/run.py",
        "min(max(limits[0], remaining - sum(limits[1:])), remaining)",
        "min(limits[0], remaining)",
        "bench/test_gpu_command.py",
    ),
    Mutant(
        "the output layer is proven with a bf16 weight",
        "bench/gpu_checks.py",
        "random(v, d, device=device, dtype=torch.float32) / d**0.5",
        "random(v, d, device=device, dtype=dtype) / d**0.5",
        "bench/test_prove.py",
    ),
    Mutant(
        "a dry run leaves a proof of the emulator",
        "bench/prove.py",
        "work, effort.limit, Path(folder))",
        "work, effort.limit, proof.proof_folder())",
        "bench/test_prove.py",
    ),
    Mutant(
        "figures of other variants fill a cell",
        "bench/gpu/page.py",
        "found = {(row.case, row.variant): (row, day) for row, day in measured}",
        "found = {(row.case, figures[name][1]): (row, day) for row, day in measured for name in figures}",
        "bench/test_gpu_command.py",
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
