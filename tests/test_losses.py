"""Sums and counts: what is counted, that micro-batches add up, and that the z-term is of log Z."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transformer import TINY, random_model
from tiny import training_config

from nanochameleon.kernels import use_kernels
from nanochameleon.kernels.zloss import cross_entropy as zloss
from nanochameleon.kernels.zloss.cross_entropy import Expected
from nanochameleon.losses import LossParts, next_token_loss
from nanochameleon.packing import IGNORE, pack
from nanochameleon.parallel.apply import ParallelModel
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.training.objective import Objective
from nanochameleon.vocab import Vocab

sys.path.insert(0, str(Path(__file__).parents[1]))

import train

VOCAB = Vocab.toy(6, 0)


@st.composite
def problems(draw):
    """(logits (N, V) float64, targets (N,)) with any pattern of ignored targets, all of them included."""
    n, seed = draw(st.integers(1, 8)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(VOCAB.size, (n,), generator=generator)
    some = torch.randint(4, 4 + 6, (n,), generator=generator)  # half of them codes
    targets = torch.where(torch.rand(n, generator=generator) < 0.5, some, targets)
    ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    logits = 3 * torch.randn(n, VOCAB.size, generator=generator).double()
    return logits, targets.masked_fill(ignored, IGNORE)


@given(problems())
def test_sums_and_counts_are_those_of_a_loop(problem):
    logits, targets = problem
    expected = dict.fromkeys(("cross_entropy", "z", "log_z", "count", "image_cross_entropy", "image_count"), 0.0)
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target == IGNORE:
            continue
        log_z = math.log(sum(math.exp(x) for x in row.tolist()))
        cross_entropy = log_z - row[target].item()
        image = VOCAB.modality(target) == "image"
        for name, value in dict(cross_entropy=cross_entropy, z=log_z**2, log_z=log_z, count=1,
                                image_cross_entropy=cross_entropy * image, image_count=image).items():  # fmt: skip
            expected[name] += value
    parts = next_token_loss(logits, targets, VOCAB)
    assert {name: getattr(parts, name).item() for name in expected} == pytest.approx(expected)


@given(problems())
def test_ignored_rows_get_no_gradient_and_the_others_that_of_the_formula(problem):
    """p (1 + 2 z log Z) - [v = y], over the count; so a row sums to 2 z log Z / n, and an ignored one is all zero."""
    logits, targets = problem
    x, n, z = logits.clone().requires_grad_(), 7.0, 0.01
    next_token_loss(x, targets, VOCAB).total(z, n).backward()
    kept = targets != IGNORE
    assert (x.grad[~kept] == 0).all() and x.grad.isfinite().all()
    log_z = logits.logsumexp(-1, keepdim=True)
    one_hot = torch.nn.functional.one_hot(targets[kept], VOCAB.size)
    expected = (logits.softmax(-1) * (1 + 2 * z * log_z))[kept] - one_hot
    torch.testing.assert_close(x.grad[kept], expected / n)


@given(problems(), st.floats(-50, 50))
def test_a_shift_of_all_logits_moves_the_z_term_alone(problem, c):
    """The cross-entropy cannot see it; each log Z grows by c, so z becomes the sum of (log Z + c)^2."""
    logits, targets = problem
    before, after = (next_token_loss(x, targets, VOCAB) for x in (logits, logits + c))
    torch.testing.assert_close(after.cross_entropy, before.cross_entropy, rtol=1e-9, atol=1e-9)
    log_z = logits[targets != IGNORE].logsumexp(-1)
    torch.testing.assert_close(after.z, (log_z + c).square().sum())


def test_nothing_to_learn_is_zero_not_nan():
    logits = torch.randn(3, VOCAB.size, requires_grad=True)
    parts = next_token_loss(logits, torch.full((3,), IGNORE), VOCAB)
    assert all(getattr(parts, name) == 0 for name in LossParts._fields)
    parts.total(1e-5, 1.0).backward()
    assert (logits.grad == 0).all()


def test_only_what_is_minimised_carries_gradients():
    logits = torch.randn(3, VOCAB.size, requires_grad=True)
    parts = next_token_loss(logits, torch.tensor([4, 5, 30]), VOCAB)
    learnt = {name for name in LossParts._fields if getattr(parts, name).requires_grad}
    assert learnt == {"cross_entropy", "z"}


def test_no_parts_are_lost_between_types():
    """bfloat16 logits are summed in float32: in bfloat16 a sum stops growing after 256 ones."""
    logits = torch.zeros(3_000, VOCAB.size, dtype=torch.bfloat16)
    parts = next_token_loss(logits, torch.full((3_000,), 5), VOCAB)
    assert parts.cross_entropy.item() == pytest.approx(3_000 * math.log(VOCAB.size), rel=1e-5)
    assert parts.count == parts.image_count == 3_000


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(1, 5), st.integers(0, 1_000))
def test_micro_batches_over_the_global_count_are_the_full_batch(lengths, size, seed):
    """Rows hold different numbers of targets, so that a mean of the micro-batches' means would differ."""
    torch.manual_seed(seed)
    model, vocab = random_model(seed, vocab_size=VOCAB.size), VOCAB
    docs = [torch.randint(2, TINY.vocab_size, (n,)).tolist() for n in lengths]
    batch = pack(docs, 9, pad=vocab.pad)

    def gradient(parts):
        model.zero_grad()
        count = (batch.targets != IGNORE).sum().clamp_min(1)
        for part in parts:
            logits = model.logits(model(part.tokens, part.positions, part.doc_ids)).flatten(0, 1)
            next_token_loss(logits, part.targets.flatten(), vocab).total(1e-2, count).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    micro = [batch[i : i + size] for i in range(0, len(batch.tokens), size)]
    torch.testing.assert_close(gradient(micro), gradient([batch]), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# A loss that is known before


@pytest.mark.parametrize("share", [1 / 7, 3.0])
@given(problem=problems())
def test_whatever_loss_was_expected_the_gradient_is_that_of_this_one(share, problem):
    logits, targets = problem
    gradients, parts = [], []
    for expected in (None, Expected(0.01, share)):
        x = logits.float().requires_grad_()
        parts.append(next_token_loss(x * 1, targets, VOCAB, expected=expected))
        gradients += torch.autograd.grad(parts[-1].total(0.01, 7.0), x)
    torch.testing.assert_close(*parts)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_training_step_foretells_its_loss(monkeypatch, tmp_path):
    """Else each gradient would be corrected, which is right and takes as long as what was saved."""
    seen = []

    def as_made(gradient, *rest):
        before = gradient.clone()
        seen.append(torch.equal(corrected_(gradient, *rest), before))
        return gradient

    corrected_ = zloss._corrected_
    monkeypatch.setattr(zloss, "_corrected_", as_made)
    model = random_model(0, vocab_size=VOCAB.size).float()
    docs = [torch.randint(2, VOCAB.size, (n,)).tolist() for n in (5, 9, 3, 7)]
    batch, cfg = pack(docs, 9, pad=VOCAB.pad), training_config(tmp_path)
    cfg = replace(cfg, parallel=replace(cfg.parallel, micro_batch=1))
    objective = Objective(model, VOCAB, "fp32")
    mesh = Mesh(torch.device("cpu"))
    with use_kernels("numba"):
        model, seeds = ParallelModel(objective, objective, mesh), torch.arange(len(batch.tokens))
        train.forward_backward(model, batch, seeds, cfg.train.z_loss, cfg.parallel.micro_batch)
    assert seen == [True] * len(batch.tokens) and len(seen) > 1
