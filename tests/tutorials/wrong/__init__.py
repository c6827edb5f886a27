"""Plausible wrong answers, at least two an exercise: WRONG = {"exercise": [answer, ...]} in one module a lesson."""
