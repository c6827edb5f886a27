"""Bugs in the worker of the page: what clients get, and what each may cost the others."""

from mutants.mutant import Mutant

WORKER, CRASHES = "web/test_worker.py", "web/test_worker_crashes.py"
MUTANTS = [
    Mutant(
        "an image that cannot be decoded fails all that are decoded with it",
        "web/batch.py",
        "return [error] if len(codes) == 1 else [each for one in codes for each in self.decode_each([one])]",
        "return [error] * len(codes)",
        CRASHES,
    ),
    Mutant(
        "a client that leaves keeps its slots",
        "web/batch.py",
        "self.engine.cancel(sample.id)",
        "pass",
        f"{WORKER} web/test_leaving.py",
    ),
    Mutant(
        "calls run as long as there are any",
        "web/worker.py",
        "due = self.lead <= 0 or not (self.batch.busy or self.jobs)",
        "due = True",
        WORKER,
    ),
]
