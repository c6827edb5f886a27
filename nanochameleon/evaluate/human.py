"""Human evaluation: people judge the answers of models without knowing whose they are. The paper's section 4.

    study, votes = open_study(DIR), Votes(study)            what annotators may see, and what they said
    asked = next_question(study, votes, "ann")              a prompt, one or two answers and a question; None at the end
    votes.cast("ann", asked.item, asked.question.name, "first", seconds)
    votes.undo("ann"); progress(study, votes, "ann"); live(DIR)

    python -m nanochameleon.evaluate human make | annotate | report | export | import | paper        (people/)

Any page or program on which people vote needs these functions alone; people/terminal.py is one. `live` is for the owner
of the study, since it reads the unblinding table.
"""

from dataclasses import dataclass
from pathlib import Path

from nanochameleon.evaluate.people.questions import Question
from nanochameleon.evaluate.people.results import Results, results
from nanochameleon.evaluate.people.study import Item, Segments, Study, check_annotator, open_key, open_study
from nanochameleon.evaluate.people.votes import Votes

__all__ = ["AskedQuestion", "Progress", "Votes", "live", "next_question", "open_study", "progress"]


@dataclass(frozen=True)
class AskedQuestion:
    """What an annotator sees next. Nothing in it says whose the answers are."""

    item: str
    question: Question
    prompt: Segments
    answers: list[Segments]  # one, or the left and the right one; study.image(name) is the file of an image


@dataclass(frozen=True)
class Progress:
    done: int  # questions that this annotator has answered
    total: int  # with those that are still open


def open_questions(study: Study, votes: Votes, annotator: str) -> list[tuple[Item, Question]]:
    """All that this annotator can still answer, in order.

    An item with enough votes is left out, unless this annotator has begun it. Two people who work at once may both get
    the last vote that an item lacks; then it has one more.
    """
    said = {(vote.item, vote.question) for vote in votes.live(check_annotator(annotator))}
    begun, others = {item for item, _ in said}, votes.voters(annotator)
    return [
        (item, question)
        for item in study.order(annotator)
        if item.everyone or item.id in begun or others[item.id] < study.wanted
        for question in study.questions(item)
        if (item.id, question.name) not in said
    ]


def next_question(study: Study, votes: Votes, annotator: str) -> AskedQuestion | None:
    """Return what to ask this annotator next; None: there is nothing left."""
    left = open_questions(study, votes, annotator)
    if not left:
        return None
    item, question = left[0]
    answers = [study.answers[name] for name in study.sides(annotator, item)]
    return AskedQuestion(item.id, question, study.prompts[item.prompt], answers)


def progress(study: Study, votes: Votes, annotator: str) -> Progress:
    done = len(votes.live(check_annotator(annotator)))
    return Progress(done, done + len(open_questions(study, votes, annotator)))


def live(folder: Path) -> Results:
    """The results so far, of every item with a vote, for the owner of a study."""
    study = open_study(folder)
    votes = Votes(study)
    try:
        return results(study, open_key(folder), votes.live(), least=1)
    finally:
        votes.close()
