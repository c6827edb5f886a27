"""What lesson 7's answers must do: checked against generation/sampling.py."""

import torch

from checks import Wrong, compare, same, shown
from nanochameleon.generation.sampling import Grammar, classifier_free_guidance, top_k_top_p
from nanochameleon.vocab import Vocab


def top_p(answer):
    """The tokens that stay are those of `top_k_top_p`, with ties, one token of nearly all, and p = 1."""

    def spec(probs, p):
        kept = top_k_top_p(probs.log()[None], torch.tensor([torch.inf]), torch.tensor([p], dtype=torch.float64))
        return kept[0] > -torch.inf

    torch.manual_seed(0)
    cases = [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.99, 0.004, 0.006], [0.25] * 4, [0.6, 0.1, 0.1, 0.1, 0.1]]
    inputs = [(torch.tensor(case).double(), p) for case in cases for p in (0.6, 0.05, 0.9)]
    inputs += [(torch.rand(9).double().softmax(0), p) for p in (0.3, 0.77)] + [(torch.tensor([0.5, 0.5]).double(), 1.0)]
    compare(answer, spec, inputs)


def allowed(answer):
    """How many tokens the release's grammar allows in text, in an image and at an image's end."""
    grammar = Grammar.start(Vocab(), 1_024, ["both"] * 3, [-1, 1_000, 0], [4_000] * 3, [None] * 3)
    for where, given, expected in zip(("text", "an image", "its end"), answer, grammar.mask().sum(1), strict=True):
        if not same(int(expected), given, 0.0):
            raise Wrong(f"in {where}, {shown(given)} is not right" if where != "its end" else "the end is not right")


def guidance(answer):
    """Guidance with scale 3 makes the token likeliest that is the least likely one with the prompt and without."""
    rows = [torch.tensor(row, dtype=torch.float64) for row in answer]
    if any(row.shape != (3,) or not row.isfinite().all() for row in rows):
        raise Wrong("the answer is two lists of three finite numbers")
    cond, uncond = rows
    three = torch.tensor([3.0])
    guided = classifier_free_guidance(cond[None], uncond[None], uncond[None], three, three)[0]
    best = int(guided.argmax())
    for what, row in (("with", cond), ("without", uncond)):
        if not bool((row[best] < row[torch.arange(3) != best]).all()):
            raise Wrong(f"guidance makes token {best} likeliest, which is not the least likely {what} the prompt")
