"""Choices: which of several texts follows a prompt? And which would follow without what the prompt shows?

    prompt, candidates -> log-probabilities, also after a blind prompt -> acc, acc_norm, one metric for each kind

An item's content has "candidates", the place "right" of the right one, and "kinds": what is wrong with each, "" for
the right one and where nobody knows. The blind prompt lacks the image, or the word: what is likeliest after it is the
baseline of the figures.
"""

import random
from collections.abc import Sequence
from itertools import islice

from nanochameleon.evaluate.scoring import score as score_pairs
from nanochameleon.evaluate.scoring import too_long
from nanochameleon.evaluate.statistics import mean_figure
from nanochameleon.evaluate.task import Answer, Figure, Item, Line
from nanochameleon.training.run import Run

BLIND = ", blind"  # ends the names of metrics of the blind prompt


def shuffled(right: str, wrong: Sequence[tuple[str, str]], seed: int) -> dict:
    """Return the fields of a choice in an order that the seed draws. wrong: (what is wrong, candidate), ..."""
    pairs = [("", right), *wrong]
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    kinds, candidates = ([pairs[i][k] for i in order] for k in (0, 1))
    return {"candidates": candidates, "kinds": kinds, "right": order.index(0)}


def answer(
    run: Run, items: Sequence[Item], prompts: Sequence[list[int]], blind: Sequence[list[int]] = (), before: str = ""
) -> list[Answer]:
    """Score the candidates of each item after its prompt, and after its blind prompt where there are such.

    An item with a candidate that is too long for the model has {"problem": ...}.

    prompts: tokens with <s> first. before: what comes between a prompt and each candidate, such as a space.
    """
    both = [*prompts, *blind]
    candidates = [[run.tokenizer.encode(before + c) for c in item.content["candidates"]] for item in items]
    problems = [too_long(run, each) for each in candidates]
    candidates = [[] if problem else each for problem, each in zip(problems, candidates, strict=True)]
    asked = list(zip(both, candidates * (2 if blind else 1), strict=True))
    found = iter(score_pairs(run, [(prompt, each) for prompt, new in asked for each in new]))
    scored = [list(islice(found, len(new))) for _, new in asked]
    answers = []
    for i, prompt in enumerate(prompts):
        if problems[i]:
            answers.append(Answer([], {"problem": problems[i]}))
            continue
        output = {"log_probs": [each.log_prob for each in scored[i]]}
        if blind:
            output["blind"] = [each.log_prob for each in scored[len(items) + i]]
        answers.append(Answer(prompt, output, any(each.truncated for each in scored[i])))
    return answers


def likeliest(scores: Sequence[float]) -> int:
    """Return the place of the largest; of equal ones, the first."""
    return max(range(len(scores)), key=scores.__getitem__)


def judge(content: dict, scores: Sequence[float], ending: str = "") -> dict[str, float]:
    """Return acc, acc_norm (by characters), and for each kind of wrong candidate whether the right one is likelier."""
    right, lengths = content["right"], [max(1, len(text)) for text in content["candidates"]]
    metrics = {
        "acc": likeliest(scores) == right,
        "acc_norm": likeliest([s / n for s, n in zip(scores, lengths, strict=True)]) == right,
    }
    for kind, wrong in zip(content["kinds"], scores, strict=True):
        if kind:
            metrics[kind] = metrics.get(kind, True) and scores[right] > wrong
    return {name + ending: float(value) for name, value in metrics.items()}


def score(content: dict, output: dict) -> tuple[str, dict[str, float]]:
    """Return the candidate that was chosen, and the metrics, also those of the blind prompt."""
    metrics = judge(content, output["log_probs"])
    if "blind" in output:
        metrics |= judge(content, output["blind"], BLIND)
    return content["candidates"][likeliest(output["log_probs"])], metrics


def figures(lines: Sequence[Line]) -> list[Figure]:
    """Return the mean of each metric with chance, the blind baseline, and the ceiling, which is 1 by construction."""
    chance = sum(1 / len(line.content["candidates"]) for line in lines) / len(lines)
    names = sorted({name for line in lines for name in line.metrics if not name.endswith(BLIND)})
    return [figure(name, lines, chance if name.startswith("acc") else 0.5) for name in names]


def figure(name: str, lines: Sequence[Line], chance: float) -> Figure:
    having = [line.metrics for line in lines if name in line.metrics]
    blind = [metrics[name + BLIND] for metrics in having if name + BLIND in metrics]
    baseline = sum(blind) / len(blind) if blind else None
    note = "" if name.startswith("acc") else "right if the true one is likelier than the one with this fact wrong"
    values = [metrics[name] for metrics in having]
    return mean_figure(name, values, chance=chance, baseline=baseline, ceiling=1.0, note=note)
