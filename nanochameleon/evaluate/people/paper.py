"""The paper's own counts of human votes, recomputed: what they say, and where the paper contradicts itself.

Source: arXiv 2405.09818, section 4 and appendix: Tables 4 and 9 to 14. Its votes are not published, so its alphas
cannot be recomputed.
"""

from nanochameleon.evaluate.agreement import win_rate
from nanochameleon.evaluate.people.tables import Table, rate, verdict

N_PROMPTS = {"mixed-modal": 441, "text-only": 607}
PAIRS = {  # Chameleon against: wins, ties, losses; the win rates of mixed-modal and text-only prompts in %
    "Gemini+": ((435, 362, 251), (60.4, 57.6)),
    "GPT-4V+": ((375, 331, 342), (47.3, 54.7)),
    "Gemini": ((561, 327, 160), (68.4, 69.7)),
    "GPT-4V": ((482, 329, 237), (57.5, 64.7)),
}
AGREEMENT = {  # Table 4: all agree, two agree, none
    "Gemini+": (331, 609, 108), "GPT-4V+": (371, 579, 98), "Gemini": (317, 621, 110), "GPT-4V": (300, 611, 137),
}  # fmt: skip
STATED_OVERALL = 60.4  # % of wins against Gemini+, in the abstract, the introduction and section 4.2
FULFILLED = {"Chameleon": 55.2, "Gemini+": 37.6, "GPT-4V+": 44.7, "Gemini": 17.6, "GPT-4V": 23.1}  # % of all prompts
BY_MODALITY = {  # Table 10: mixed-modal, text-only
    "Chameleon": (55.3, 57.7), "Gemini+": (39.2, 36.4), "GPT-4V+": (42.6, 46.1), "Gemini": (19.7, 18.3),
    "GPT-4V": (24.3, 23.6),
}  # fmt: skip
BY_TASK = {  # Table 9: prompts in the released file, % that Chameleon fulfils
    "Advice": (107, 69.2), "Comparison": (101, 60.4), "Article": (32, 59.4), "Brainstorming": (195, 57.9),
    "Hypothetical": (59, 55.9), "Identification": (97, 55.7), "Explanation": (151, 53.0), "How-to": (131, 52.7),
    "Reasoning": (22, 50.0), "Report": (57, 49.1), "Other": (55, 41.8), "Story": (41, 31.7),
}  # fmt: skip
ROUNDING = 0.1  # %: a mean of rounded figures and a rounded figure differ by less


def weighted(figures: tuple[float, float]) -> float:
    """The mean over all prompts of a figure for mixed-modal prompts and one for text-only prompts."""
    sizes = N_PROMPTS.values()
    return sum(n * figure for n, figure in zip(sizes, figures, strict=True)) / sum(sizes)


def by_task_mean() -> float:
    return sum(n * figure for n, figure in BY_TASK.values()) / sum(n for n, _ in BY_TASK.values())


def tables() -> list[Table]:
    wins = [(name, *map(str, counts), rate(*counts), verdict(*counts)) for name, (counts, _) in PAIRS.items()]
    header = "Chameleon against", "wins", "ties", "losses", "win rate %, 95% interval", "Chameleon is"
    agree = [(name, *map(str, AGREEMENT[name])) for name in PAIRS]
    fulfilled = [
        (name, f"{stated:.1f}", *(f"{part:.1f}" for part in BY_MODALITY[name]), f"{weighted(BY_MODALITY[name]):.1f}")
        for name, stated in FULFILLED.items()
    ]
    by_task = [(name, str(n), f"{figure:.1f}") for name, (n, figure) in BY_TASK.items()]
    by_task.append(("mean over prompts", str(sum(n for n, _ in BY_TASK.values())), f"{by_task_mean():.2f}"))
    return [
        Table("paper_wins", "Win rates, recomputed (the paper's Tables 11 to 14)", header, wins),
        Table("paper_table_4", "Agreement (Table 4)", ("pair", "all agree", "two agree", "none"), agree),
        Table("paper_table_9", "Tasks that Chameleon fulfils (Table 9)", ("task", "prompts", "%"), by_task),
        Table(
            "paper_table_10",
            "Fulfilment in % (Table 10), and the mean over all prompts that follows from it",
            ("model", "stated overall", *N_PROMPTS, "mean that follows"),
            fulfilled,
        ),
    ]


def findings() -> list[str]:
    """One sentence for each lead that may be chance, and for each place where the paper contradicts itself."""
    found = []
    for name, (counts, parts) in PAIRS.items():
        share = 100 * win_rate(*counts)[0]
        if verdict(*counts) == "not significant":
            found.append(f"The lead over {name} is not significant: {rate(*counts)} has 50 in its interval.")
        if name == "Gemini+" and abs(share - STATED_OVERALL) > ROUNDING:
            found.append(
                f"The paper states {STATED_OVERALL} as the overall win rate against {name}. The counts give "
                f"{share:.1f}; {parts[0]} is the win rate of the mixed-modal prompts alone."
            )
    for name, stated in FULFILLED.items():
        mean = weighted(BY_MODALITY[name])
        if abs(mean - stated) > ROUNDING:
            found.append(
                f"Table 10's figures for {name} have the weighted mean {mean:.1f}, and the text states {stated}."
            )
    agrees = "agrees with" if abs(by_task_mean() - FULFILLED["Chameleon"]) <= ROUNDING else "contradicts"
    found.append(
        f"Table 9's figures have the weighted mean {by_task_mean():.2f}, which {agrees} the stated "
        f"{FULFILLED['Chameleon']}."
    )
    return found


def report() -> str:
    """Markdown."""
    intro = (
        "# The paper's human evaluation, recomputed\n\n1,048 prompts, three votes each; intervals resample prompts.\n"
    )
    sentences = "".join(f"- {sentence}\n" for sentence in findings())
    return "\n".join([intro, *(table.markdown() for table in tables()), "**What the counts show**\n", sentences])
