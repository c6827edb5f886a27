"""Human evaluation: people judge the answers of models without knowing whose they are. The paper's section 4.

    study, votes = open_study(DIR), Votes(study)            what annotators may see, and what they said
    asked = next_question(study, votes, "ann")              a prompt, one or two answers and a question; None at the end
    votes.cast("ann", asked.item, asked.question.name, "first", seconds)
    votes.undo("ann"); progress(study, votes, "ann"); results_so_far(study, votes, open_key(DIR))

    python -m nanochameleon.evaluate human make | annotate | report | export | import | paper        (people/)

Any page or program on which people vote needs these functions alone; people/terminal.py is one. `results_so_far` is for
the owner of the study, who has the unblinding table.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nanochameleon.evaluate.people.questions import Question
from nanochameleon.evaluate.people.results import Results, results
from nanochameleon.evaluate.people.study import Item, Key, Segments, Study, check_annotator, open_key, open_study
from nanochameleon.evaluate.people.votes import Votes

__all__ = [
    "AskedQuestion",
    "Progress",
    "Votes",
    "next_question",
    "open_key",
    "open_questions",
    "open_study",
    "progress",
    "results_so_far",
]


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


def open_questions(study: Study, votes: Votes, annotator: str) -> Iterator[tuple[Item, Question]]:
    """Yield all that this annotator can still answer, in order.

    An item with enough votes is left out, unless this annotator has begun it. Two people who work at once may both get
    the last vote that an item lacks; then it has one more.
    """
    said = {(vote.item, vote.question) for vote in votes.current_votes(check_annotator(annotator))}
    begun = {item for item, _ in said}
    for item in study.order(annotator):
        if item.for_all_annotators or item.id in begun or votes.n_others(item.id, annotator) < study.votes_per_item:
            for question in study.questions(item):
                if (item.id, question.name) not in said:
                    yield item, question


def next_question(study: Study, votes: Votes, annotator: str) -> AskedQuestion | None:
    """Return what to ask this annotator next; None: there is nothing left."""
    for item, question in open_questions(study, votes, annotator):
        answers = [study.answers[name] for name in study.sides(annotator, item)]
        return AskedQuestion(item.id, question, study.prompts[item.prompt], answers)
    return None


def progress(study: Study, votes: Votes, annotator: str) -> Progress:
    done = len(votes.current_votes(check_annotator(annotator)))
    return Progress(done, done + sum(1 for _ in open_questions(study, votes, annotator)))


def results_so_far(study: Study, votes: Votes, key: Key) -> Results:
    """The results so far, of every item with a vote."""
    return results(study, key, votes.current_votes(), least=1)
