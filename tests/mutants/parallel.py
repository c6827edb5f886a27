"""Bugs to plant in parallel/."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "all ranks read the same rows",
        "parallel/mesh.py",
        "return slice(dp_rank * size, (dp_rank + 1) * size)",
        "return slice(0, size)",
        "parallel/test_mesh.py",
    ),
    Mutant(
        "others do not hear of Ctrl-C",
        "parallel/mesh.py",
        "except (Exception, KeyboardInterrupt) as problem",
        "except Exception as problem",
        "parallel/test_mesh.py",
    ),
    Mutant(
        "ranks with parts of a layer do not sum QK-norm's gradients",
        "parallel/apply.py",
        "x.to_local(grad_placements=[Partial()])",
        "x.to_local()",
        "parallel/test_mesh.py",
    ),
]
