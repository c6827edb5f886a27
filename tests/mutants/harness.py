"""lm-evaluation-harness on our engine."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "all samples of an item are one",
        "evaluate/text/harness_model.py",
        "*item, times[item]))",
        "*item))",
        "evaluate/test_harness.py",
    ),
    Mutant(
        "an answer begins in the user's turn",
        "evaluate/text/harness_model.py",
        "[*self.tok_encode(last.text), self.run.vocab.eot]",
        "self.tok_encode(last.text)",
        "evaluate/test_harness.py",
    ),
    Mutant(
        "windows of a long text are too short",
        "evaluate/text/harness_model.py",
        "self.prefix_token_id, self.max_length, 1",
        "self.prefix_token_id, self.max_length - 1, 1",
        "evaluate/test_harness.py",
    ),
    Mutant(
        "a missing image is not noticed",
        "evaluate/text/harness_model.py",
        "if len(images) != len(parts) - 1:",
        "if len(images) > len(parts) - 1:",
        "evaluate/test_harness.py",
    ),
    Mutant(
        "the questions are those of the validation split",
        "evaluate/text/harness_tasks.py",
        'self.config.get("test_split") or self.config["validation_split"]',
        'self.config.get("validation_split") or self.config["test_split"]',
        "evaluate/test_harness.py",
    ),
    Mutant(
        "every subject gets all questions",
        "evaluate/text/harness_tasks.py",
        "self.rows[task.set, split].get(task.subject, [])",
        "[row for rows in self.rows[task.set, split].values() for row in rows]",
        "evaluate/test_harness.py",
    ),
]
