"""The loss: what is counted, that micro-batches add up, that the z-term is of log Z, and its gradient."""

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

from nanochameleon.bench.measure import peak_bytes
from nanochameleon.kernels import use_kernels
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.losses import GradientInForward, LossSums, fused_next_token_loss, next_token_loss
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
    expected = dict.fromkeys(LossSums._fields, 0.0)
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target == IGNORE:
            continue
        log_z = math.log(sum(math.exp(x) for x in row.tolist()))
        cross_entropy = log_z - row[target].item()
        image = VOCAB.modality(target) == "image"
        for name, value in dict(loss=(cross_entropy + 0.1 * log_z**2) / 7, cross_entropy=cross_entropy,
                                log_z_squared=log_z**2, log_z=log_z, count=1,
                                image_cross_entropy=cross_entropy * image, image_count=image).items():  # fmt: skip
            expected[name] += value
    sums = next_token_loss(logits, targets, VOCAB, 0.1, 7.0)
    assert {name: x.item() for name, x in sums._asdict().items()} == pytest.approx(expected)


@given(problems())
def test_ignored_rows_get_no_gradient_and_the_others_that_of_the_formula(problem):
    """p (1 + 2 z log Z) - [v = y], over the count; so a row sums to 2 z log Z / n, and an ignored one is all zero."""
    logits, targets = problem
    x, n, z = logits.clone().requires_grad_(), 7.0, 0.01
    next_token_loss(x, targets, VOCAB, z, n).loss.backward()
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
    torch.testing.assert_close(after.log_z_squared, (log_z + c).square().sum())


def test_nothing_to_learn_is_zero_not_nan():
    logits = torch.randn(3, VOCAB.size, requires_grad=True)
    sums = next_token_loss(logits, torch.full((3,), IGNORE), VOCAB, 1e-5)
    assert all(x == 0 for x in sums)
    sums.loss.backward()
    assert (logits.grad == 0).all()


def test_only_what_is_minimised_carries_a_gradient():
    logits = torch.randn(3, VOCAB.size, requires_grad=True)
    sums = next_token_loss(logits, torch.tensor([4, 5, 30]), VOCAB)
    assert [name for name, x in sums._asdict().items() if x.requires_grad] == ["loss"]


def test_sums_of_bfloat16_logits_are_float32():
    """In bfloat16 a sum stops growing after 256 ones."""
    logits = torch.zeros(3_000, VOCAB.size, dtype=torch.bfloat16)
    sums = next_token_loss(logits, torch.full((3_000,), 5), VOCAB)
    assert sums.cross_entropy.item() == pytest.approx(3_000 * math.log(VOCAB.size), rel=1e-5)
    assert sums.count == sums.image_count == 3_000


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
        count = max(float((batch.targets != IGNORE).sum()), 1.0)
        for part in parts:
            logits = model.logits(model(part.tokens, part.positions, Documents.of(part.doc_ids))).flatten(0, 1)
            next_token_loss(logits, part.targets.flatten(), vocab, 1e-2, count).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    micro = [batch[i : i + size] for i in range(0, len(batch.tokens), size)]
    torch.testing.assert_close(gradient(micro), gradient([batch]), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient, made in the forward pass


@pytest.mark.parametrize("kernels", ["reference", "numba"])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
@given(problem=problems())
def test_the_gradient_is_multiplied_by_the_upstream_number(kernels, upstream, problem):
    """With and without the logits' memory."""
    logits, targets = problem
    x = logits.float().requires_grad_()
    log_z = x.logsumexp(-1)[targets != IGNORE]
    truth = torch.nn.functional.cross_entropy(x, targets, reduction="sum") + 0.01 * log_z.square().sum()
    (expected,) = torch.autograd.grad(upstream * truth / 7, x)
    for overwrite in (False, True):
        with use_kernels(kernels):
            loss = next_token_loss(x * 1, targets, VOCAB, 0.01, 7.0, overwrite).loss
        torch.testing.assert_close(loss, truth / 7)
        torch.testing.assert_close(*torch.autograd.grad(upstream * loss, x), expected, rtol=1e-5, atol=1e-6)


def test_logits_are_overwritten_with_their_gradient_only_where_that_is_allowed():
    x, targets = torch.randn(4, VOCAB.size, requires_grad=True), torch.tensor([4, 5, IGNORE, 30])
    kept, given_up = x * 1, x * 1
    first = torch.autograd.grad(next_token_loss(kept, targets, VOCAB).loss, kept)[0]
    second = torch.autograd.grad(next_token_loss(given_up, targets, VOCAB, overwrite_logits=True).loss, given_up)[0]
    assert torch.equal(kept, x) and torch.equal(first, second)
    assert second.data_ptr() == given_up.data_ptr() and first.data_ptr() != kept.data_ptr()
    with torch.no_grad():
        next_token_loss(kept, targets, VOCAB, overwrite_logits=True)  # no gradient, so no place for one
        assert torch.equal(kept, x)
    strided = (x * 1).T.contiguous().T
    third = torch.autograd.grad(next_token_loss(strided, targets, VOCAB, overwrite_logits=True).loss, strided)[0]
    assert torch.equal(strided, x) and torch.equal(first, third)


@pytest.mark.parametrize("kernels", ["reference", "numba"])
def test_overwritten_logits_serve_one_gradient_and_no_other_reader(kernels):
    x, targets = torch.randn(2, VOCAB.size, requires_grad=True) * 1, torch.tensor([1, 2])
    square = x.square()
    with use_kernels(kernels):
        loss = next_token_loss(x, targets, VOCAB, overwrite_logits=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward(retain_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


@pytest.mark.parametrize("kernels, dtype, most", [
    ("numba", torch.float32, 1.1), ("numba", torch.bfloat16, 1.1), ("reference", torch.float32, 2.1),
])  # fmt: skip
def test_a_step_holds_the_logits_once(kernels, dtype, most):
    """They are made and become their gradient; the reference has its softmax besides."""
    x, targets = torch.ones(500, 1, dtype=dtype, requires_grad=True), torch.arange(500)

    def step():
        logits = x.expand(-1, 4_000).contiguous()  # no matmul: on some processors it takes memory of its own
        with use_kernels(kernels):
            next_token_loss(logits, targets, VOCAB, 1e-5, 500.0, overwrite_logits=True).loss.backward()

    assert peak_bytes(step, torch.device("cpu")) / (500 * 4_000 * x.element_size()) < most


@given(problems())
def test_the_fused_output_layer_has_the_same_sums_and_gradients(problem):
    logits, targets = problem
    generator = torch.Generator().manual_seed(len(logits))
    hidden, weight = (torch.randn(n, 5, generator=generator).requires_grad_() for n in logits.shape)
    plain = next_token_loss(hidden @ weight.T, targets, VOCAB, 0.01, 7.0)
    fused = fused_next_token_loss(hidden, weight, targets, VOCAB, 0.01, 7.0)
    torch.testing.assert_close(tuple(fused), tuple(plain))
    expected, result = (torch.autograd.grad(sums.loss, (hidden, weight)) for sums in (plain, fused))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_a_training_step_leaves_its_gradient_as_it_was_made(monkeypatch, tmp_path):
    """The upstream number is 1. Otherwise each gradient would be multiplied: right, but one more pass over memory."""
    seen = []

    def backward(ctx, upstream, *rest):
        seen.append(float(upstream))
        return original(ctx, upstream, *rest)

    original = GradientInForward.backward
    monkeypatch.setattr(GradientInForward, "backward", backward)
    model = random_model(0, vocab_size=VOCAB.size).float()
    docs = [torch.randint(2, VOCAB.size, (n,)).tolist() for n in (5, 9, 3, 7)]
    batch, cfg = pack(docs, 9, pad=VOCAB.pad), training_config(tmp_path)
    cfg = replace(cfg, parallel=replace(cfg.parallel, micro_batch=1))
    objective = Objective(model, VOCAB, "fp32")
    mesh = Mesh(torch.device("cpu"))
    model, seeds = ParallelModel(objective, objective, mesh), torch.arange(len(batch.tokens))
    train.forward_backward(model, batch, seeds, cfg.train.z_loss, cfg.parallel.micro_batch)
    assert seen == [1.0] * len(batch.tokens) and len(seen) > 1
