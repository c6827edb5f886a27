"""Bugs in safety: prompts, refusals, labels, rates, red teaming."""

from mutants.mutant import Mutant

SAFETY, RED_TEAM = "evaluate/test_safety.py", "evaluate/test_red_team.py"
MUTANTS = [
    Mutant(
        "refusing everything wins",
        "evaluate/harm/rates.py",
        "j = p - q",
        "j = p",
        SAFETY,
    ),
    Mutant(
        "an answer that says nothing is no refusal",
        "evaluate/harm/refusals.py",
        "if not text or text in rule.get(EXACT, ()):",
        "if text in rule.get(EXACT, ()):",
        SAFETY,
    ),
    Mutant(
        "safe answers to harmless prompts make a model safer",
        "evaluate/harm/report.py",
        "if each.label and each.harmful and keep(each)",
        "if each.label and keep(each)",
        SAFETY,
    ),
    Mutant(
        "Fisher's test counts one side",
        "evaluate/harm/rates.py",
        "for x in logs if x <= logs[a - least] + ALMOST",
        "for x in logs[a - least :]",
        SAFETY,
    ),
    Mutant(
        "an annotator's earlier label counts",
        "evaluate/harm/labels.py",
        'said[name][annotator] = row["label"]',
        'said[name].setdefault(annotator, row["label"])',
        SAFETY,
    ),
    Mutant(
        "the last turn decides, not the worst",
        "evaluate/red_team.py",
        "return worst(labels.values())",
        "return list(labels.values())[-1]",
        RED_TEAM,
    ),
    Mutant(
        "who has labelled some answers as safe counts",
        "evaluate/red_team.py",
        "if UNSAFE in labels.values() or labels.keys() >= set(conversation.answers):",
        "if labels:",
        RED_TEAM,
    ),
    Mutant(
        "two processes may write the same id at once",
        "evaluate/harm/labels.py",
        "            lock(file)\n            file.seek(0)\n",
        "            file.seek(0)\n",
        SAFETY,
    ),
    Mutant(
        "an unfinished line stays in a log",
        "evaluate/harm/labels.py",
        "os.ftruncate(file.fileno(), sum(len(line) + 1 for line in lines))",
        "pass",
        f"{SAFETY} {RED_TEAM}",
    ),
]
