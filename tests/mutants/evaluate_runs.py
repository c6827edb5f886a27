"""Bugs to plant in the machine that runs evaluations: log, header, runner, statistics, tables."""

from mutants.mutant import Mutant

LOG, RUNNER = "evaluate/test_evaluate_log.py", "evaluate/test_evaluate_runner.py"
MUTANTS = [
    Mutant(
        "a resumed log starts anywhere, not at a chunk",
        "evaluate/log.py",
        "lines[: len(lines) // chunk * chunk]",
        "lines",
        LOG,
    ),
    Mutant(
        "a log of another file is resumed",
        "evaluate/log.py",
        'if (line.id, line.hashes.get("content")) != (item.id, digest(content)):',
        "if line.id != item.id:",
        LOG,
    ),
    Mutant(
        "a torn line stays in the log",
        "evaluate/log.py",
        "os.truncate(path, sum(len(row) + 1 for row in rows[: min(n_rows, len(rows) - 1)]))",
        "pass",
        LOG,
    ),
    Mutant(
        "an item that could not be asked counts as wrong",
        "evaluate/results.py",
        "asked = [line for line in lines if PROBLEM not in line.output]",
        "asked = list(lines)",
        "evaluate/test_evaluate_table.py",
    ),
    Mutant(
        "other weights resume an evaluation",
        "evaluate/header.py",
        "sha.update(x.detach()",
        "(x.detach()",
        RUNNER,
    ),
    Mutant(
        "broken items end with exit code 0",
        "evaluate/runner.py",
        "faults.items += [",
        "_ = [",
        RUNNER,
    ),
    Mutant(
        "only the item that can be asked now is asked again, not its chunk",
        "evaluate/runner.py",
        "if len(left_out) < len(chunk):\n                    answers = task.answer(run, chunk, options)\n",
        "chunk = left_out\n",
        RUNNER,
    ),
    Mutant(
        "rare events take Wilson's interval",
        "evaluate/statistics.py",
        "if min(k, n - k) < RARE:",
        "if k < RARE:",
        "evaluate/test_evaluate_statistics.py",
    ),
    Mutant(
        "two runs are compared as if their items were not the same",
        "evaluate/statistics.py",
        "mean_interval([second - first for first, second in zip(a, b, strict=True)], seed)",
        "mean_interval([second - first for first, second in zip(sorted(a), b, strict=True)], seed)",
        "evaluate/test_evaluate_statistics.py",
    ),
    Mutant(
        "McNemar's test has one side",
        "evaluate/statistics.py",
        "min(1.0, 2 * at_least(most, n, 0.5))",
        "at_least(most, n, 0.5)",
        "evaluate/test_evaluate_statistics.py",
    ),
    Mutant(
        "runs over different items are compared",
        "evaluate/compare.py",
        "a[key].content != b[key].content",
        "a[key].id != b[key].id",
        "evaluate/test_evaluate_compare.py",
    ),
    Mutant(
        "names of files become tags of the page",
        "evaluate/table_html.py",
        "<text y={top + 15}>{html.escape(label)}</text>",
        "<text y={top + 15}>{label}</text>",
        "evaluate/test_evaluate_table.py",
    ),
]
