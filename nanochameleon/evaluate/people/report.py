"""The report of a study: all tables that its votes can fill, printed and written next to the unblinding table."""

from collections.abc import Sequence
from pathlib import Path

from nanochameleon.evaluate.human import Votes, open_study
from nanochameleon.evaluate.people.results import results
from nanochameleon.evaluate.people.study import Study, open_key
from nanochameleon.evaluate.people.tables import all_tables
from nanochameleon.files import write_file


def make_report(folder: Path, least: int | None = None, without: Sequence[str] = ()) -> str:
    """Write STUDY/owner/report as Markdown, and a CSV file for each table; return the Markdown."""
    study = open_study(folder)
    votes = Votes(study)
    found = results(study, open_key(folder), [v for v in votes.live() if v.annotator not in without], least)
    votes.close()
    tables = all_tables(found)
    text = "\n".join([heading(study, len(found.judged), found.incomplete, least), *(t.markdown() for t in tables)])
    write_file(folder / "owner" / "report.md", text.encode("utf-8", "replace"))
    for table in tables:
        write_file(folder / "owner" / f"{table.name}.csv", table.csv().encode("utf-8", "replace"))
    return text


def heading(study: Study, judged: int, incomplete: int, least: int | None) -> str:
    least = study.wanted if least is None else least
    return (
        f"# Human evaluation\n\nStudy {study.id[:12]}. {judged} questions about items have at least {least} votes and "
        f"count; {incomplete} have fewer and do not. A majority decides; without one, a pair is a tie. Shares have "
        f"Wilson's 95% interval, or the exact one for rare events; win rates resample prompts.\n"
    )
