"""Results as tables in the paper's forms, in Markdown and CSV.

Table 4    how far people agree              Table 10          fulfilment, mixed-modal and text-only prompts
Table 9    fulfilment by kind of task        Tables 11 to 14   wins, ties and losses by kind of task
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanochameleon.evaluate.agreement import win_rate, win_rate_interval
from nanochameleon.evaluate.intervals import clopper_pearson, wilson
from nanochameleon.evaluate.people.bradley_terry import PRIOR
from nanochameleon.evaluate.people.questions import ABSOLUTE, FULFILMENT
from nanochameleon.evaluate.people.results import ALL, MIXED, NO_MAJORITY, TEXT_ONLY, Pair, Results

RARE = 10  # events on either side: fewer take the exact interval


@dataclass(frozen=True)
class Table:
    name: str  # of its CSV file
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [row_of(self.header), "|" + "---|" * len(self.header), *map(row_of, self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines]) + "\n"

    def csv(self) -> str:
        return to_csv([self.header, *self.rows])


def row_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |"


def escape_formula(cell: object) -> str:
    """Return a cell that no spreadsheet takes for a formula.

    A cell that starts with = + - @, a tab, a line end or an apostrophe gets an apostrophe in front, which spreadsheets
    read as "this is text". To read a cell back, remove one leading apostrophe.
    """
    text = str(cell)
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n", "'") else text


def to_csv(rows: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([escape_formula(cell) for cell in row] for row in rows)
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def percent(k: int, n: int) -> str:
    """A share and its 95% interval: Wilson's, or for rare events the exact one."""
    if n == 0:
        return ""
    low, high = (clopper_pearson if min(k, n - k) < RARE else wilson)(k, n)
    return f"{100 * k / n:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def rate(wins: int, ties: int, losses: int) -> str:
    """A win rate and its 95% interval by resampling prompts."""
    low, high = win_rate_interval(wins, ties, losses)
    return f"{100 * win_rate(wins, ties, losses)[0]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def verdict(wins: int, ties: int, losses: int) -> str:
    """Say whether a lead may be chance: whether 50% is inside the interval.

    Two wins in two prompts have an interval without width, since every resample is the same. So the exact interval of
    the wins among wins and losses must exclude 50%, too.
    """
    low, high = win_rate_interval(wins, ties, losses)
    least, most = clopper_pearson(wins, wins + losses) if wins + losses else (0.0, 1.0)
    return "ahead" if min(low, least) > 0.5 else "not ahead" if max(high, most) < 0.5 else "not significant"


def kinds_first(kinds: Iterable[str]) -> list[str]:
    """All prompts, the two modalities, then the kinds of tasks by name."""
    first = [ALL, MIXED, TEXT_ONLY]
    return [kind for kind in first if kind in (kinds := set(kinds))] + sorted(kinds - {*first})


# ---------------------------------------------------------------------------------------------------------------------
# Tables of a study


def all_tables(found: Results) -> list[Table]:
    """Every table that these results can fill."""
    judged_alone = {each.subject for each in found.judged if isinstance(each.subject, str)}
    models = [model for model in found.models if model in judged_alone]
    tables = [win_table(found), agreement_table(found), *(pair_table(found, pair) for pair in found.pairs)]
    tables += [fulfilment_by_task(found, models), fulfilment_by_modality(found, models), *answers(found, models)]
    tables += [alpha_table(found), rating_table(found), quality_table(found)]
    return [table for table in tables if table.rows]


def win_table(found: Results) -> Table:
    rows = [(*pair, *map(str, counts), rate(*counts), verdict(*counts))
            for pair in found.pairs for counts in [found.outcomes(pair)[ALL]]]  # fmt: skip
    header = "model", "against", "wins", "ties", "losses", "win rate %, 95% interval", "first model is"
    return Table("win_rates", "Win rates (ties are half a win)", header, rows)


def agreement_table(found: Results) -> Table:
    rows = [(" against ".join(pair), *map(str, found.agreement(pair))) for pair in found.pairs]
    header = "pair", "all agree", "only a majority agrees", "no agreement"
    return Table("table_4", "How many prompts have votes that agree (the paper's Table 4)", header, rows)


def pair_table(found: Results, pair: Pair) -> Table:
    outcomes = found.outcomes(pair)
    rows = [(kind, *map(str, outcomes[kind]), rate(*outcomes[kind])) for kind in kinds_first(outcomes)]
    title = f"{pair[0]} against {pair[1]} by kind of prompt (the paper's Tables 11 to 14)"
    return Table(
        f"wins {pair[0]} against {pair[1]}",
        title,
        ("prompts", "wins", "ties", "losses", "win rate %, 95% interval"),
        rows,
    )


def full(counts: dict[str, Counter], kind: str) -> str:
    return percent(counts[kind]["yes"], counts[kind].total()) if kind in counts else ""


def fulfilment_by_task(found: Results, models: list[str]) -> Table:
    counts = [found.counts(model, FULFILMENT) for model in models]
    kinds = [kind for kind in kinds_first({k for each in counts for k in each}) if kind not in (MIXED, TEXT_ONLY)]
    rows = [(kind, *(full(each, kind) for each in counts)) for kind in kinds]
    title = "Prompts whose task is fully fulfilled, %, by kind of task (the paper's Table 9)"
    return Table("table_9", title, ("prompts", *models), rows)


def fulfilment_by_modality(found: Results, models: list[str]) -> Table:
    counts = {model: found.counts(model, FULFILMENT) for model in models}
    rows = [(model, full(each, MIXED), full(each, TEXT_ONLY)) for model, each in counts.items() if each]
    title = "Prompts whose task is fully fulfilled, %, by modality (the paper's Table 10)"
    return Table("table_10", title, ("model", MIXED, TEXT_ONLY), rows)


def answers(found: Results, models: list[str]) -> list[Table]:
    """A table for each absolute question: % of each label. "No majority" is a column of its own."""
    tables = []
    for question in ABSOLUTE:
        counts = {model: found.counts(model, question.name)[ALL] for model in models}
        labels = (*question.labels, NO_MAJORITY)
        rows = [(model, str(n), *(percent(count[label], n) for label in labels))
                for model, count in counts.items() if (n := count.total())]  # fmt: skip
        tables.append(Table(f"question_{question.name}", question.text, ("model", "answers", *labels), rows))
    return tables


def alpha_table(found: Results) -> Table:
    rows = []
    for name, alpha in found.alphas().items():
        cells = (alpha, "", "") if isinstance(alpha, str) else (f"{alpha[0]:.3f}", f"{alpha[1]:.3f} to {alpha[2]:.3f}",
                                                               str(alpha[3]))  # fmt: skip
        rows.append((name, *cells))
    header = "question", "alpha", "95% interval, 1,000 bootstraps", "items with two votes or more"
    return Table("alpha", "Krippendorff's alpha (nominal)", header, rows)


def rating_table(found: Results) -> Table:
    rows = [(model, f"{r:.0f}", f"{low:.0f} to {high:.0f}") for model, (r, low, high) in found.ratings().items()]
    title = f"Bradley-Terry ratings of mean 1000; each pair has {PRIOR} wins more for each side, so all are finite"
    return Table("ratings", title, ("model", "rating", "95% interval, prompts resampled"), rows)


def quality_table(found: Results) -> Table:
    rows = [
        (name, str(q.votes), f"{q.median_seconds:.1f}", f"{q.same_again} of {q.repeated}", f"{q.failed} of {q.checks}")
        for name, q in found.quality.items()
    ]
    header = "annotator", "votes", "median seconds", "same answer to a duplicate", "failed checks of attention"
    return Table("annotators", "Annotators", header, rows)
