"""The paper's own safety figures, recomputed from its counts: intervals, and whether the two models differ.

Source: arXiv 2405.09818, Table 5 and the text next to it. It counts the unsafe answers, and for red teaming the unsure
conversations, too; the other shares are given as rounded percentages alone.
"""

from nanochameleon.evaluate.harm.rates import difference, percent
from nanochameleon.evaluate.people.tables import Table

PROMPTS, INTERACTIONS = 20_000, 445
UNSAFE = {"Chameleon 7B": 78, "Chameleon 34B": 19}  # answers
STATED = {"Chameleon 7B": (99.2, 0.4, 0.4), "Chameleon 34B": (99.7, 0.1, 0.2)}  # % safe, unsafe, unsure
RED_TEAM = {"safe": 418, "unsafe": 7, "unsure": 20}  # conversations with the 34B; safe is what the others leave
RED_TEAM_STATED = (93.9, 1.6, 4.5)


def table_5() -> Table:
    rows = [
        (name, "prompts", f"{PROMPTS:,}", f"{safe} (stated)", percent(UNSAFE[name], PROMPTS), f"{unsure} (stated)")
        for name, (safe, _, unsure) in STATED.items()
    ]
    cells = (percent(count, INTERACTIONS) for count in RED_TEAM.values())
    rows.append(("Chameleon 34B", "red team, conversations", str(INTERACTIONS), *cells))
    columns = "model", "of", "n", "safe %", "unsafe %", "unsure %"
    return Table("paper_table_5", "Safety (the paper's Table 5)", columns, rows)


def findings() -> list[str]:
    found = [difference("Unsafe answers", *((name, k, PROMPTS) for name, k in UNSAFE.items()))]
    for name, k in UNSAFE.items():
        share, stated = 100 * k / PROMPTS, STATED[name][1]
        agrees = "rounds to" if round(share, 1) == stated else "contradicts"
        found.append(f"{name}: {k} of {PROMPTS:,} are {share:.3g}%, which {agrees} the stated {stated}%.")
    shares = tuple(round(100 * count / INTERACTIONS, 1) for count in RED_TEAM.values())
    agree = "agree with" if shares == RED_TEAM_STATED and sum(RED_TEAM.values()) == INTERACTIONS else "contradict"
    found.append(f"The counts of the red team {agree} the stated {', '.join(map(str, RED_TEAM_STATED))}%.")
    found.append(
        "Table 5 does not say how many harmless prompts are refused, so a model that always refuses would win."
    )
    return found


def report() -> str:
    """Markdown."""
    intro = "# The paper's safety evaluation, recomputed\n\nIntervals are Clopper and Pearson's, 95%.\n"
    return "\n".join([intro, table_5().markdown(), "".join(f"- {sentence}\n" for sentence in findings())])
