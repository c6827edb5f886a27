"""One planted bug."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    bug: str  # what it is, in words
    file: str  # in the package, kernels/ included, or train.py or sample.py
    old: str  # found exactly once in that file
    new: str
    tests: str  # files that must turn red, under tests/, separated by spaces
