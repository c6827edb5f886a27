"""Bugs to plant in evaluate/."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "the oracle guesses",
        "evaluate/oracle.py",
        "if left[best] > TOLERANCE * energy[best]:",
        "if False:",
        "evaluate/test_oracle.py",
    ),
    Mutant(
        "the report looks at what was trained on",
        "evaluate/held_out.py",
        "run.cfg.data.path / TEST",
        'run.cfg.data.path / "pairs"',
        "data/test_prepared.py",
    ),
    Mutant(
        "an answer with more after it is correct",
        "evaluate/alignment.py",
        "if len(said) != len(exchange.answer):",
        "said = said[: len(exchange.answer)]\n    if len(said) != len(exchange.answer):",
        "data/test_alignment.py",
    ),
    Mutant(
        "a letter that the font lacks is a box",
        "evaluate/samples.py",
        "ord(c) in letters or c.isspace()",
        "True",
        "evaluate/test_report.py",
    ),
]
