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
    Mutant(
        "CIDEr without clipping",
        "evaluate/cider.py",
        "min(weight, r.get(x, 0.0))",
        "weight",
        "evaluate/test_cider.py",
    ),
    Mutant(
        "CIDEr counts captions for images",
        "evaluate/cider.py",
        "for x in {x for text in texts for x in all_ngrams(text)}",
        "for text in texts for x in set(all_ngrams(text))",
        "evaluate/test_cider.py",
    ),
    Mutant(
        "VQA's popular rule: three of ten are enough",
        "evaluate/vqa.py",
        "sum(same) - own for own in same",
        "sum(same) for own in same",
        "evaluate/test_vqa.py",
    ),
    Mutant(
        "answers are always normalized",
        "evaluate/vqa.py",
        "if len(set(references)) > 1:",
        "if True:",
        "evaluate/test_vqa.py",
    ),
    Mutant(
        "a value pairs with itself",
        "evaluate/agreement.py",
        " - np.diag(weighted.sum(0))",
        "",
        "evaluate/test_human_agreement.py",
    ),
    Mutant(
        "half of the votes are a majority",
        "evaluate/agreement.py",
        "2 * count > len(votes)",
        "2 * count >= len(votes)",
        "evaluate/test_human_agreement.py",
    ),
    Mutant(
        "nothing seen is impossible",
        "evaluate/intervals.py",
        "high = 1.0 if k == n else bisect(",
        "high = k / n if k in (0, n) else bisect(",
        "evaluate/test_intervals.py",
    ),
    Mutant(
        "a stop string that is split over two tokens is missed",
        "evaluate/writing.py",
        "start = max(0, len(self.data) - max(map(len, stops), default=0))",
        "start = len(self.data)",
        "evaluate/test_writing.py",
    ),
    Mutant(
        "a prompt that is too long loses its <s>",
        "evaluate/writing.py",
        "return [prompt[0], *prompt[n - room + 1 :]]",
        "return list(prompt[n - room :])",
        "evaluate/test_writing.py",
    ),
]
