"""The bench of choices: its items, and transformers' scores next to ours."""

from dataclasses import replace

import pytest
import torch

from nanochameleon.bench import choices
from nanochameleon.bench.choices import CASES, as_run, items, our_scores, same_choices, their_scores
from nanochameleon.bench.engine import TOY, TOY_VOCAB, as_transformers, random_model
from nanochameleon.errors import UserError

SMALL = replace(TOY, dim=32, n_layers=2, multiple_of=16)
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_items_have_the_sizes_that_their_names_say(case):
    asked = items(case._replace(n_items=40))
    assert asked == items(case._replace(n_items=40))
    lengths = [len(item.context) for item in asked]
    assert sum(lengths) / 40 == pytest.approx(int(case.name.split()[0]), rel=0.15) and len(set(lengths)) > 1
    for context, candidates in asked:
        assert context[0] == TOY_VOCAB.bos
        assert sum(TOY_VOCAB.is_image(token) for token in context) == case.codes
        assert len(candidates) == 4 and all(4 <= len(candidate) <= 12 for candidate in candidates)
        if case.near:
            first, *others = candidates
            assert all(sum(a != b for a, b in zip(first, other, strict=True)) <= 1 for other in others)
    shared = [a == b for a, b in zip(asked[0].context, asked[1].context, strict=False)]
    assert all(shared[: case.shots + 1]) == case.shared and not all(shared)


def test_transformers_gives_the_same_scores():
    pytest.importorskip("transformers", reason="transformers is optional: pip install transformers to compare with it")
    model = random_model(SMALL, CPU, torch.float32)
    asked = items(CASES[1]._replace(n_items=20, codes=4))  # two batches
    ours = our_scores(as_run(model), asked)
    torch.testing.assert_close(ours, their_scores(as_transformers(model, TOY_VOCAB), asked), atol=1e-3, rtol=0)
    same_choices(ours, ours, 0.0)


def test_another_choice_is_seen():
    ours, theirs = torch.tensor([[-1.0, -2.0, -9.0, -9.0]]), torch.tensor([[-2.0, -1.5, -9.0, -9.0]])
    same_choices(ours, theirs, 1.0)
    with pytest.raises(AssertionError, match="differs"):
        same_choices(ours, theirs, 0.5)


def test_rows_without_a_peer(monkeypatch):
    models = {"fp32": as_run(random_model(SMALL, CPU, torch.float32))}
    [row] = choices.measure(CASES[0]._replace(n_items=2), models, {}, rounds=1)
    assert (row.case, row.variant, row.unit, row.ratio) == ("30 tokens", "nano fp32", "items/s", None) and row.value > 0
    with pytest.raises(UserError, match="CPU"):
        next(choices.bench(torch.device("meta"), quick=True))
