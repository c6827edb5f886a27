"""Bugs to plant in parallel/."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "all ranks read the same rows",
        "parallel/mesh.py",
        "return slice(which * each, (which + 1) * each)",
        "return slice(0, each)",
        "parallel/test_mesh.py",
    ),
    Mutant(
        "others do not hear of Ctrl-C",
        "parallel/mesh.py",
        "except (Exception, KeyboardInterrupt) as problem",
        "except Exception as problem",
        "parallel/test_mesh.py",
    ),
]
