"""What training minimises: its output layer may be fused with the loss."""

import pytest
import torch
from test_transformer import random_model

from nanochameleon.packing import Batch, pack
from nanochameleon.training import objective
from nanochameleon.training.objective import Objective
from nanochameleon.vocab import Vocab


def small_batch() -> tuple[Vocab, Batch]:
    vocab = Vocab.toy(6, 0)
    generator = torch.Generator().manual_seed(0)
    docs = [[vocab.boi, 4, 5, 6, 9, vocab.eoi, 20, 2], torch.randint(4, vocab.size, (9,), generator=generator).tolist()]
    return vocab, pack(docs, 10, vocab.pad)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_fused_output_layer_has_the_same_sums_and_gradients(precision, tolerance):
    model = random_model(0, vocab_size=Vocab.toy(6, 0).size).float()
    vocab, batch = small_batch()
    results = []
    for fused in ("on", "off"):
        model.zero_grad()
        sums = Objective(model, vocab, precision, fused_output=fused)(batch, None, 1e-2, 7.0)
        sums.next_token.loss.backward()
        results.append((list(sums.next_token), [p.grad.clone() for p in model.parameters()]))
    (ours, gradients), (expected, plain) = results
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    for x, y in zip(gradients, plain, strict=True):
        assert (x - y).norm() <= tolerance * y.norm() + 1e-7
    assert expected[5] > 0 and expected[6] > 0  # images


def test_the_fused_output_layer_is_for_large_vocabularies_without_tensor_parallelism():
    model, small, large = random_model(0), Vocab.toy(6, 0), Vocab()
    assert [Objective(model, vocab, "fp32").fused for vocab in (small, large)] == [False, True]
    assert [Objective(model, small, "fp32", fused_output=x).fused for x in ("auto", "on", "off")] == [
        False,
        True,
        False,
    ]
    assert not Objective(model, large, "fp32", fused_output="off").fused
    assert not Objective(model, large, "fp32", tp_group=object(), fused_output="on").fused


def test_without_a_gradient_there_is_no_fused_output_layer(monkeypatch):
    monkeypatch.setattr(objective, "fused_next_token_loss", None)
    model = random_model(0, vocab_size=Vocab.toy(6, 0).size)
    vocab, batch = small_batch()
    with torch.no_grad():
        fused, plain = (Objective(model, vocab, "fp32", fused_output=x)(batch, None) for x in ("on", "off"))
    assert torch.equal(fused.next_token.loss, plain.next_token.loss)
