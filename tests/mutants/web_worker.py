"""Bugs in the worker of the page: what clients get, and what each may cost the others."""

from mutants.mutant import Mutant

WORKER = "web/test_worker.py"
MUTANTS = [
    Mutant(
        "after a crash, clients get once more what they have",
        "web/batch.py",
        "return output.tokens[n:]",
        "return output.tokens",
        WORKER,
    ),
    Mutant(
        "a repetition that differs is not noticed",
        "web/batch.py",
        "if list(output.tokens[:n]) != self.replayed[:n] or",
        "if False or",
        WORKER,
    ),
    Mutant(
        "after a crash all requests run together again",
        "web/batch.py",
        "self.suspects.update(lost)",
        "self.suspects.clear()",
        WORKER,
    ),
    Mutant(
        "an image that cannot be decoded fails all that are decoded with it",
        "web/batch.py",
        "return [error] if len(codes) == 1 else [each for one in codes for each in self.decode_each([one])]",
        "return [error] * len(codes)",
        WORKER,
    ),
    Mutant(
        "a client that leaves keeps its slots",
        "web/batch.py",
        "self.engine.cancel(sample.id)",
        "pass",
        f"{WORKER} web/test_leaving.py",
    ),
    Mutant(
        "a client that nobody holds never leaves",
        "web/worker.py",
        "__del__ = leave",
        "keep = leave",
        WORKER,
    ),
    Mutant(
        "calls run as long as there are any",
        "web/worker.py",
        "while self.calls and (self.lead <= 0 or not (self.batch.busy or self.jobs)):",
        "while self.calls:",
        WORKER,
    ),
    Mutant(
        "previews take whatever time they can get",
        "web/batch.py",
        "if start < self.next_preview or not watched:",
        "if not watched:",
        WORKER,
    ),
    Mutant(
        "a slow reader loses text",
        "web/outbox.py",
        "return Text(old.text + new.text)",
        "return new",
        "web/test_outbox.py",
    ),
    Mutant(
        "all samples of a request are the same",
        "web/talk.py",
        "return [dataclasses.replace(request, seed=(seed, i)) for i in range(n)]",
        "return [request] * n",
        "web/test_talk.py",
    ),
]
