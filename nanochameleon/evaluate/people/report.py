"""The report of a study: all tables that its votes can fill, printed and written next to the unblinding table."""

from collections.abc import Sequence
from pathlib import Path

from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.human import Votes, open_study
from nanochameleon.evaluate.people.results import results
from nanochameleon.evaluate.people.study import Study, open_key
from nanochameleon.evaluate.people.tables import all_tables
from nanochameleon.files import write_file


def make_report(folder: Path, least: int | None = None, without: Sequence[str] = ()) -> str:
    """Write STUDY/owner/report as Markdown, and a CSV file for each table in STUDY/owner/tables; return the Markdown.

    Tables of an earlier report are removed, since this one may lack some of them.
    """
    study = open_study(folder)
    votes = Votes(study)
    said = votes.current_votes()
    votes.close()
    if unknown := sorted({*without} - {vote.annotator for vote in said}):
        raise UserError(f"--without names {shown(unknown[0])}, who has no votes: give names as they are in the report")
    found = results(study, open_key(folder), [vote for vote in said if vote.annotator not in without], least)
    tables = all_tables(found)
    text = "\n".join([heading(study, len(found.judged), found.incomplete, least), *(t.markdown() for t in tables)])
    write_file(folder / "owner" / "report.md", text.encode("utf-8", "replace"))
    place = folder / "owner" / "tables"
    place.mkdir(exist_ok=True)
    for path in place.glob("*.csv"):
        path.unlink()
    for table in tables:
        write_file(place / f"{table.name}.csv", table.csv().encode("utf-8", "replace"))
    return text


def heading(study: Study, judged: int, incomplete: int, least: int | None) -> str:
    least = study.votes_per_item if least is None else least
    return (
        f"# Human evaluation\n\nStudy {study.id[:12]}. {judged} questions, each about one item, have at least {least} "
        f"votes and count; {incomplete} have fewer and do not. A majority decides; without one, a pair is a tie. "
        f"Shares have Wilson's 95% interval, or the exact one for rare events; win rates resample prompts.\n"
    )
