"""Bugs to plant in evaluate/people/."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "all annotators see the same sides",
        "evaluate/people/study.py",
        'hashed(self.seed, "sides", annotator, item.id)',
        'hashed(self.seed, "sides", item.id)',
        "evaluate/test_people_study.py",
    ),
    Mutant(
        "a vote for the left answer is one for the answer whose name is first",
        "evaluate/people/results.py",
        "for name in vote.order)",
        "for name in sorted(vote.order))",
        "evaluate/test_people_results.py",
    ),
    Mutant(
        "the first vote counts, and nothing can be undone",
        "evaluate/people/votes.py",
        "before.time <= vote.time",
        "before.time > vote.time",
        "evaluate/test_people_votes.py",
    ),
    Mutant(
        "a vote is not on the disk when it is acknowledged",
        "evaluate/people/votes.py",
        "PRAGMA synchronous = FULL",
        "PRAGMA synchronous = OFF",
        "evaluate/test_people_votes.py",
    ),
    Mutant(
        "checks of annotators count as votes on models",
        "evaluate/people/study.py",
        "return item.id not in self.duplicates and item.id not in self.attention",
        "return item.id not in self.attention",
        "evaluate/test_people_results.py",
    ),
]
