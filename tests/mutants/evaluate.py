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
        "an answer that goes on is right",
        "evaluate/alignment.py",
        "if len(said) != len(exchange.answer):",
        "said = said[: len(exchange.answer)]\n    if len(said) != len(exchange.answer):",
        "data/test_alignment.py",
    ),
    Mutant("a tie is a hit", "evaluate/concepts.py", "(near < near[", "(near <= near[", "evaluate/test_concepts.py"),
    Mutant(
        "the gallery holds both styles",
        "evaluate/concepts.py",
        "members, asked = np.flatnonzero(styles == style)",
        "members, asked = np.flatnonzero(styles != '')",
        "evaluate/test_concepts.py",
    ),
    Mutant(
        "the ceiling is the wanted image itself",
        "evaluate/concepts.py",
        "other = dict(zip(STYLES.values(), reversed(STYLES.values()), strict=True))",
        "other = dict(zip(STYLES.values(), STYLES.values(), strict=True))",
        "evaluate/test_concepts.py",
    ),
    Mutant(
        "top 5 of 6", "evaluate/concepts.py", "np.mean(found < k)", "np.mean(found <= k)", "evaluate/test_concepts.py"
    ),
    Mutant(
        "weights may run code",
        "evaluate/concepts.py",
        "weights_only=True",
        "weights_only=False",
        "evaluate/test_concepts.py",
    ),
    Mutant(
        "images are judged by another caption",
        "evaluate/concepts.py",
        "source.numbers[i] for i in asked",
        "source.numbers[i] for i in sorted(asked)",
        "evaluate/test_concepts.py",
    ),
    Mutant(
        "a letter that the font lacks is a box",
        "evaluate/report_html.py",
        "ord(c) in letters or c.isspace()",
        "True",
        "evaluate/test_report.py",
    ),
]
