"""Bugs to plant in parallel/."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "all ranks read the same sequences",
        "parallel/mesh.py",
        "return slice(dp_rank * size, (dp_rank + 1) * size)",
        "return slice(0, size)",
        "parallel/test_mesh.py",
    ),
    Mutant(
        "Ctrl-C on rank 0 does not reach the others",
        "parallel/mesh.py",
        "except (Exception, KeyboardInterrupt) as problem",
        "except Exception as problem",
        "parallel/test_mesh.py",
    ),
    Mutant(
        "tensor parallel ranks do not sum QK-norm's gradients",
        "parallel/apply.py",
        "x.to_local(grad_placements=[Partial()])",
        "x.to_local()",
        "parallel/test_parallel_training.py",
    ),
]
